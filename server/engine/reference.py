"""Logits of transformers' own forward pass, taken before anything in the model is changed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import ATTENTION_NAME

__all__ = ["Reference", "make_reference"]

PROMPT_LENGTHS = (23, 9)


@dataclass(frozen=True, slots=True)
class Reference:
    """Some prompts and the logits [N, V] that follow each of them."""

    prompts: list[list[int]]
    logits: Tensor


def make_reference(model: nn.Module, vocab_size: int, max_model_len: int) -> Reference:
    """Run random prompts through the model as it is, with transformers' eager attention."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_model_len) for length in PROMPT_LENGTHS]
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
    changeable: Any = model
    changeable.set_attn_implementation("eager")
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            rows = [
                changeable(input_ids=torch.tensor([p], device=device), use_cache=False, logits_to_keep=1).logits[0, -1]
                for p in prompts
            ]
    finally:
        changeable.set_attn_implementation(ATTENTION_NAME)
    return Reference(prompts, torch.stack(rows).float())
