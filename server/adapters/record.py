"""AdapterRecord and History: what a name points to, what it pointed to before, and how that is written down.

A history's file is a JSON object with a checksum over its other fields. A damaged one is told from a sound one, as the
store may throw away bytes that no history points to. Fields that nobody here knows are read over.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any

from server.adapters.quota import NO_QUOTA, StorageQuota, StoredUsage
from server.errors import InvalidRequestError

__all__ = [
    "AT_ONCE",
    "NAME_PATTERN",
    "TENANT_MARK",
    "AdapterRecord",
    "History",
    "Publication",
    "check_labels",
    "check_name",
    "decode_history",
    "encode_history",
    "owner_of",
    "split_reference",
    "within_quota",
]

TENANT_MARK = "~"  # before it stands a tenant: see server.tenancy
NAME_PATTERN = re.compile(r"([a-z0-9][a-z0-9-]{0,31}~)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
LABEL_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
FORMAT = 2
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 256
MAX_NOTE_CHARACTERS = 4096
MAX_GENERATION_DIGITS = 18


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One generation of a name. All but labels and note stays as it was published.

    Attributes:
        digest: sha256 over the two files.
        generation: counts what was published under the name, from 1; a number is never given twice.
        created_at: ISO 8601, UTC; for people, never for ordering.
        num_bytes: size of the two files.
        details: what the check at upload found out.
        labels, note: whatever the operator wants to remember.
        source: where it came from: an upload, a folder, a job with its inputs.
    """

    name: str
    digest: str
    generation: int
    created_at: str
    num_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def created_unix(self) -> int:
        return int(datetime.fromisoformat(self.created_at).timestamp())


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """How an upload is published.

    Attributes:
        expected_generation: refuse unless this one is current; 0 for "there is no such adapter".
        promote: make it the current generation; without, it is there as `name@generation`.
        labels, note: replace those of the generation, if given.
        source: where it comes from.
        quota: what may be kept for whom it is published, this included.
    """

    expected_generation: int | None = None
    promote: bool = True
    labels: Mapping[str, str] | None = None
    note: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    quota: StorageQuota = NO_QUOTA


AT_ONCE = Publication()


@dataclass(frozen=True, slots=True)
class History:
    """Everything that is known under one name.

    Attributes:
        current: the generation that the bare name means; 0 once the name is deleted.
        num_published: the highest generation ever given; counting goes on after a delete.
        generations: those that are kept, oldest first.
        is_pinned: the current generation, whichever it is, stays in a slot.
    """

    name: str
    current: int = 0
    num_published: int = 0
    generations: tuple[AdapterRecord, ...] = ()
    is_pinned: bool = False

    def get(self, generation: int) -> AdapterRecord | None:
        return next((record for record in self.generations if record.generation == generation), None)

    @property
    def current_record(self) -> AdapterRecord | None:
        return self.get(self.current)

    @property
    def digests(self) -> set[str]:
        return {record.digest for record in self.generations}

    def with_record(self, record: AdapterRecord) -> "History":
        """The same with a generation added, or replaced by one that has other labels."""
        others = [old for old in self.generations if old.generation != record.generation]
        ordered = tuple(sorted([*others, record], key=lambda one: one.generation))
        return replace(self, generations=ordered, num_published=max(self.num_published, record.generation))

    def pruned(self, num_kept: int) -> "History":
        """The same with the newest generations only; the current one always stays."""
        droppable = [record for record in self.generations if record.generation != self.current]
        num_dropped = max(len(self.generations) - num_kept, 0)
        dropped = {record.generation for record in droppable[:num_dropped]}
        kept = tuple(record for record in self.generations if record.generation not in dropped)
        return replace(self, generations=kept)


def check_name(name: str) -> None:
    """Raises InvalidRequestError unless `name` can be an adapter's name."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            "an adapter's name has 1 to 128 letters, digits, dots, dashes and underscores, and begins with a letter "
            "or digit",
            code="adapter_name_invalid",
            param="name",
        )


def check_labels(labels: Mapping[str, str], note: str) -> None:
    """Raises InvalidRequestError unless these can be kept with a generation."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequestError(f"a generation has {MAX_LABELS} labels at most", code="label_invalid", param="labels")
    for key, value in labels.items():
        is_text = isinstance(value, str) and len(value) <= MAX_LABEL_CHARACTERS and _is_encodable(value)
        if not LABEL_PATTERN.fullmatch(key) or not is_text:
            raise InvalidRequestError(
                "a label's key has 1 to 63 letters, digits, dots, dashes, slashes and underscores, its value "
                f"{MAX_LABEL_CHARACTERS} characters at most",
                code="label_invalid",
                param="labels",
            )
    if len(note) > MAX_NOTE_CHARACTERS or not _is_encodable(note):
        raise InvalidRequestError(
            f"a note has {MAX_NOTE_CHARACTERS} characters at most", code="label_invalid", param="note"
        )


def owner_of(name: str) -> str:
    """The tenant whose adapter this is; "" for the public ones."""
    return name.partition(TENANT_MARK)[0] if TENANT_MARK in name else ""


def within_quota(quota: StorageQuota, kept: Iterable[History], old: History, new: History) -> History:
    """`new`, if all that is kept for its owner stays within the quota when it replaces `old`.

    Raises:
        QuotaExceededError: it would not.
    """
    if not quota.is_none:
        others = [one for one in kept if one.name != new.name and owner_of(one.name) == owner_of(new.name)]
        before, after = (
            StoredUsage.of((g.name, g.digest, g.num_bytes) for one in [*others, changed] for g in one.generations)
            for changed in (old, new)
        )
        quota.check(before, after)
    return new


def split_reference(reference: str) -> tuple[str, int | None]:
    """`name` or `name@generation` as a pair; what is no generation is left in the name, which then does not exist."""
    name, at, generation = reference.rpartition("@")
    if at and generation.isascii() and generation.isdecimal() and len(generation) <= MAX_GENERATION_DIGITS:
        return name, int(generation)
    return reference, None


def encode_history(history: History) -> bytes:
    """The contents of a history's file."""
    values = {"format": FORMAT} | asdict(history)
    for generation in values["generations"]:
        del generation["name"]
    values = json.loads(json.dumps(values))
    return json.dumps(values | {"checksum": _checksum(values)}, sort_keys=True).encode()


def decode_history(data: bytes) -> History:
    """Read a history's file.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        values = json.loads(data)
        is_sound = isinstance(values, dict) and values.pop("checksum", None) == _checksum(values)
    except (ValueError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ValueError("the record is damaged")
    if values.get("format") != FORMAT:
        raise ValueError("the record has another format")
    try:
        history = _history(values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("a field of the record is missing or malformed") from error
    _check_types(history)
    return history


def _history(values: Mapping[str, Any]) -> History:
    name = values["name"]
    known = {of.name for of in fields(AdapterRecord)}
    records = tuple(
        AdapterRecord(**{key: value for key, value in one.items() if key in known} | {"name": name})
        for one in values["generations"]
    )
    return History(name, values["current"], values["num_published"], records, values["is_pinned"])


def _check_types(history: History) -> None:
    numbers = [record.generation for record in history.generations]
    if (
        not isinstance(history.name, str)
        or not NAME_PATTERN.fullmatch(history.name)
        or not all(type(number) is int for number in (history.current, history.num_published, *numbers))
        or type(history.is_pinned) is not bool
        or numbers != sorted(set(numbers))
        or not all(1 <= number <= history.num_published for number in numbers)
        or (history.current != 0 and history.current not in numbers)
    ):
        raise ValueError("a field of the record is malformed")
    for record in history.generations:
        texts = (record.digest, record.created_at, record.note)
        maps = (record.details, record.labels, record.source)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(isinstance(one, dict) for one in maps)
            or type(record.num_bytes) is not int
            or not DIGEST_PATTERN.fullmatch(record.digest)
        ):
            raise ValueError("a field of a generation is malformed")
        datetime.fromisoformat(record.created_at)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
