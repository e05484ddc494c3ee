"""Reading an adapter out of an uploaded zip or tar, which is a stranger's file.

Members are never extracted by name. Every member's name is checked, the two wanted files are copied into bounded
files of our own, everything else is read over.
"""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from server.adapters.archive_source import ArchiveLimits, Budget, Gunzip, Member, Metered, library_errors, unsafe
from server.adapters.archive_tar import tar_members
from server.adapters.archive_zip import zip_members
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, INITIAL_NAME, PICKLE_REFUSAL, WEIGHTS_NAME, remove
from server.durable import copy_stream, storage_errors
from server.errors import InvalidAdapterError, TooLargeError

__all__ = ["ArchiveLimits", "read_adapter_archive"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NAME_CHARS = 1024
MAX_FOLDERS = 2
ZIP_MAGIC = b"PK"
GZIP_MAGIC = b"\x1f\x8b"
DRIVE = re.compile(r"[A-Za-z]:")


def read_adapter_archive(file: BinaryIO, target: Path, limits: ArchiveLimits) -> None:
    """Copy the two adapter files of an archive into `target`, an empty folder, which stays empty if they are refused.

    The files stand at the top of the archive or in one folder; what else the folder holds is skipped, but for a folder
    `initial/` beside them with the two files of the adapter before its training.

    Raises:
        InvalidAdapterError: codes `archive_invalid` (broken, or no archive), `archive_unsafe` (names or kinds of
            members that an adapter never has), `adapter_pickle`, `adapter_files_missing`.
        TooLargeError: more bytes or members than `limits` allow.
        StorageFullError, UnavailableError: the files cannot be written.
    """
    try:
        with storage_errors():
            _read(file, target, limits)
    except BaseException:
        for path in target.iterdir():
            remove(path)
        raise


def _read(file: BinaryIO, target: Path, limits: ArchiveLimits) -> None:
    max_bytes = {CONFIG_NAME: limits.max_config_bytes, WEIGHTS_NAME: limits.max_weights_bytes}
    folders: dict[PurePosixPath, Path] = {}  # of the archive, and where each of them is copied to
    has_pickle = False
    for member in _members(file, limits):
        path = _checked_path(member.name)
        wanted = _meant(path.name)
        if wanted is None:
            has_pickle = has_pickle or path.suffix.lower() in PICKLE_SUFFIXES
            continue
        folder = folders.setdefault(path.parent, target / f"part{len(folders)}")
        folder.mkdir(exist_ok=True)
        if path.name != wanted or (folder / wanted).exists() or member.data is None:
            raise unsafe(f"{wanted} twice, or something that can be taken for it")
        if len(folders) > MAX_FOLDERS:
            raise unsafe("adapter files in several folders")
        copy_stream(member.data, folder / wanted, max_bytes[wanted])
    _arrange(folders, target, has_pickle=has_pickle)


def _arrange(folders: dict[PurePosixPath, Path], target: Path, *, has_pickle: bool) -> None:
    """Move the files from where they were copied to where they belong."""
    own = min(folders, key=lambda folder: len(folder.parts), default=PurePosixPath())
    others = set(folders) - {own, own / INITIAL_NAME}
    if others:
        raise unsafe("the adapter's two files in different folders")
    for folder, copied in sorted(folders.items()):
        _check_complete({path.name for path in copied.iterdir()}, has_pickle)
        place = target if folder == own else target / INITIAL_NAME
        place.mkdir(exist_ok=True)
        for name in FILE_NAMES:
            (copied / name).rename(place / name)
        copied.rmdir()
    if not folders:
        _check_complete(set(), has_pickle)


def _members(file: BinaryIO, limits: ArchiveLimits) -> Iterator[Member]:
    """Walk through an archive of the kind that its first bytes tell."""
    budget = Budget(limits, file.seek(0, 2))
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start.startswith(ZIP_MAGIC):
        members = zip_members(file, budget)
    else:
        source = Gunzip(file) if start.startswith(GZIP_MAGIC) else file
        members = tar_members(Metered(source, budget), limits.max_members)
    with library_errors():
        for count, member in enumerate(members, 1):
            if count > limits.max_members:
                raise TooLargeError(f"the archive may hold {limits.max_members} members at most")
            yield member


def _checked_path(name: str) -> PurePosixPath:
    """The member's path, if it is one that stays where it is put, on any system."""
    path = PurePosixPath(name)
    if (
        len(name) > MAX_NAME_CHARS
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or DRIVE.match(name)
        or any(unicodedata.category(character) == "Cc" for character in name)
    ):
        raise unsafe("a member with an unsafe name")
    return path


def _meant(name: str) -> str | None:
    """The wanted file that some system would take this name for: by case, Unicode form, or what it does not show."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    folded = visible.casefold().rstrip(" .")
    return folded if folded in FILE_NAMES else None


def _check_complete(names: set[str], has_pickle: bool) -> None:
    missing = [name for name in FILE_NAMES if name not in names]
    if WEIGHTS_NAME in missing and has_pickle:
        raise InvalidAdapterError(PICKLE_REFUSAL, code="adapter_pickle")
    if missing:
        raise InvalidAdapterError(f"the archive holds no {missing[0]}", code="adapter_files_missing")
