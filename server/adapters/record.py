"""AdapterRecord: what a name points to, and how that is written down.

A record's file is a JSON object with a checksum over its other fields. A damaged record is told from a sound one, as
the store may throw away bytes that no record points to. Fields that nobody here knows are read over.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from server.errors import InvalidRequestError

__all__ = ["NAME_PATTERN", "AdapterRecord", "check_name", "decode_record", "encode_record"]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}|")  # none of a deleted adapter
FORMAT = 1


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What a name points to.

    Attributes:
        digest: sha256 over the two files; "" once the name is deleted.
        generation: counts what was published under the name, from 1.
        created_at: ISO 8601, UTC; for people, never for ordering.
        num_bytes: size of the two files.
        details: what the check at upload found out.
    """

    name: str
    digest: str
    generation: int
    created_at: str
    num_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def created_unix(self) -> int:
        return int(datetime.fromisoformat(self.created_at).timestamp())


def check_name(name: str) -> None:
    """Raises InvalidRequestError unless `name` can be an adapter's name."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            "an adapter's name has 1 to 128 letters, digits, dots, dashes and underscores, and begins with a letter "
            "or digit",
            code="adapter_name_invalid",
            param="name",
        )


def encode_record(record: AdapterRecord) -> bytes:
    """The contents of a record's file."""
    values = {"format": FORMAT} | asdict(record)
    return json.dumps(values | {"checksum": _checksum(values)}, sort_keys=True).encode()


def decode_record(data: bytes) -> AdapterRecord:
    """Read a record's file.

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
    record = AdapterRecord(**{of.name: values.get(of.name) for of in fields(AdapterRecord)})
    _check_types(record)
    return record


def _check_types(record: AdapterRecord) -> None:
    texts = (record.name, record.digest, record.created_at)
    numbers = (record.generation, record.num_bytes)
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(type(number) is int for number in numbers)
        or not isinstance(record.details, dict)
        or not NAME_PATTERN.fullmatch(record.name)
        or not DIGEST_PATTERN.fullmatch(record.digest)
        or record.generation < 1
    ):
        raise ValueError("a field of the record is malformed")
    datetime.fromisoformat(record.created_at)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
