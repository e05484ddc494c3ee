"""Files on their way up, with progress. They are opened anew for each attempt and never held in memory."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

__all__ = ["Progress", "ProgressBar", "Upload", "adapter_upload"]

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, in bytes."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BAR_CHARACTERS = 30
REDRAW_S = 0.1


class _Counted:
    """A file whose reads are counted. It hides its descriptor, so that nothing reads past the count."""

    def __init__(self, file: IO[bytes], on_read: Callable[[int], None]) -> None:
        self._file = file
        self._on_read = on_read

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_read(len(data))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@dataclass(frozen=True, slots=True)
class Upload:
    """Form fields and files of a multipart body."""

    paths: tuple[Path, ...]
    fields: dict[str, str] = field(default_factory=dict)
    progress: Progress | None = None

    def open(self, stack: ExitStack) -> list[tuple[str, tuple[str, Any]]]:
        """The files as httpx takes them; closed by `stack`."""
        total = sum(path.stat().st_size for path in self.paths)
        done = 0

        def on_read(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if self.progress is not None:
                self.progress(done, total)

        files = [stack.enter_context(path.open("rb")) for path in self.paths]
        return [("files", (path.name, _Counted(file, on_read))) for path, file in zip(self.paths, files, strict=True)]


def adapter_upload(source: Path, fields: dict[str, str], progress: Progress | bool) -> Upload:
    """A PEFT folder's two files, or one archive of it.

    Raises:
        FileNotFoundError: the folder lacks one of them.
    """
    paths: tuple[Path, ...] = (source,)
    if source.is_dir():
        paths = tuple(source / name for name in ADAPTER_FILES)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            hint = ""
            if (source / "adapter_model.bin").is_file():
                hint = "; save it again with `safe_serialization=True`, pickled weights are not accepted"
            raise FileNotFoundError(f"{source} has no {' and no '.join(missing)}{hint}")
    elif not source.is_file():
        raise FileNotFoundError(f"{source} is no folder and no archive")
    return Upload(paths, fields, ProgressBar() if progress is True else progress or None)


class ProgressBar:
    """Draws on a terminal, by default on standard error; elsewhere it stays silent. A `Progress`."""

    def __init__(self, stream: TextIO | None = None, label: str = "upload") -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        self._drawn_s = -REDRAW_S

    def __call__(self, done: int, total: int) -> None:
        """Draw how far it is, at most ten times a second; the last time with a line end."""
        now = time.monotonic()
        is_last = done >= total
        if not self._stream.isatty() or (now - self._drawn_s < REDRAW_S and not is_last):
            return
        self._drawn_s = now
        share = min(done / total, 1.0) if total else 1.0
        filled = round(share * BAR_CHARACTERS)
        bar = "#" * filled + "." * (BAR_CHARACTERS - filled)
        size = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
        self._stream.write(f"\r{self._label} [{bar}] {share:4.0%} {size}" + "\n" * is_last)
        self._stream.flush()
