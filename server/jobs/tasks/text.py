"""Texts that a job judges a model by: a caller's prompts, or a few of our own of several kinds."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["encoded_prompts", "packed_calibration"]

OWN_TEXTS = Path(__file__).with_name("calibration.txt")
SEPARATOR = "\n----\n"
MAX_TOKENS = 512  # of one prompt
CALIBRATION_TOKENS = 128  # in a row


def encoded_prompts(base: Path, prompts: Sequence[str] | None) -> list[Tensor]:
    """Token ids [1, T] of the prompts, or of our own texts if none are given."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import; some jobs do without

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    texts = OWN_TEXTS.read_text(encoding="utf-8").split(SEPARATOR) if prompts is None else prompts
    rows = [tokenizer(text).input_ids[:MAX_TOKENS] for text in texts]
    return [torch.tensor([row]) for row in rows if row]


def packed_calibration(base: Path, prompts: Sequence[str] | None) -> Tensor:
    """The same as rows [N, T] of equal length, one text after the other."""
    together = torch.cat(encoded_prompts(base, prompts), dim=1)[0]
    width = min(CALIBRATION_TOKENS, len(together))
    return together[: len(together) // width * width].view(-1, width)
