"""The import report: what became of each group of an adapter's tensors, as answers show it."""

from collections.abc import Iterable
from typing import Any

from lora_core.ledger import TensorGroup
from lora_core.refusal import refused_groups

__all__ = ["Report", "import_report", "refusal_report"]

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


def refusal_report(config_json: bytes, weights: bytes, reason: str) -> Report:
    """That of two files that were refused before their tensors could be looked at."""
    return import_report(refused_groups(config_json, weights, reason))
