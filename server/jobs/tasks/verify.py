"""Checking stored adapters again: digests, files, values, and how they fit the base."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_core import LoraError, LoraModel
from lora_core.checkpoint import read_adapter
from server.adapters.objects import digest_of
from server.jobs.tasks.base_model import open_base

__all__ = ["run"]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Verify the adapters of `task["inputs"]` in the folders of `task["adapters"]`; damage is told, not raised."""
    report("reading the base", 0.0)
    model = LoraModel(open_base(Path(task["base"])))
    found = []
    for i, (wanted, folder) in enumerate(zip(task["inputs"], task["adapters"], strict=True)):
        report("verifying", i / len(task["inputs"]))
        found.append(dict(wanted) | {"problem": _problem(model, Path(folder), wanted["digest"])})
    damaged = [one for one in found if one["problem"] is not None]
    return {"num_verified": len(found), "num_damaged": len(damaged), "adapters": found}


def _problem(model: LoraModel, folder: Path, digest: str) -> str | None:
    try:
        if digest_of(folder) != digest:
            return "the files are not those that were published"
        _, tensors = read_adapter(folder)
        bad = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if bad is not None:
            return f"tensor {bad!r} holds NaN or infinite values"
        model.load_adapter(folder, "one")
        model.delete_adapter("one")
    except OSError as error:
        return f"the files cannot be read: {error.strerror}"
    except LoraError as error:
        return str(error)
    return None
