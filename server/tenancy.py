"""CallerAdapters: the adapters as one caller sees them. The one place where a name becomes `tenant~name`.

A caller with a tenant sees its own adapters by their bare names, and the public ones, those without a tenant; its own
come first. What belongs to others does not exist for it: both are told by the same words, after the same look-ups. Only
callers with the scope `admin` see everything, by `tenant~name`. A key's own list confines it further.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, TypeVar

from server.adapters.lease import Lease, RegistryStats
from server.adapters.quota import StorageQuota
from server.adapters.record import (
    AT_ONCE,
    NAME_PATTERN,
    TENANT_MARK,
    AdapterRecord,
    Publication,
    owner_of,
    split_reference,
)
from server.adapters.service import AdapterService, AdapterView
from server.auth.caller import Caller
from server.errors import ForbiddenError, NotFoundError, ServerError

__all__ = ["CallerAdapters", "Note", "missing_adapter"]

T = TypeVar("T")

Note = Callable[[Mapping[str, object]], None]
"""Takes facts about a change, for the audit log."""
FREE_TEXTS = frozenset({"labels", "note"})  # whatever somebody wanted to remember: no names of adapters


class CallerAdapters:
    """AdapterService for one caller; every method has the same meaning, for the names that the caller may know."""

    def __init__(self, service: AdapterService, caller: Caller, note: Note) -> None:
        self._service = service
        self._caller = caller
        self._note = note
        self._own = f"{caller.tenant}{TENANT_MARK}" if caller.tenant else ""
        self.started_at = service.started_at

    def open_lease(self, weights: Mapping[str, float]) -> Lease | None:
        """Claim adapters for a request; None if only the base model is wanted."""
        shown = {self.stored_name(name): name for name in weights}
        stored: dict[str, float] = {}
        for name, weight in weights.items():
            found = self.stored_name(name)
            stored[found] = stored.get(found, 0.0) + weight
        with self._in_own_words():
            lease = self._service.open_lease(stored)
        if lease is not None:
            lease.generations = {shown[name]: generation for name, generation in lease.generations.items()}
        return lease

    def records(self) -> list[AdapterRecord]:
        """The current generation of every adapter that the caller may know, by name."""
        visible = self._visible({record.name: record for record in self._service.records()})
        return [self._renamed(visible[name]) for name in sorted(visible)]

    def get(self, name: str) -> AdapterRecord:
        """One adapter; NotFoundError if there is none."""
        with self._in_own_words():
            return self._renamed(self._service.get(self.stored_name(name)))

    def views(self) -> list[AdapterView]:
        """The same as `records`, as they are now."""
        visible = self._visible({view.record.name: view for view in self._service.views()})
        return [replace(visible[name], record=self._renamed(visible[name].record)) for name in sorted(visible)]

    def view(self, record: AdapterRecord) -> AdapterView:
        """A generation that the caller got from here, as it is now; it may have been deleted since."""
        try:
            stored = self.stored_name(record.name)
        except NotFoundError:
            stored = self._own + record.name
        view = self._service.view(replace(record, name=stored))
        return replace(view, record=record)

    def generations(self, name: str) -> list[AdapterView]:
        """All kept generations of a name, newest first."""
        with self._in_own_words():
            views = self._service.generations(self.stored_name(name))
        return [replace(view, record=self._renamed(view.record)) for view in views]

    def upload_files(
        self, name: str, files: Mapping[str, BinaryIO], publication: Publication = AT_ONCE
    ) -> AdapterRecord:
        """Check and publish an adapter from its files by their names; durable when this returns."""
        return self._write(
            "upload", name, lambda stored: self._service.upload_files(stored, files, self._limited(publication))
        )

    def upload_archive(self, name: str, archive: BinaryIO, publication: Publication = AT_ONCE) -> AdapterRecord:
        """The same from a zip, tar or tar.gz of the adapter's folder."""
        return self._write(
            "upload", name, lambda stored: self._service.upload_archive(stored, archive, self._limited(publication))
        )

    def delete(self, name: str, *, expected_generation: int | None = None) -> AdapterRecord:
        """Hide an adapter at once."""
        return self._write(
            "delete", name, lambda stored: self._service.delete(stored, expected_generation=expected_generation)
        )

    def delete_generation(self, name: str, generation: int) -> AdapterRecord:
        """Drop a generation that is not current."""
        return self._write(
            "delete_generation", name, lambda stored: self._service.delete_generation(stored, generation)
        )

    def promote(self, name: str, generation: int, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make a kept generation the current one."""
        return self._write(
            "promote",
            name,
            lambda stored: self._service.promote(stored, generation, expected_generation=expected_generation),
        )

    def rollback(self, name: str, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make the next older kept generation the current one."""
        return self._write(
            "rollback", name, lambda stored: self._service.rollback(stored, expected_generation=expected_generation)
        )

    def annotate(
        self, name: str, generation: int | None, labels: Mapping[str, str] | None, note: str | None
    ) -> AdapterRecord:
        """Replace a generation's labels and note, those that are given."""
        return self._write("annotate", name, lambda stored: self._service.annotate(stored, generation, labels, note))

    @property
    def max_slots(self) -> int:
        return self._service.max_slots

    def tiers(self) -> RegistryStats:
        """What is where, of all adapters."""
        return self._service.tiers()

    def warm(self, name: str) -> "Future[None]":
        """Bring an adapter into a slot, after what requests wait for."""
        return self._service.warm(self.stored_name(name))

    def evict(self, name: str) -> AdapterRecord:
        """Free an adapter's memory, once the requests that use it have ended."""
        return self._write("evict", name, self._service.evict)

    def pin(self, name: str) -> AdapterRecord:
        """Keep the name's current generation, whichever it is, in a slot."""
        return self._write("pin", name, self._service.pin)

    def unpin(self, name: str) -> AdapterRecord:
        """Let the name's generations come and go again."""
        return self._write("unpin", name, self._service.unpin)

    def stored_name(self, name: str) -> str:
        """The stored name, or `name@generation`, that the caller means by a name; NotFoundError if there is none."""
        if self._caller.sees_all:
            return name
        bare = name.rpartition("@")[0] or name
        if TENANT_MARK not in name and self._caller.may_use(bare):
            if self._own and self._exists(self._own + bare):
                return self._own + name
            if self._exists(bare):
                return name
        raise missing_adapter(name)

    def knows(self, name: str) -> bool:
        """The caller may use an adapter of this name."""
        try:
            self.stored_name(name)
        except NotFoundError:
            return False
        return not self._caller.sees_all or self._exists(name)

    def own_name(self, name: str) -> str:
        """The stored name of a new adapter of the caller's.

        Raises:
            ForbiddenError: its key does not let it have one of this name; says nothing about what exists.
        """
        if not self._may_own(name):
            raise ForbiddenError("this key may not have an adapter of this name", code="adapter_not_allowed")
        return self._own + name

    def owned_references(self) -> list[str]:
        """The stored `name@generation` of all that the caller owns and may know."""
        histories = [self._service.peek(record.name) for record in self._service.records()]
        mine = [one for one in histories if owner_of(one.name) == self._caller.tenant and self._sees(one.name)]
        return [f"{one.name}@{record.generation}" for one in mine for record in one.generations]

    def in_own_words(self, value: Any) -> Any:
        """A JSON value with the caller's adapters under its own names for them."""
        if isinstance(value, Mapping):
            return {key: value[key] if key in FREE_TEXTS else self.in_own_words(value[key]) for key in value}
        if isinstance(value, list | tuple):
            return [self.in_own_words(one) for one in value]
        return self._shown(value) if isinstance(value, str) else value

    def without_tenant(self, message: str) -> str:
        """A message that names the caller's adapters as it does."""
        return message.replace(self._own, "") if self._own else message

    @property
    def quota(self) -> StorageQuota:
        """What may be kept of the caller's adapters: of all of its tenant's, by whichever of its keys."""
        return StorageQuota(self._caller.limits.max_adapters, self._caller.limits.max_adapter_bytes)

    def _limited(self, publication: Publication) -> Publication:
        return replace(publication, quota=self.quota)

    def _may_own(self, name: str) -> bool:
        return self._caller.sees_all or (TENANT_MARK not in name and self._caller.may_use(name))

    def _exists(self, name: str) -> bool:
        try:
            self._service.get(name)
        except NotFoundError:
            return False
        return True

    def _write(self, action: str, name: str, change: Callable[[str], AdapterRecord]) -> AdapterRecord:
        """Change what the caller owns. The public adapters are owned by callers without a tenant."""
        if action != "upload" and not self._may_own(name):
            raise missing_adapter(name)
        stored = self.own_name(name)
        self._note({"action": action, "adapter": stored})
        with self._in_own_words():
            record = change(stored)
        self._note({"generation": record.generation, "digest": record.digest})
        return self._renamed(record)

    def _visible(self, by_stored_name: Mapping[str, T]) -> dict[str, T]:
        """What the caller may know, by its names; its own adapters hide public ones of the same name."""
        public_first = sorted(by_stored_name, key=lambda stored: bool(self._own) and stored.startswith(self._own))
        return {self._shown(stored): by_stored_name[stored] for stored in public_first if self._sees(stored)}

    def _sees(self, stored: str) -> bool:
        """The caller may know this stored name."""
        if self._caller.sees_all:
            return True
        tenant, mark, _ = stored.partition(TENANT_MARK)
        if mark and tenant != self._caller.tenant:
            return False
        return self._caller.may_use(self._shown(stored))

    def _shown(self, stored: str) -> str:
        return stored.removeprefix(self._own) if self._own else stored

    def _renamed(self, record: AdapterRecord) -> AdapterRecord:
        """A generation in the caller's words; of what it was made from, nothing that others have is told."""
        if self._caller.sees_all:
            return record
        source = self.in_own_words(record.source)
        if any(TENANT_MARK in name for name in _adapter_names(source)):
            source = {key: source[key] for key in ("kind", "job_id") if key in source}
        return replace(record, name=self._shown(record.name), source=source)

    @contextmanager
    def _in_own_words(self) -> Iterator[None]:
        """Errors name adapters as the caller does."""
        try:
            yield
        except ServerError as error:
            error.message = self.without_tenant(error.message)
            error.args = (error.message,)
            raise


def _adapter_names(value: Any) -> Iterator[str]:
    """Every text of a JSON value that is an adapter's name, or could be one."""
    if isinstance(value, Mapping):
        for key in value.keys() - FREE_TEXTS:
            yield from _adapter_names(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _adapter_names(one)
    elif isinstance(value, str) and NAME_PATTERN.fullmatch(split_reference(value)[0]):
        yield value


def missing_adapter(name: str) -> NotFoundError:
    """What is answered where there is no adapter, or none that the caller may know."""
    shown = name[:128].encode("ascii", "backslashreplace").decode()
    return NotFoundError(f"there is no adapter {shown!r}", code="adapter_not_found", param="adapter")
