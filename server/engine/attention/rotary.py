"""The attention block that most models share, with fewer operations: one projection, rotated in place, one write.

Hugging Face's own block stays the definition. `replace_attention` tries this one beside it, layer by layer on random
input, and takes its place only where both hand the same queries, keys and values to the same attention call and give
the same output. Whatever else a model does there (partial rotation, norms of other kinds) shows as a difference, and
its blocks stay as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import LoraLinear
from lora_core.shared import SharedLinears
from server.engine.attention.interface import STEP_ARGUMENT, AttentionCall, AttentionStep, Rotations
from server.engine.norm import RmsNorm

__all__ = ["TOLERANCE", "RotaryAttention", "replace_attention"]

# Relative error between two ways to compute the same.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class RotaryAttention(nn.Module):
    """q, k, v = rotate(norm(W_qkv·x)); out = W_o·attention(q, k, v).

    Args:
        call: what the block asks of attention.
        head_dim: features of a head, keys and values alike.
        norms: of each head of queries and of keys, as Qwen 3 has them; or none.
    """

    def __init__(
        self,
        projections: SharedLinears,
        o_proj: LoraLinear,
        call: AttentionCall,
        head_dim: int,
        norms: tuple[RmsNorm, RmsNorm] | None,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = projections.members
        self.o_proj = o_proj
        self._projections = projections
        self.call = call
        self.layer_idx = call.layer  # as the model's own blocks have it
        self.head_dim = head_dim
        self.num_kv_heads = projections.sizes[1] // head_dim
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.norms = norms

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, I] -> [1, T, I]."""
        step: AttentionStep = kwargs[STEP_ARGUMENT]
        joined = self._projections.side_by_side((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        heads = joined.view(hidden_states.shape[1], -1, self.head_dim)  # [T, H + 2·Hkv, D]
        if self.norms is not None:
            parts = heads.split([heads.shape[1] - 2 * self.num_kv_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
            normed = [norm(part.contiguous()) for norm, part in zip((self.q_norm, self.k_norm), parts, strict=False)]
            heads = torch.cat([*normed, parts[2]], dim=1)
        out = step.attend_joined(self.call, heads, self.num_kv_heads, position_embeddings)
        return self.o_proj(out.reshape(1, hidden_states.shape[1], -1)), None


@dataclass(slots=True)
class Recorder:
    """An `AttentionStep` that notes what it is given and answers with numbers that depend on it."""

    call: AttentionCall | None = None
    given: Tensor | None = None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.call = call
        self.given = torch.cat([query, key, value], dim=1) if key.shape[-1] == value.shape[-1] else None
        return query.clone()

    def attend_joined(
        self, call: AttentionCall, heads: Tensor, num_kv_heads: int, embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        Rotations().rotate(heads[:, :-num_kv_heads], embeddings)
        query, key, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        return self.attend(call, query, key, value)


def replace_attention(model: nn.Module, trial: Any, groups: list[SharedLinears]) -> int:
    """Replace the blocks that this one equals, in place; returns how many.

    Args:
        trial: runs the model once, with no route in use.
        groups: the layers that are computed together.
    """
    by_first = {id(group.members[0]): group for group in groups if len(group.members) == 3}
    blocks: dict[str, tuple[nn.Module, SharedLinears]] = {}
    for name, module in model.named_modules():
        group = by_first.get(id(getattr(module, "q_proj", None)))
        if group is not None and isinstance(getattr(module, "o_proj", None), LoraLinear):
            blocks[name] = (module, group)
    seen = _record_arguments({name: module for name, (module, _) in blocks.items()}, trial)
    count = 0
    for name, (module, group) in blocks.items():
        if name in seen and (block := _equal_block(module, group, *seen[name])) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, block)
            count += 1
    return count


def _record_arguments(modules: dict[str, nn.Module], trial: Any) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which a run of the model calls each module."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(name: str) -> Any:
        return lambda _, args, kwargs: seen.__setitem__(name, (args, kwargs))

    hooks = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        trial()
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _equal_block(
    module: nn.Module, group: SharedLinears, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RotaryAttention | None:
    """A RotaryAttention that does what `module` does with these arguments, or None."""
    embeddings, hidden = kwargs.get("position_embeddings"), kwargs.get("hidden_states")
    head_dim = getattr(module, "head_dim", None)
    if args or not isinstance(embeddings, tuple) or hidden is None or not isinstance(head_dim, int):
        return None
    q_size, k_size, v_size = group.sizes
    if k_size != v_size or q_size % k_size or k_size % head_dim or embeddings[0].shape[-1] != head_dim:
        return None
    norms = RmsNorm.like(getattr(module, "q_norm", None)), RmsNorm.like(getattr(module, "k_norm", None))
    own = (norms[0], norms[1]) if norms[0] is not None and norms[1] is not None else None
    if own is not None and not len(own[0].weight) == len(own[1].weight) == head_dim:
        return None
    generator = torch.Generator(device=hidden.device).manual_seed(0)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(hidden.shape, generator=generator, device=hidden.device).to(hidden.dtype)
    }
    angles = torch.rand(embeddings[0].shape, generator=generator, device=hidden.device) * 6
    angles[..., head_dim // 2 :] = angles[..., : head_dim // 2]
    given["position_embeddings"] = (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
    theirs, ours = Recorder(), Recorder()
    with torch.inference_mode():
        expected = module(**(kwargs | given | {STEP_ARGUMENT: theirs}))[0]
        if theirs.call is None or theirs.given is None or theirs.given.shape[-1] != head_dim:
            return None
        block = RotaryAttention(group, module.o_proj, theirs.call, head_dim, own).eval()  # type: ignore[arg-type]
        output = block(**(kwargs | given | {STEP_ARGUMENT: ours}))[0]
    assert ours.given is not None
    tolerance = TOLERANCE.get(hidden.dtype, 1e-5)
    pairs = ((theirs.given, ours.given), (expected, output))
    is_equal = all(float((a - b).float().norm()) <= tolerance * float(a.float().norm()) for a, b in pairs)
    return block if is_equal else None
