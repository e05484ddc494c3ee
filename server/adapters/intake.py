"""AdapterIntake: from what somebody sends to a folder that can be published: copied, made plain, checked.

Beside the two files there may be a folder `initial/` with two more: the same adapter as it was before its training.
Adapters that were trained on a changed base (PiSSA, OLoRA, …) are made plain ones of the served base with it, or by
computing it again.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from server.adapters.archive import ArchiveLimits, read_adapter_archive
from server.adapters.loader import AdapterLoader
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, INITIAL_NAME, WEIGHTS_NAME
from server.adapters.report import file_report, folder_report
from server.durable import copy_stream
from server.errors import InvalidAdapterError, OverloadedError, ServerError

__all__ = ["AdapterIntake", "Converter", "Fill"]

# Uploads that are checked at once; each holds its adapter in memory a few times over.
MAX_UPLOADS = 2
MAX_CONVERSIONS = 1  # at once; one may take minutes, and the uploads that need none do not wait for it
HOW_TO_CONVERT = (
    f". Send it with the adapter as it was before training, as {INITIAL_NAME}/{CONFIG_NAME} and "
    f"{INITIAL_NAME}/{WEIGHTS_NAME}, or convert it first: `lora_core.convert_to_lora(adapter, initial, out)`, or "
    "PEFT's `save_pretrained(folder, path_initial_model_for_weight_conversion=initial)`"
)

Fill = Callable[[Path], None]
"""Copies an adapter's files into an empty folder."""


class Converter(Protocol):
    """Makes an adapter of a changed base a plain one."""

    def __call__(self, adapter: Path, initial: Path | None, out: Path) -> Mapping[str, Any]:
        """Convert a folder into another; returns what came of it, `converted` in words.

        Raises:
            ServerError: it cannot be converted; code `adapter_needs_conversion` if `initial` would help.
        """


class AdapterIntake:
    """Takes adapters in. Thread-safe.

    Args:
        convert: what it takes runs outside of this process.
    """

    def __init__(self, loader: AdapterLoader, convert: Converter, limits: ArchiveLimits) -> None:
        self._loader = loader
        self._convert = convert
        self._limits = limits
        self._checks = threading.Semaphore(MAX_UPLOADS)
        self._conversions = threading.Semaphore(MAX_CONVERSIONS)

    def from_files(self, files: Mapping[str, BinaryIO]) -> Fill:
        """From streams by the files' names, those before training as `initial/…`."""

        def fill(folder: Path) -> None:
            for name, stream in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                copy_stream(stream, folder / name, self._max_bytes(name))

        return fill

    def from_archive(self, archive: BinaryIO) -> Fill:
        """From a zip, tar or tar.gz of the adapter's folder."""

        def fill(folder: Path) -> None:
            try:
                read_adapter_archive(archive, folder, self._limits)
            except InvalidAdapterError as error:
                error.details |= {"report": file_report("archive", error.message)}
                raise

        return fill

    def from_folder(self, source: Path) -> Fill:
        """From a folder of this machine, named by whoever runs the server.

        Raises:
            InvalidAdapterError: it does not hold the two files.
        """
        if not _has_files(source):
            message = f"{source} does not hold {CONFIG_NAME} and {WEIGHTS_NAME}"
            details = {"report": folder_report(source, message)}
            raise InvalidAdapterError(message, code="adapter_files_missing", details=details)
        folders = [Path(), *([Path(INITIAL_NAME)] if _has_files(source / INITIAL_NAME) else [])]

        def fill(folder: Path) -> None:
            for part in folders:
                (folder / part).mkdir(exist_ok=True)
                for name in FILE_NAMES:
                    with (source / part / name).open("rb") as file:
                        copy_stream(file, folder / part / name, self._max_bytes(name))

        return fill

    def check(
        self, folder: Path, *, max_folded_bytes: int, converted: str = "", waits: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        """Check a filled folder, and convert it first if need be.

        Args:
            max_folded_bytes: that it may take in memory.
            converted: how it was made plain before it came here.
            waits: for its turn; else it is refused if others are being checked.

        Returns:
            The folder with the two files to publish, in or below `folder`, and what the check found out.

        Raises:
            InvalidAdapterError: it is refused; its `details` have the report on its tensors.
            OverloadedError: others are being checked.
        """
        try:
            plain, details = self._checked(folder, converted, waits=waits)
            if details["folded_bytes"] > max_folded_bytes:
                raise InvalidAdapterError(
                    f"the adapter takes {details['folded_bytes']} bytes in memory, all slots together have "
                    f"{max_folded_bytes}",
                    code="adapter_too_large",
                )
        except ServerError as error:
            if error.kind == InvalidAdapterError.kind and "report" not in error.details:
                error.details |= {"report": folder_report(folder, error.message)}
            raise
        return plain, details

    def _checked(self, folder: Path, converted: str, *, waits: bool) -> tuple[Path, dict[str, Any]]:
        initial = folder / INITIAL_NAME if _has_files(folder / INITIAL_NAME) else None
        if initial is not None or self._loader.changes_base((folder / CONFIG_NAME).read_bytes()):
            with _turn(self._conversions, waits=waits):
                folder, converted = self._converted(folder, initial)
        with _turn(self._checks, waits=waits):
            config, weights = ((folder / name).read_bytes() for name in FILE_NAMES)
            return folder, self._loader.check(config, weights, converted=converted)

    def _converted(self, folder: Path, initial: Path | None) -> tuple[Path, str]:
        out = folder / "plain"
        try:
            return out, str(self._convert(folder, initial, out)["converted"])
        except ServerError as error:
            if error.code == "adapter_needs_conversion":
                raise InvalidAdapterError(error.message + HOW_TO_CONVERT, code=error.code) from error
            raise

    def _max_bytes(self, name: str) -> int:
        return self._limits.max_config_bytes if name.endswith(CONFIG_NAME) else self._limits.max_weights_bytes


def _has_files(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILE_NAMES)


@contextmanager
def _turn(turns: threading.Semaphore, *, waits: bool) -> Iterator[None]:
    if not turns.acquire(blocking=waits):
        raise OverloadedError("other uploads are being checked", code="uploads_busy")
    try:
        yield
    finally:
        turns.release()
