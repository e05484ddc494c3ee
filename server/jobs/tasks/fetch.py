"""Bringing an adapter in from a folder of the server, the Hugging Face hub or an object store, converted if need be."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lora_core import LoraConfig, LoraError
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, INITIAL_NAME
from server.errors import NotFoundError, UnavailableError
from server.jobs.tasks.adapter_files import taken
from server.jobs.tasks.convert import described, subtract_initial
from server.jobs.tasks.s3 import fetch_from_s3

__all__ = ["run"]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Copy the two files of `task["path"]`, of `repo` at `revision`, or below `url`, to `task["out"]`.

    An adapter of a changed base becomes a plain one: from `task["initial"]`, the adapter before its training, which may
    also lie in the folder's own `initial/`, or by computing its starting values again.

    Raises:
        ServerError: it is not there, cannot be fetched or converted. A malformed one is left to who publishes it.
    """
    out = Path(task["out"])
    report("fetching", 0.0)
    fetched, told = Path(task.get("path") or out.parent / "fetched"), {}
    if task.get("repo"):
        _from_hub(task, fetched)
    elif task.get("url"):
        told = {"etags": fetch_from_s3(task["url"], fetched, task["max_bytes"])}
    initial = Path(task["initial"]) if task.get("initial") else _initial_beside(fetched)
    with taken(fetched, initial):
        report("checking", 0.7)
        if _changes_base((fetched / CONFIG_NAME).read_bytes()) or initial:
            report("converting", 0.8)
            return told | described(subtract_initial(task, fetched, initial))
    out.mkdir()
    for name in FILE_NAMES:
        shutil.copyfile(fetched / name, out / name)
    return told | {"converted_from": None}


def _changes_base(config_json: bytes) -> bool:
    try:
        return LoraConfig.from_json(config_json).changes_base
    except LoraError:
        return False


def _initial_beside(folder: Path) -> Path | None:
    initial = folder / INITIAL_NAME
    return initial if all((initial / name).is_file() for name in FILE_NAMES) else None


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
