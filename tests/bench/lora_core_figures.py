"""Figures of lora_core on SmolLM2: what LoftQ gives back, and library calls beside PEFT's.

Run `python -m tests.bench.lora_core_figures`; it takes some minutes.
"""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_core import LoraConfig, LoraModel
from lora_core.loftq import fake_quantize, loftq
from lora_core.loftq_replace import replace_lora_weights_loftq
from lora_core.quant import dequantized_weight
from server.demo import ensure_demo_model
from tests.quantized import quantized_model

TEXT = (
    "The lighthouse keeper counted the ships that passed each night and wrote their names in a ledger. When the fog "
    "came in, he rang the bell by hand, once every minute, until the morning. In the village they said that he had "
    "never missed a single one, and that the sea itself kept time by him. A mathematician who visited in the summer "
    "asked to see the ledger, found a pattern in the numbers, and stayed for the rest of her life."
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def main() -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    folder = ensure_demo_model(report=print)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    print(f"SmolLM2-135M, {ids.shape[1]} tokens of text, LoftQ of rank {RANK} on {', '.join(TARGETS)}")
    nf4_figures(base, ids, folder)
    greedy_figures(base, ids, folder)
    two_bit_figures(base, ids)
    mixing_speed(base)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def report(name: str, base: Any, ids: Tensor, quantized: Tensor, adapted: Tensor, residuals: list[float]) -> None:
    """Residuals are ‖W - (Q + s·B·A)‖ / ‖W - Q‖, one per module."""
    wanted = logits(base, ids)
    errors = [(found - wanted).norm().item() / wanted.norm().item() for found in (quantized, adapted)]
    loss = [nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]).item() for x in (wanted, quantized, adapted)]
    print(
        f"{name}: residual {min(residuals):.3f} to {max(residuals):.3f} of the quantized base's on {len(residuals)} "
        f"modules; logit error {errors[0]:.4f} -> {errors[1]:.4f}; "
        f"loss {loss[0]:.4f} (full), {loss[1]:.4f} -> {loss[2]:.4f}"
    )


def nf4_figures(base: Any, ids: Tensor, folder: Any) -> None:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    model = LoraModel(quantized_model(base, "nf4"), config).eval()
    quantized = logits(model, ids)
    begin = time.perf_counter()
    replace_lora_weights_loftq(model, folder)
    print(f"replace_lora_weights_loftq: {time.perf_counter() - begin:.1f} s")
    residuals = []
    for name, layer in model.layers.items():
        lost = base.get_submodule(name).weight.detach() - dequantized_weight(layer.base_layer)
        residuals.append((lost - layer.delta_matrix("default").detach()).norm().item() / lost.norm().item())
    report("NF4", base, ids, quantized, logits(model, ids), residuals)


def greedy_figures(base: Any, ids: Tensor, folder: Any) -> None:
    """With a callback that keeps a module only where the logits come closer."""
    wanted = logits(base, ids)
    model = LoraModel(quantized_model(base, "nf4"), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])).eval()
    kept: list[str] = []
    begin_error = best = (logits(model, ids) - wanted).norm().item() / wanted.norm().item()

    def improves(_: Any, name: str) -> bool:
        nonlocal best
        error = (logits(model, ids) - wanted).norm().item() / wanted.norm().item()
        if error < best:
            best = error
            kept.append(name)
            return True
        return False

    replace_lora_weights_loftq(model, folder, callback=improves)
    print(
        f"NF4 with a callback on q_proj, v_proj: kept {len(kept)} modules; logit error {begin_error:.4f} -> {best:.4f}"
    )


def two_bit_figures(base: Any, ids: Tensor) -> None:
    quantized, adapted, residuals = copy.deepcopy(base), copy.deepcopy(base), []
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            weight = module.weight.detach()
            out = loftq(weight, 2, RANK, 2.0, 2)
            plain = fake_quantize(weight, 2)
            quantized.get_submodule(name).weight.data = plain
            adapted.get_submodule(name).weight.data = out.quantized + 2.0 * out.lora_B @ out.lora_A
            left = weight - out.quantized - 2.0 * out.lora_B @ out.lora_A
            residuals.append(left.norm().item() / (weight - plain).norm().item())
    report("2 bits, 2 iterations", base, ids, logits(quantized, ids), logits(adapted, ids), residuals)


def mixing_speed(base: Any) -> None:
    """`add_weighted_adapter` of two adapters of rank 16, as both libraries do it."""
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
    ours = LoraModel(copy.deepcopy(base), {name: LoraConfig(**config) for name in ("a", "b")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config), "a")
        theirs.add_adapter("b", peft.LoraConfig(**config))
        for model in (ours, theirs):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".lora_" in name:
                        parameter.copy_(torch.randn_like(parameter) * 0.02)
        for kind in ("cat", "linear", "ties", "svd", "ties_svd"):
            calls = (ours.add_weighted_adapter, theirs.base_model.add_weighted_adapter)
            times = [seconds(call, ["a", "b"], [0.7, 0.4], f"mix_{kind}", kind, density=0.5) for call in calls]
            print(f"add_weighted_adapter {kind}: {times[0]:.2f} s, PEFT {times[1]:.2f} s")


def seconds(call: Callable[..., Any], *args: Any, **options: Any) -> float:
    begin = time.perf_counter()
    call(*args, **options)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
