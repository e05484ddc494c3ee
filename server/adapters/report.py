"""The import report: what became of each group of an adapter's tensors, as answers show it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_core.ledger import TensorGroup
from lora_core.refusal import refused_groups
from server.adapters.objects import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from server.errors import InvalidAdapterError

__all__ = ["Report", "file_report", "folder_report", "import_report", "refused_file"]

Report = list[dict[str, Any]]

# A file may hold ten thousand tensors, each wrong in its own way, and names of any length.
MAX_GROUPS = 100
MAX_NAME = 200


def import_report(groups: Iterable[TensorGroup]) -> Report:
    """One entry for each group, with an example of its names; beyond MAX_GROUPS, one for each kind and outcome."""
    shown: Report = []
    others: dict[tuple[str, str], dict[str, Any]] = {}
    for group in groups:
        entry = {
            "tensors": group.tensors,
            "num_tensors": len(group.names),
            "outcome": group.outcome,
            "reason": group.reason,
            "example": group.names[0][:MAX_NAME],
        }
        if len(shown) < MAX_GROUPS:
            shown.append(entry)
            continue
        first = others.setdefault((group.tensors, group.outcome), entry | {"num_tensors": 0})
        first["num_tensors"] += entry["num_tensors"]
    for entry in others.values():
        entry["reason"] = f"several reasons, the first: {entry['reason']}"
    return shown + list(others.values())


def folder_report(folder: Path, reason: str) -> Report:
    """That of a folder that was refused before its tensors could be looked at, or without regard to them."""
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights.is_file():
        return file_report(PICKLE_NAME if (folder / PICKLE_NAME).exists() else WEIGHTS_NAME, reason)
    config_json = config.read_bytes() if config.is_file() else b""
    return import_report(refused_groups(config_json, weights.read_bytes(), reason))


def file_report(name: str, reason: str) -> Report:
    """That of a file that holds no tensors, or none that are read."""
    return import_report([TensorGroup("file", "refused", reason, (name,))])


def refused_file(name: str, message: str, code: str) -> InvalidAdapterError:
    """The error for a file that is refused as a whole, or missing."""
    return InvalidAdapterError(message, code=code, details={"report": file_report(name, message)})
