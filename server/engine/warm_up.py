"""Every variant of the kernels that serving may launch, launched once before anything is served.

Triton compiles a variant at its first launch, which takes up to seconds, in which all streams would wait; later starts
find it in Triton's cache. The launches are for tokens and adapters of nobody's: they read and write nothing.
"""

from collections.abc import Hashable, Mapping

import torch

from lora_core import LoraLinear
from lora_core.ops.kernels import KernelGroup
from lora_core.ops.plan import RANKS, SMALL_TILE, PlannedRoute, RoutePlan
from lora_core.routing import Route, Run
from lora_core.shared import SharedLinears
from server.engine.attention import AttentionPlan
from server.engine.device_step import DeviceStep

__all__ = ["warm_up"]

# For each of which products have a kernel of their own (`lora_core.ops.few_rows`).
FEW_TOKENS = (1, 16, 32)


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
    _run_steps_of_nobody(step, max_running)


def _run_steps_of_nobody(step: DeviceStep, max_running: int) -> None:
    """For every way to split the keys of those that decode, with a prompt's tile; with adapters; and of few tokens."""
    seen: set[int] = set()
    for num_decoding in range(1, max_running + 1):
        num_splits = AttentionPlan(num_decoding, 1, 1, step.num_kv_heads, step.device).num_splits
        if num_splits not in seen:
            seen.add(num_splits)
            _run(step, num_decoding, 1, Route([Run({}, num_decoding + 1)]))
    plan = RoutePlan(1, 1, SMALL_TILE, step.device, 2)
    plan.fill([])
    _run(step, 1, 1, PlannedRoute(2, plan, RANKS[0]))
    for num_tokens in FEW_TOKENS:
        _run(step, num_tokens, 0, Route([Run({}, num_tokens)]))


def _run(step: DeviceStep, num_decoding: int, num_prompt_tiles: int, route: Route) -> None:
    """A step of so many tokens; one a tile, of nobody."""
    num_tokens = num_decoding + num_prompt_tiles
    plan = AttentionPlan(num_decoding, num_prompt_tiles, 1, step.num_kv_heads, step.device)
    plan.fill([], step.cache.block_size)
    inputs = torch.zeros(3, num_tokens, dtype=torch.int64, device=step.device)
    inputs[2] = -1
    last_rows = torch.zeros(1, dtype=torch.int64, device=step.device)
    step.compute(inputs, plan, route, Route([Run({}, 1)]), last_rows)
