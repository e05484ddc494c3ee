"""A LoRA out of a fully fine-tuned model."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_core import LoraConfig
from lora_core.extract import extract_adapter

__all__ = ["run"]

MAX_SHOWN = 20


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Extract what `task["tuned"]` changed in the base's `target_modules`, at `rank`, into `task["out"]`.

    Raises:
        LoraError: the folders do not fit each other, or nothing is targeted.
    """
    report("extracting", 0.1)
    rank = task["rank"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=tuple(task["target_modules"]), task_type="CAUSAL_LM")
    found = extract_adapter(task["base"], task["tuned"], task["out"], config)
    return {
        "relative_error": {
            "mean": sum(found.errors.values()) / len(found.errors),
            "max": max(found.errors.values()),
        },
        "num_left_out": len(found.left_out),
        "left_out": sorted(found.left_out)[:MAX_SHOWN],
    }
