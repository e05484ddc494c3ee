"""JobStore: jobs on disk, one file each, so that a crash loses none of them.

jobs/<id>.json      replaced atomically whenever the job's state changes
"""

import logging
import uuid
from contextlib import suppress
from pathlib import Path

from server.durable import rename, storage_errors, sync_folder, write_file
from server.failpoints import failpoint
from server.jobs.record import JobRecord, decode_job, encode_job

__all__ = ["JobStore"]

logger = logging.getLogger(__name__)

SUFFIX = ".json"


class JobStore:
    """A folder of jobs. Thread-safe as long as each job is written by one thread at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self) -> list[JobRecord]:
        """Create the folder if need be, clear what a crash left behind, and read all jobs, oldest first.

        Raises:
            StorageFullError, UnavailableError: the folder cannot be used.
        """
        with storage_errors():
            self._root.mkdir(parents=True, exist_ok=True)
            sync_folder(self._root.parent)
            sync_folder(self._root)
            found = []
            for path in self._root.iterdir():
                if path.suffix != SUFFIX:
                    path.unlink()
                    continue
                try:
                    found.append(decode_job(path.read_bytes()))
                except ValueError as error:
                    logger.error("job %s is left alone: %s", path.name, error)
        return sorted(found, key=lambda record: (record.created_at, record.job_id))

    def write(self, record: JobRecord) -> None:
        """Keep a job as it is now; on the disk when this returns.

        Raises:
            StorageFullError, UnavailableError: it cannot be written.
        """
        temporary = self._root / f"{record.job_id}.{uuid.uuid4().hex}"
        try:
            write_file(temporary, encode_job(record))
            failpoint("job.written")
            rename(temporary, self._root / (record.job_id + SUFFIX))
            failpoint("job.renamed")
            sync_folder(self._root)
            failpoint("job.synced")
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def remove(self, job_id: str) -> None:
        """Forget a job; it may come back after a crash."""
        with storage_errors():
            (self._root / (job_id + SUFFIX)).unlink(missing_ok=True)
