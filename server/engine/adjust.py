"""What changes logits before a token is chosen: bias, penalties, words and ends that may not come, constraints.

Each function takes the rows that use anything of this at all, [N, V] float32, and changes them in place; its work grows
with what is used, not with the vocabulary. They run in the order in which transformers' `generate` applies the same.
"""

from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from server.engine.request import GenerationRequest, TokenCounts

__all__ = ["adjust_logits", "needs_adjusting"]


def needs_adjusting(request: GenerationRequest) -> bool:
    """Whether a request's logits are changed before a token is chosen."""
    return request.sampling.adjusts or request.constraint is not None


def adjust_logits(logits: Tensor, requests: Sequence[GenerationRequest], eos_token_ids: frozenset[int]) -> None:
    """Apply the bias, penalties, bans and constraints of N requests to their logits [N, V], in place."""
    _add_bias(logits, requests)
    _penalise(logits, requests)
    banned = [
        (row, token_id)
        for row, request in enumerate(requests)
        for token_id in _banned(request, eos_token_ids)
        if token_id < logits.shape[1]
    ]
    if banned:
        rows, columns = torch.tensor(banned, device=logits.device).unbind(dim=1)
        logits[rows, columns] = -torch.inf
    for row, request in enumerate(requests):
        if request.constraint is not None:
            forbidden = torch.frombuffer(request.constraint.forbidden(), dtype=torch.bool)
            logits[row].masked_fill_(forbidden.to(logits.device), -torch.inf)


def _add_bias(logits: Tensor, requests: Sequence[GenerationRequest]) -> None:
    entries = [
        (row, token_id, bias)
        for row, request in enumerate(requests)
        for token_id, bias in request.sampling.logit_bias.items()
    ]
    if entries:
        rows, columns, values = zip(*entries, strict=True)
        device = logits.device
        where = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        logits[where] += torch.tensor(values, dtype=logits.dtype, device=device)


def _penalise(logits: Tensor, requests: Sequence[GenerationRequest]) -> None:
    """`logit / r` (or `· r` below zero) for tokens of prompt and output, then `− f · count − p · [count > 0]`."""
    penalised = [(row, request) for row, request in enumerate(requests) if request.sampling.penalises]
    if not penalised:
        return
    counts = [_updated_counts(request) for _, request in penalised]
    device = logits.device
    lengths = torch.tensor([len(c.ids) for c in counts], device=device)
    if not int(lengths.sum()):
        return
    params = [
        (row, r.sampling.repetition_penalty, r.sampling.frequency_penalty, r.sampling.presence_penalty)
        for row, r in penalised
    ]
    columns = _joined([c.ids for c in counts], "q", device)
    number = _joined([c.counts for c in counts], "f", device)
    each = torch.tensor(params, dtype=torch.float64, device=device).repeat_interleave(lengths, dim=0)
    rows = each[:, 0].long()
    repetition, frequency, presence = each[:, 1:].to(logits.dtype).unbind(dim=1)
    values = logits[rows, columns]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[rows, columns] = values - frequency * number - presence * (number > 0)


def _updated_counts(request: GenerationRequest) -> TokenCounts:
    if request.token_counts is None:
        with_prompt = request.sampling.repetition_penalty != 1
        request.token_counts = TokenCounts(request.prompt_ids if with_prompt else ())
    request.token_counts.update(request.output_ids)
    return request.token_counts


def _joined(arrays: Sequence[array], typecode: str, device: torch.device) -> Tensor:
    joined = array(typecode)
    for part in arrays:
        joined.extend(part)
    dtype = torch.int64 if typecode == "q" else torch.float32
    return torch.frombuffer(joined, dtype=dtype).to(device)


def _banned(request: GenerationRequest, eos_token_ids: frozenset[int]) -> Iterator[int]:
    """Tokens that may not come next: ends before their time, and the last of a bad word whose others are there."""
    sampling = request.sampling
    if len(request.output_ids) < sampling.min_tokens:
        yield from eos_token_ids | sampling.stop_token_ids
    for word in sampling.bad_words:
        start = request.num_tokens - len(word) + 1
        if start >= 0 and tuple(request.token_ids(start, request.num_tokens)) == word[:-1]:
            yield word[-1]
