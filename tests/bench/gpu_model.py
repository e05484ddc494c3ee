"""Models of a given shape with random weights, made on the device, and what the device could do at best."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_core.quant import keep_layout, quiet_bitsandbytes

__all__ = ["SHAPES", "Roofline", "Shape", "build_model", "measure_roofline", "synchronize", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's sizes, and those of the measurement."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    num_rows: int = 32
    context: int = 512
    num_new: int = 48
    prefill: int = 1_024
    copy_bytes: int = 1 << 30
    gemm: int = 8_192

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=8_192,
            rope_theta=500_000.0,
            tie_word_embeddings=False,
        )

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * (self.hidden // self.num_heads) * dtype.itemsize * num_tokens


SHAPES = {
    "8b": Shape(
        hidden=4_096, intermediate=14_336, num_layers=32, num_heads=32, num_kv_heads=8, vocabulary=128_256
    ),
    "1b": Shape(hidden=2_048, intermediate=8_192, num_layers=16, num_heads=32, num_kv_heads=8, vocabulary=128_256),
    "tiny": Shape(
        hidden=64, intermediate=128, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary=256, num_rows=4, context=24,
        num_new=12, prefill=40, copy_bytes=1 << 20, gemm=256,
    ),
}  # fmt: skip


def build_model(shape: Shape, quantization: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights in `dtype`; with "nf4" the linear layers but the head are quantized one by one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()
    model.requires_grad_(False)
    if quantization == "nf4":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _nf4(layer, dtype))
        model.is_loaded_in_4bit = True  # as transformers marks it, for PEFT
    return model


def _nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    quiet_bitsandbytes()
    out: Any = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # It quantizes when it is sent to where it is, also on a GPU.
    weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=out)
    out.weight = weight.to(layer.weight.device)
    keep_layout(out)
    return out.eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that every decode step reads: all but the input embeddings."""
    from lora_core.quant import is_quantized

    total = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            total += layer.weight.numel() * layer.weight.element_size()
            if is_quantized(layer):
                total += layer.weight.quant_state.absmax.nbytes
    return total


@dataclass(frozen=True)
class Roofline:
    """What was measured on this device: bytes that a copy moves, and floating-point operations of a product."""

    bytes_per_s: float
    flops_per_s: float


def measure_roofline(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Roofline:
    source = torch.randn(shape.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    one, other = (torch.randn(shape.gemm, shape.gemm, device=device).to(dtype) for _ in range(2))
    copy_s = best_s(lambda: target.copy_(source), device)
    gemm_s = best_s(lambda: one @ other, device)
    return Roofline(2 * source.nbytes / copy_s, 2 * shape.gemm**3 / gemm_s)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(work: Callable[[], Any], device: torch.device, times: int = 8) -> float:
    out = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        out.append(time.perf_counter() - start)
    return min(out)
