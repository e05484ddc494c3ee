"""LoftQ against the served base: an adapter's A and B set to the best of what quantizing each layer took."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core import LoraConfig, LoraModel
from lora_core.layer import is_linear, linear_weight
from lora_core.loftq_replace import replace_lora_weights_loftq
from lora_core.quant import quantized_linear
from lora_core.targets import output_embedding_name
from server.jobs.tasks.base_model import open_base, quantization_of
from server.jobs.tasks.text import encoded_prompts

__all__ = ["run"]

READING = 0.05  # share of the work
NAME = "adapter"


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Replace the factors of the adapter in `task["adapters"]`, or those of a new one of `rank` on `target_modules`.

    With `judge`, a module keeps its new factors only if the quantized model's next-token distributions on the prompts
    come nearer to the unquantized one's by them; else it gets its former ones back.

    Raises:
        LoraError: the adapter does not fit, none of its layers is quantized, or bitsandbytes is missing.
    """
    report("reading the base", 0.0)
    base = Path(task["base"])
    model = open_base(base)
    rows = encoded_prompts(base, task.get("prompts"))
    wanted = [_log_probabilities(model, row) for row in rows]
    _quantize(model, task)
    lora = LoraModel(model)
    if task["adapters"]:
        lora.load_adapter(task["adapters"][0], NAME)
    else:
        targets = task.get("target_modules")
        lora.add_adapter(
            NAME,
            LoraConfig(
                r=task["rank"],
                lora_alpha=task["rank"],
                target_modules="all-linear" if targets is None else tuple(targets),
                task_type="CAUSAL_LM",
            ),
        )
    lora.eval()
    lora.set_adapter(NAME, inference_mode=True)
    num_modules = len(lora.parts[NAME])
    before = best = _distance(lora, rows, wanted)
    num_done = num_rolled_back = 0

    def judge(_: Any, _name: str) -> bool:
        nonlocal best, num_done, num_rolled_back
        num_done += 1
        report("replacing", min(READING + (1 - READING) * num_done / num_modules, 1.0))
        if not task["judge"]:
            return True
        now = _distance(lora, rows, wanted)
        if now >= best:
            num_rolled_back += 1
            return False
        best = now
        return True

    replace_lora_weights_loftq(lora, base, NAME, judge)
    lora.save_pretrained(task["out"], NAME)
    return {
        "num_modules": num_done,
        "num_rolled_back": num_rolled_back,
        "kl_before": before,
        "kl_after": _distance(lora, rows, wanted),
        "num_prompt_tokens": sum(row.numel() for row in rows),
    }


def _quantize(model: Any, task: Mapping[str, Any]) -> None:
    """As the server does: all linear layers but the output embedding, each before the next is read."""
    kind, double_quant, dtype = quantization_of(task)
    head = output_embedding_name(model)
    for name, module in list(model.named_modules()):
        if is_linear(module) and name != head:
            parent, _, child = name.rpartition(".")
            weight = linear_weight(module).to(dtype)
            setattr(
                model.get_submodule(parent), child, quantized_linear(module, weight, kind, double_quant=double_quant)
            )


def _log_probabilities(model: Any, row: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=row, use_cache=False).logits[0].float(), dim=-1)


def _distance(model: Any, rows: list[Tensor], wanted: list[Tensor]) -> float:
    """Mean over tokens of KL(unquantized ‖ quantized)."""
    total = 0.0
    for row, reference in zip(rows, wanted, strict=True):
        total += (reference.exp() * (reference - _log_probabilities(model, row))).sum().item()
    return total / sum(row.numel() for row in rows)
