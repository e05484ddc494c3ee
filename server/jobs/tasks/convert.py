"""Turning adapters into plain LoRA: rsLoRA exactly, DoRA by SVD, and adapters of changed bases."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_core.checkpoint import read_adapter
from lora_core.convert import Conversion, convert_to_lora, simplify_adapter
from lora_core.errors import ConfigError

__all__ = ["described", "run"]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Convert `task["adapter"]` into `task["out"]`; `initial` is the adapter before its training, if it is at hand.

    Raises:
        LoraError: it cannot be converted.
    """
    report("converting", 0.1)
    config, _ = read_adapter(task["adapter"])
    if config.changes_base or task.get("initial"):
        found = convert_to_lora(task["adapter"], task.get("initial"), task["out"], base_folder=task["base"])
        return described(found)
    if not config.use_dora and not config.use_rslora:
        raise ConfigError("the adapter is plain LoRA already")
    errors = simplify_adapter(task["adapter"], task["out"], base_folder=task["base"], rank=task.get("rank"))
    worst = max(errors, key=lambda name: errors[name])
    return {
        "converted_from": "dora" if config.use_dora else "rslora",
        "relative_error": {
            "mean": sum(errors.values()) / len(errors),
            "max": errors[worst],
            "worst_module": worst,
        },
    }


def described(conversion: Conversion) -> dict[str, Any]:
    """A conversion as results and import reports tell of it."""
    origin = "computed again from the base" if conversion.is_computed else "those that came with it"
    converted = f"trained minus starting values ({conversion.init}: {origin})"
    if conversion.init.startswith("loftq"):
        converted += ", without the quantization error that these did not give back"
    return {
        "converted_from": conversion.init,
        "is_computed": conversion.is_computed,
        "similarity": conversion.similarity,
        "converted": converted,
    }
