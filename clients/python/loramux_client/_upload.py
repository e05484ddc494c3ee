"""Files on their way up, with progress. They are opened anew for each attempt and never held in memory."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loramux_client._progress import Progress, ProgressBar

__all__ = ["Upload", "adapter_upload"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
