"""A stack of decoder layers (`layers.py`) in few launches, on a device: what lies between products is fused.

    norm │ q,k,v │ rotate │ attend │ o │ add_norm │ gate,up │ gate │ down │ add_norm │ …

Of few tokens the adapters' part of a product is computed beside it and added by what reads the product next, so that
in a recorded step adapters cost little more than reading them (`lora_core.ops.triton.Delta`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.ops.kernels import KernelGroup
from server.engine.attention import TOLERANCE, AttentionPlan, DeviceAttention, Span
from server.engine.attention.interface import STEP_ARGUMENT
from server.engine.kv_cache import KVCache, LayerShape
from server.engine.layers import LayerParts, Places, Seen

__all__ = ["DeviceLayers", "DeviceStack"]

# Of the cache of a trial.
BLOCK_SIZE = 16


class DeviceStack(Places):
    """A `LayerStack` under `DeviceAttention`."""

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        from server.engine import layer_kernels  # noqa: PLC0415 - Triton is optional

        super().__init__(parts)
        self._kernels: Any = layer_kernels
        self._parts = parts

    def can_take(self, x: Tensor, step: object) -> bool:
        is_plain = x.shape[0] == 1 and x.dtype == self._parts[0].dtype and x.is_contiguous()
        return is_plain and isinstance(step, DeviceAttention) and not torch.is_grad_enabled()

    def run(self, first: int, stop: int, x: Tensor, step: DeviceAttention, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        kernels, hidden = self._kernels, x[0].clone()
        normed: Tensor = self._parts[first].norms[0](hidden)
        for index in range(first, stop):
            part = self._parts[index]
            joined, o, both, down = part.groups
            call, norm = part.attention.call, part.norms[1]
            cached = step.cache.heads(call.layer)
            heads = *joined.apart(normed), joined.bias
            query = kernels.rotate(*heads, part.attention.norms, embeddings, *cached, step.positions)
            attended = step.read(call, query)
            normed = kernels.add_norm(hidden, *o.apart(attended.flatten(1)), o.bias, norm.weight, norm.eps)
            inner = kernels.gate(*both.apart(normed), both.bias)
            following = self._parts[index + 1].norms[0] if index + 1 < stop else None
            weight, eps = (None, 0.0) if following is None else (following.weight, following.eps)
            normed = kernels.add_norm(hidden, *down.apart(inner), down.bias, weight, eps)
        return hidden[None]


class DeviceLayers:
    """Layers by kernels (`StackKind`).

    Args:
        shapes: what each layer's cache holds.
    """

    def __init__(self, shapes: Sequence[LayerShape]) -> None:
        self._shapes = shapes

    def can_hold(self, parts: LayerParts) -> bool:
        shape = self._shapes[parts.attention.call.layer]
        is_even = shape.key_dim == shape.value_dim == parts.attention.head_dim and not shape.key_dim % 2
        adapters = [group.adapters for group in parts.groups]
        return is_even and all(isinstance(own, KernelGroup) and own.dtype == parts.dtype for own in adapters)

    def make(self, parts: Sequence[LayerParts]) -> DeviceStack:
        return DeviceStack(parts)

    def is_equal(self, theirs: Callable[..., Any], ours: Callable[..., Any], call: Seen) -> bool:
        """Both add the same to random numbers, but for rounding."""
        generator = torch.Generator(device=call.x.device).manual_seed(0)
        x = torch.randn(call.x.shape, generator=generator, device=call.x.device).to(call.x.dtype)
        num_tokens, results = x.shape[1], []
        for forward in (theirs, ours):
            cache = KVCache(self._shapes, 2, BLOCK_SIZE, dtype=x.dtype, device=x.device)
            plan = AttentionPlan.of([Span([1], 0, num_tokens)], cache.shape(0).num_kv_heads, BLOCK_SIZE, x.device)
            positions = BLOCK_SIZE + torch.arange(num_tokens, device=x.device)
            step = DeviceAttention(cache, positions, plan)
            with torch.inference_mode():
                results.append(forward(x, **call.others | {STEP_ARGUMENT: step}))
        if not isinstance(results[0], Tensor) or results[0].dtype != results[1].dtype:
            return False
        error = float((results[0] - results[1]).float().norm())
        added = float((results[0] - x).float().norm())
        return error <= TOLERANCE.get(x.dtype, 1e-5) * added + torch.finfo(x.dtype).eps * float(x.float().norm())
