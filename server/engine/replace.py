"""Small modules that most models have, in fewer operations: root mean square norms and gated MLPs.

As with attention (`attention/rotary.py`), the model's own module stays the definition: ours takes its place only where
both give the same on random input.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import LoraLinear
from lora_core.native.small import native_silu_gate
from lora_core.shared import SharedLinears
from server.engine.attention import TOLERANCE
from server.engine.norm import RmsNorm

__all__ = ["GatedMlp", "replace_mlps", "replace_norms"]

NUM_TRIAL_TOKENS = 5


class GatedMlp(nn.Module):
    """down(activation(gate(x)) · up(x)), gate and up as one product.

    Args:
        projections: of gate and up.
    """

    def __init__(
        self, projections: SharedLinears, down_proj: nn.Module, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = projections.members
        self.down_proj = down_proj
        self._projections = projections
        self._activation = activation
        self.is_silu = activation is F.silu

    def forward(self, hidden_states: Tensor) -> Tensor:
        both = self._projections.side_by_side((self.gate_proj, self.up_proj), hidden_states)
        inner = native_silu_gate(both) if self.is_silu else None
        if inner is None:
            gate, up = both.split(self._projections.sizes, -1)
            inner = self._activation(gate).mul_(up)
        out: Tensor = self.down_proj(inner)
        return out


def replace_norms(model: nn.Module) -> int:
    """Replace the norms that `RmsNorm` equals, in place; returns how many."""
    return _replace(model, _norm)


def replace_mlps(model: nn.Module, groups: list[SharedLinears]) -> int:
    """Replace the MLPs that `GatedMlp` equals, in place; returns how many.

    Args:
        groups: the layers that are computed together.
    """
    by_first = {id(group.members[0]): group for group in groups if len(group.members) == 2}
    return _replace(model, lambda module: _mlp(module, by_first))


def _norm(module: nn.Module) -> tuple[RmsNorm, int] | None:
    norm = RmsNorm.like(module)
    return None if norm is None else (norm, len(norm.weight))


def _mlp(module: nn.Module, by_first: Mapping[int, SharedLinears]) -> tuple[GatedMlp, int] | None:
    group = by_first.get(id(getattr(module, "gate_proj", None)))
    up, down = getattr(module, "up_proj", None), getattr(module, "down_proj", None)
    activation = getattr(module, "act_fn", None)
    if group is None or up is not group.members[1] or not isinstance(down, LoraLinear) or activation is None:
        return None
    is_silu = type(activation).__name__ in ("SiLU", "SiLUActivation")
    return GatedMlp(group, down, F.silu if is_silu else activation), group.members[0].in_features


def _replace(model: nn.Module, candidate: Callable[[nn.Module], tuple[nn.Module, int] | None]) -> int:
    """Put candidates, given with the size of their input, where they do what is there."""
    count = 0
    parameter = next(model.parameters())
    for name, module in list(model.named_modules()):
        found = candidate(module) if name else None
        if found is not None and _is_equal(module, found[0].eval(), torch.empty_like(parameter[:0]), found[1]):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, found[0])
            count += 1
    return count


def _is_equal(module: nn.Module, candidate: nn.Module, like: Tensor, size: int) -> bool:
    """Both make the same of random numbers [1, T, size]; a module that wants other arguments is of another kind."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    x = torch.randn(1, NUM_TRIAL_TOKENS, size, generator=generator, device=like.device).to(like.dtype)
    try:
        with torch.inference_mode():
            theirs, ours = module(x), candidate(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    error = float((theirs - ours).float().norm())
    return error <= TOLERANCE.get(like.dtype, 1e-5) * float(theirs.float().norm())
