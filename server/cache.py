"""Folders that can be made again, each made once by whichever process comes first.

<cache>/<kind>/<name>            finished
<cache>/<kind>/<name>.partial    being made, or what a crash left of it
<cache>/<kind>/lock              held while one is made; a crash releases it
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["default_cache_dir", "made_once"]


def default_cache_dir() -> Path:
    """Where what can be made again is kept: `$LORAMUX_CACHE`, `$XDG_CACHE_HOME/loramux` or `~/.cache/loramux`."""
    own, shared = os.environ.get("LORAMUX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "loramux"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder; if it is not there, `make` fills an empty one, which gets the name when it is complete.

    Any number of processes may call it at once: one makes it, the others wait. A failure leaves nothing.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # unless another process made it while this one waited
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return folder
