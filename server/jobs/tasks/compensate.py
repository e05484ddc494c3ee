"""An adapter that gives back what quantizing the served base took: see `lora_core.compensation`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core import LoraConfig, TargetError
from lora_core.checkpoint import write_adapter
from lora_core.compensation import compensate, each_input
from lora_core.layer import linear_weight
from lora_core.quant import round_trip
from lora_core.targets import output_embedding_name, resolve_targets
from server.jobs.tasks.base_model import open_base, quantization_of
from server.jobs.tasks.text import packed_calibration

__all__ = ["run"]

READING = 0.02  # share of the work


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Write an adapter of `rank` for all linear layers that `task["quantization"]` holds in 4 or 8 bits.

    The unquantized base runs once over the prompts; each layer is done when the run comes to it, with the inputs that
    it gets, so that one layer's loss is in memory at a time.

    Raises:
        LoraError: nothing is quantized, or bitsandbytes is missing.
    """
    report("reading the base", 0.0)
    base, rank = Path(task["base"]), task["rank"]
    kind, double_quant, dtype = quantization_of(task)
    model = open_base(base)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    names = [target.name for target in resolve_targets(config, model) if target.name != output_embedding_name(model)]
    ids = packed_calibration(base, task.get("prompts"))
    tensors: dict[str, Tensor] = {}
    lost = left = 0.0

    def use(name: str, inputs: Tensor) -> None:
        nonlocal lost, left
        if f"{name}.lora_A.weight" in tensors:  # a layer that a model calls twice
            return
        weight = linear_weight(model.get_submodule(name))
        quantized = round_trip(weight.to(dtype), kind, double_quant=double_quant)
        part = compensate(weight, quantized, rank, inputs).map(lambda tensor: tensor.to(dtype))
        residual = weight.float() - quantized
        lost += (inputs.float() @ residual.T).square().sum().item()
        left += (inputs.float() @ (residual - part.lora_B.float() @ part.lora_A.float()).T).square().sum().item()
        tensors.update({f"{name}.lora_A.weight": part.lora_A, f"{name}.lora_B.weight": part.lora_B})
        report("compensating", READING + (1 - READING) * len(tensors) / 2 / len(names))

    with each_input(model, names, use):
        model(input_ids=ids, use_cache=False)
    missing = next((name for name in names if f"{name}.lora_A.weight" not in tensors), None)
    if missing is not None:
        raise TargetError(f"module {missing!r} is not used by the model with these prompts")
    write_adapter(config, tensors, task["out"])
    return {
        "quantization": kind,
        "num_modules": len(names),
        "num_calibration_tokens": ids.numel(),
        "relative_error_left": (left / lost) ** 0.5 if lost else 0.0,
    }
