"""The seam in unmodified Hugging Face models: one attention function, registered under our name.

A model whose configuration names it calls it in every attention layer, with positions already applied. The step under
way rides along as a keyword argument of `model(...)`. Without a mask function of that name, transformers builds no
masks: packed sequences of many requests are kept apart here, not by a mask of all tokens against all.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.errors import InvalidRequestError

__all__ = [
    "ATTENTION_NAME",
    "STEP_ARGUMENT",
    "AttentionCall",
    "AttentionStep",
    "Rotations",
    "register",
    "use_step",
]

ATTENTION_NAME = "loramux"
STEP_ARGUMENT = "loramux_step"

# Arguments that models pass along and that change nothing here.
HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "is_causal",  # checked on the module
        "layer_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asks for, beside its queries, keys and values.

    Attributes:
        layer: index of the attention layer.
        scaling: factor of the scores.
        window: a query sees this many tokens, itself included; None for all.
        softcap: scores are capped to softcap·tanh(score / softcap); None for no cap.
        sinks: [H] one extra score per head that takes probability and gives nothing (attention sinks); or None.
    """

    layer: int
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionStep(Protocol):
    """One forward pass's attention."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv] of the new tokens -> [T, H, Dv]."""

    def attend_joined(
        self, call: AttentionCall, heads: Tensor, num_kv_heads: int, embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The same for queries, keys and values in one tensor, [T, H + 2·Hkv, D], in this order, not yet rotated.

        Args:
            heads: may be overwritten.
            embeddings: cos and sin, [1, T, D] each, of rotary positions (Su et al. 2021, in Llama's order of halves).
        """


def register() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def use_step(step: AttentionStep) -> dict[str, Any]:
    """The keyword arguments for `model(...)` that run it under `step`."""
    return {STEP_ARGUMENT: step}


class Rotations:
    """Rotates queries and keys; what a step has seen of embeddings, of which layers share one, is prepared once."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def rotate(self, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> None:
        """heads [T, N, D] in place: x·cos + rotate_half(x)·sin."""
        cos, sin = self._signed(embeddings)
        turned = heads.roll(heads.shape[-1] // 2, dims=-1)
        heads.mul_(cos).addcmul_(turned, sin)

    def _signed(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos, sin [1, T, D] -> [T, 1, D] each, the first half of sin negated: a roll is a rotation of halves then."""
        for known, rotation in self._known:
            if known is embeddings[1]:
                return rotation
        cos, sin = (part[0].unsqueeze(1) for part in embeddings)
        half = sin.shape[-1] // 2
        self._known.append((embeddings[1], (cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1))))
        return self._known[-1][1]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, Dv]."""
    step: AttentionStep | None = others.pop(STEP_ARGUMENT, None)
    if step is None:
        raise InvalidRequestError(
            f"{type(module).__name__} does not pass its keyword arguments on to attention", code="model_unsupported"
        )
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS_ARGUMENTS]
    if unknown or attention_mask is not None or dropout or getattr(module, "is_causal", True) is not True:
        what = f"the arguments {unknown}" if unknown else "a mask, dropout or attention that is not causal"
        raise InvalidRequestError(
            f"{type(module).__name__} asks for {what}, which is not supported", code="model_unsupported"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise InvalidRequestError(f"{type(module).__name__} does not tell its layer_idx", code="model_unsupported")
    call = AttentionCall(layer, query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    out = step.attend(call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return out.unsqueeze(0).contiguous(), None
