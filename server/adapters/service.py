"""AdapterService: what can be done with adapters by name."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from server.adapters.archive import ArchiveLimits, read_adapter_archive
from server.adapters.loader import AdapterLoader
from server.adapters.registry import AdapterRegistry, Lease
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord, AdapterStore, check_name
from server.durable import copy_stream
from server.errors import InvalidAdapterError, InvalidRequestError, OverloadedError

__all__ = ["AdapterService"]

# Uploads that are checked at once; each holds its adapter in memory a few times over.
MAX_UPLOADS = 2


class AdapterService:
    """Adapters by name: upload, list, delete, and leases for requests. All methods may be called from any thread.

    Args:
        base_names: names that mean the base model and cannot be given to an adapter.
    """

    def __init__(
        self,
        store: AdapterStore,
        registry: AdapterRegistry,
        loader: AdapterLoader,
        *,
        base_names: frozenset[str],
        limits: ArchiveLimits,
    ) -> None:
        self._store = store
        self._registry = registry
        self._loader = loader
        self._base_names = base_names
        self._limits = limits
        self._uploads = threading.Semaphore(MAX_UPLOADS)
        self.started_at = int(time.time())

    def open_lease(self, weights: Mapping[str, float]) -> Lease | None:
        """Claim adapters by name for a request; None if only the base model is wanted.

        Raises:
            NotFoundError: one does not exist.
            InvalidRequestError: more adapters than there are slots.
        """
        by_digest: dict[str, float] = {}
        for name, weight in weights.items():
            digest = self._store.get(name).digest
            by_digest[digest] = by_digest.get(digest, 0.0) + weight
        by_digest = {digest: weight for digest, weight in by_digest.items() if weight}
        return self._registry.open_lease(by_digest) if by_digest else None

    def records(self) -> list[AdapterRecord]:
        """All adapters, by name."""
        return self._store.records()

    def get(self, name: str) -> AdapterRecord:
        """One adapter; NotFoundError if there is none."""
        return self._store.get(name)

    def names_by_digest(self) -> dict[str, str]:
        return {record.digest: record.name for record in self._store.records()}

    def residency(self, record: AdapterRecord) -> str:
        """Where an adapter is: "slot", "host" or "store"."""
        stats = self._registry.stats()
        if record.digest in stats.slots:
            return "slot"
        return "host" if record.digest in stats.host else "store"

    def upload_files(self, name: str, config: BinaryIO, weights: BinaryIO) -> AdapterRecord:
        """Check and publish an adapter from its two files; durable when this returns.

        Raises:
            InvalidAdapterError, InvalidRequestError, TooLargeError: it is refused.
            StorageFullError, UnavailableError: it cannot be kept.
        """
        self._check_name(name)
        with self._store.staging_folder() as folder:
            copy_stream(config, folder / CONFIG_NAME, self._limits.max_config_bytes)
            copy_stream(weights, folder / WEIGHTS_NAME, self._limits.max_weights_bytes)
            return self._publish(name, folder)

    def upload_archive(self, name: str, archive: BinaryIO) -> AdapterRecord:
        """The same from a zip, tar or tar.gz of the adapter's folder."""
        self._check_name(name)
        with self._store.staging_folder() as folder:
            read_adapter_archive(archive, folder, self._limits)
            return self._publish(name, folder)

    def import_folder(self, name: str, source: Path) -> AdapterRecord:
        """The same from a folder of this machine, named by whoever starts the server."""
        if not (source / CONFIG_NAME).is_file() or not (source / WEIGHTS_NAME).is_file():
            raise InvalidAdapterError(
                f"{source} does not hold {CONFIG_NAME} and {WEIGHTS_NAME}", code="adapter_files_missing"
            )
        with (source / CONFIG_NAME).open("rb") as config, (source / WEIGHTS_NAME).open("rb") as weights:
            return self.upload_files(name, config, weights)

    def delete(self, name: str) -> AdapterRecord:
        """Hide an adapter at once; its bytes go when the last request that uses them has ended."""
        record = self._store.delete(name)
        if record.digest not in self.names_by_digest():
            self._registry.forget(record.digest)
        return record

    def _check_name(self, name: str) -> None:
        check_name(name)
        if name in self._base_names:
            raise InvalidRequestError(f"{name!r} names the base model", code="adapter_name_invalid", param="name")

    def _publish(self, name: str, folder: Path) -> AdapterRecord:
        if not self._uploads.acquire(blocking=False):
            raise OverloadedError("other uploads are being checked", code="uploads_busy")
        try:
            details = self._loader.check((folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes())
        finally:
            self._uploads.release()
        return self._store.publish(name, folder, details)
