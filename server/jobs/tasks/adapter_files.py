"""An adapter's folder as jobs take it: complete, without pickles, and refused with the report on its tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_core import LoraError
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, PICKLE_NAME, PICKLE_REFUSAL, WEIGHTS_NAME
from server.adapters.report import folder_report
from server.errors import InvalidAdapterError

__all__ = ["taken"]


@contextmanager
def taken(folder: Path, initial: Path | None = None) -> Iterator[None]:
    """Check that the files are there; what goes wrong with them in the block is raised with their report.

    Args:
        initial: folder of the same adapter before its training.

    Raises:
        InvalidAdapterError: codes `adapter_pickle`, `adapter_files_missing`, a LoraError's; `details` have the report.
    """
    try:
        _check_files(folder, "")
        if initial is not None:
            _check_files(initial, " of the adapter before its training")
        yield
    except (LoraError, InvalidAdapterError) as error:
        details = {"report": folder_report(folder, str(error))}
        raise InvalidAdapterError(str(error), code=error.code, details=details) from error


def _check_files(folder: Path, whose: str) -> None:
    if not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).exists():
        raise InvalidAdapterError(PICKLE_REFUSAL, code="adapter_pickle")
    if not all((folder / name).is_file() for name in FILE_NAMES):
        raise InvalidAdapterError(f"there are no {CONFIG_NAME} and {WEIGHTS_NAME}{whose}", code="adapter_files_missing")
