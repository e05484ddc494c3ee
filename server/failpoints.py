"""Failpoints: named places between two durable steps where a test can make the process kill itself.

`LORAMUX_FAILPOINT=name[:nth]` arms one: when it is passed for the nth time (the first by default), the process gets
SIGKILL there, as if the machine had been switched off. A failpoint that is not armed costs one comparison.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping

from server.errors import InvalidRequestError

__all__ = ["ENVIRONMENT_VARIABLE", "FAILPOINTS", "arm", "disarm", "failpoint", "parse_failpoint", "watch"]

ENVIRONMENT_VARIABLE = "LORAMUX_FAILPOINT"

# In the order in which an upload, its replacement and its end pass them.
FAILPOINTS: Mapping[str, str] = {
    "layout.written": "a new store's layout file is fsynced in staging, not yet in place",
    "layout.synced": "a new store's layout file is in place, its folders are not",
    "upload.staged": "an upload's files are complete in staging, none of them fsynced",
    "upload.files_synced": "both files are fsynced, their folder is not",
    "upload.folder_synced": "the staged folder is fsynced, not yet among the objects",
    "object.renamed": "the object is among the objects, their folder is not fsynced",
    "object.synced": "the object is durable, no name points to it",
    "record.written": "the name's new record is fsynced in staging, the name still has the old one",
    "record.renamed": "the name points to the new record, their folder is not fsynced",
    "record.synced": "the name points to it durably, the caller has not been told",
    "lease.dropped": "the last use of an object is over, its bytes are still there",
    "object.trashed": "an object that nobody uses is in staging, its bytes are still there",
    "object.removed": "the bytes of an object that nobody used are gone",
    "job.written": "a job's new state is fsynced, its file still has the old one",
    "job.renamed": "a job's file has the new state, its folder is not fsynced",
    "job.synced": "a job's new state is durable, nobody has been told",
    "job.staged": "a job's result is complete in staging, not published",
    "job.published": "a job's result is published, the job is not yet said to have succeeded",
    "export.synced": "a merged model is fsynced in staging, not yet among the exports",
    "export.renamed": "a merged model is among the exports, their folder is not fsynced",
}


# State of the whole process, as killing it is: the one exception to "no module-level mutable state".
_armed: dict[str, int] = {}
_passed: Counter[str] = Counter()
_watchers: list[Callable[[str], None]] = []


def failpoint(name: str) -> None:
    """Pass a failpoint: nothing happens unless it is armed or watched."""
    if not _armed and not _watchers:
        return
    assert name in FAILPOINTS, name
    _passed[name] += 1
    for watcher in _watchers:
        watcher(name)
    if _armed.get(name) == _passed[name]:
        os.kill(os.getpid(), signal.SIGKILL)


def parse_failpoint(text: str) -> tuple[str, int]:
    """`name[:nth]` as a pair.

    Raises:
        InvalidRequestError: there is no such failpoint, or nth is no positive number.
    """
    name, _, nth = text.partition(":")
    if name not in FAILPOINTS:
        raise InvalidRequestError(f"there is no failpoint {name!r}", code="failpoint_unknown")
    if nth and (not nth.isdecimal() or int(nth) < 1):
        raise InvalidRequestError(f"a failpoint is written name[:nth], not {text!r}", code="failpoint_unknown")
    return name, int(nth or 1)


def arm(text: str) -> None:
    """Make the process kill itself at a failpoint, given as `name[:nth]`; replaces what was armed."""
    name, nth = parse_failpoint(text)
    disarm()
    _armed[name] = nth


def disarm() -> None:
    """Back to nothing armed, nothing counted."""
    _armed.clear()
    _passed.clear()


def watch(watcher: Callable[[str], None]) -> Callable[[], None]:
    """Call `watcher` with the name of every failpoint passed from now on; returns what ends it."""
    _watchers.append(watcher)
    return lambda: _watchers.remove(watcher)
