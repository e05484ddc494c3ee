"""Turning adapters into plain LoRA: rsLoRA exactly, DoRA by SVD, and adapters of changed bases."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_core.checkpoint import read_adapter, write_adapter
from lora_core.convert import Conversion, convert_to_lora, plain_lora
from lora_core.errors import ConfigError, UnsupportedError
from server.jobs.original import quantization_method
from server.jobs.tasks.adapter_files import taken
from server.jobs.tasks.base_model import base_tensors

__all__ = ["described", "run", "subtract_initial"]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Convert `task["adapter"]` into `task["out"]`; `initial` is the adapter before its training, if it is at hand.

    Raises:
        InvalidAdapterError: it cannot be converted; `details` have the report on its tensors.
    """
    report("converting", 0.1)
    initial = Path(task["initial"]) if task.get("initial") else None
    with taken(Path(task["adapter"]), initial):
        return _converted(task, initial)


def _converted(task: Mapping[str, Any], initial: Path | None) -> dict[str, Any]:
    config, tensors = read_adapter(task["adapter"])
    if config.changes_base or initial:
        return described(subtract_initial(task, task["adapter"], initial))
    if not config.use_dora and not config.use_rslora:
        raise ConfigError("the adapter is plain LoRA already")
    base = base_tensors(Path(task["base"])) if config.use_dora else None
    new_config, new_tensors, errors = plain_lora(config, tensors, base, task.get("rank"))
    write_adapter(new_config, new_tensors, task["out"])
    worst = max(errors, key=lambda name: errors[name])
    return {
        "converted_from": "dora" if config.use_dora else "rslora",
        "relative_error": {
            "mean": sum(errors.values()) / len(errors),
            "max": errors[worst],
            "worst_module": worst,
        },
    }


def subtract_initial(task: Mapping[str, Any], adapter: str | Path, initial: Path | None) -> Conversion:
    """Write to `task["out"]` an adapter less its starting values, which are given or computed again from the base.

    Raises:
        LoraError: as `convert_to_lora`; also if they would have to be computed from weights that are quantized, of
            which they are not the starting values any more.
    """
    original = Path(task.get("original") or task["base"])
    if initial is None and quantization_method(original) is not None:
        raise UnsupportedError(
            "the base's own files are quantized, so the starting values cannot be computed again from them: the "
            "adapter as it was before training is needed, or for PiSSA and OLoRA `original_path`, the unquantized "
            "model's folder, in a job",
            code="adapter_needs_conversion",
        )
    return convert_to_lora(adapter, initial, task["out"], base_folder=original)


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
