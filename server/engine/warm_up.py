"""Every variant of the kernels that serving may launch, launched once before anything is served.

Triton compiles a variant at its first launch, which takes up to seconds, in which all streams would wait; later starts
find it in Triton's cache. The launches are for tokens and adapters of nobody's: they read and write nothing.
"""

from collections.abc import Hashable, Mapping

import torch

from lora_core import LoraLinear
from lora_core.ops.kernels import KernelGroup
from lora_core.routing import Route, Run
from lora_core.shared import SharedLinears
from server.engine.attention import AttentionPlan
from server.engine.device_step import DeviceStep

__all__ = ["warm_up"]


def warm_up(layers: Mapping[str, LoraLinear], step: DeviceStep, max_running: int) -> None:
    """Launch what a model's steps may launch, for adapters of any rank and batches of any size.

    Args:
        layers: the model's, with slots on the device.
        max_running: sequences that decode at once.
    """
    seen: set[Hashable] = set()
    for layer in layers.values():
        shared = layer.shared
        kernels, bias = (
            (shared.adapters, shared.bias)
            if isinstance(shared, SharedLinears)
            else (getattr(layer.slots, "kernels", None), layer.bias)
        )
        assert isinstance(kernels, KernelGroup)
        kind = (kernels.shape, bias is None)
        if kind not in seen:
            seen.add(kind)
            kernels.warm_up(bias)
    _attend_to_nothing(step, max_running)


def _attend_to_nothing(step: DeviceStep, max_running: int) -> None:
    """Steps of nobody's tokens: for every way to split the keys of those that decode, and with a prompt's tile."""
    cache, device = step.cache, step.cache.device
    seen: set[int] = set()
    for num_decoding in range(1, max_running + 1):
        plan = AttentionPlan(num_decoding, 1, 1, cache.shape(0).num_kv_heads, device)
        if plan.num_splits in seen:
            continue
        seen.add(plan.num_splits)
        plan.fill([], cache.block_size)
        inputs = torch.zeros(3, num_decoding + 1, dtype=torch.int64, device=device)
        inputs[2] = -1
        base = Route([Run({}, num_decoding + 1)])
        step.compute(inputs, plan, base, Route([Run({}, 1)]), torch.zeros(1, dtype=torch.int64, device=device))
