"""Bringing an adapter in from a folder of the server, the Hugging Face hub or an object store, converted if need be."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lora_core.checkpoint import read_adapter
from lora_core.convert import convert_to_lora
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, INITIAL_NAME, WEIGHTS_NAME
from server.errors import InvalidAdapterError, NotFoundError, UnavailableError
from server.jobs.tasks.convert import described
from server.jobs.tasks.s3 import PICKLE_NAME, fetch_from_s3

__all__ = ["run"]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Copy the two files of `task["path"]`, of `repo` at `revision`, or below `url`, to `task["out"]`.

    An adapter of a changed base becomes a plain one: from `task["initial"]`, the adapter before its training, which may
    also lie in the folder's own `initial/`, or by computing its starting values again.

    Raises:
        LoraError: it is malformed, or cannot be converted.
        ServerError: it is not there, or cannot be fetched.
    """
    out = Path(task["out"])
    report("fetching", 0.0)
    fetched, told = Path(task.get("path") or out.parent / "fetched"), {}
    if task.get("repo"):
        _from_hub(task, fetched)
    elif task.get("url"):
        told = {"etags": fetch_from_s3(task["url"], fetched, task["max_bytes"])}
    if not (fetched / WEIGHTS_NAME).is_file() and (fetched / PICKLE_NAME).exists():
        raise InvalidAdapterError(
            "pickle files can run code and are not read; save the adapter with `safe_serialization=True`",
            code="adapter_pickle",
        )
    if not all((fetched / name).is_file() for name in FILE_NAMES):
        raise InvalidAdapterError(f"there are no {CONFIG_NAME} and {WEIGHTS_NAME}", code="adapter_files_missing")
    report("checking", 0.7)
    config, _ = read_adapter(fetched)
    initial = task.get("initial") or _initial_beside(fetched)
    if config.changes_base or initial:
        report("converting", 0.8)
        return told | described(convert_to_lora(fetched, initial, out, base_folder=task["base"]))
    out.mkdir()
    for name in FILE_NAMES:
        shutil.copyfile(fetched / name, out / name)
    return told | {"converted_from": None}


def _initial_beside(folder: Path) -> str | None:
    initial = folder / INITIAL_NAME
    return str(initial) if all((initial / name).is_file() for name in FILE_NAMES) else None


def _from_hub(task: Mapping[str, Any], folder: Path) -> None:
    for name in FILE_NAMES:
        try:
            hf_hub_download(
                task["repo"], name, revision=task["revision"], local_dir=folder, endpoint=os.environ.get("HF_ENDPOINT")
            )
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403, 404):
                raise NotFoundError(
                    f"the hub has no {name} in this repository at this revision, or does not show it",
                    code="source_not_found",
                ) from error
            raise UnavailableError("the hub cannot be reached", code="source_unavailable") from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise UnavailableError("the hub cannot be reached", code="source_unavailable") from error
