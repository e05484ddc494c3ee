"""From logits to tokens: one vectorised pass for all rows of a step."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import GenerationRequest, SamplingParams

__all__ = ["Sampled", "sample"]

# With top_p alone, so many of the most likely tokens are looked at before all are sorted.
NUM_CANDIDATES = 1_024


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's choice; `token_id` is None if the row's logits are not finite."""

    token_id: int | None
    logprob: float | None = None


def sample(logits: Tensor, requests: Sequence[GenerationRequest]) -> list[Sampled]:
    """Choose the next token of every row.

    Args:
        logits: [N, V], any float dtype.
        requests: the N requests; their sampling parameters, seeds and positions decide.
    """
    logits = logits.float()
    peaks, tokens = logits.max(dim=-1)  # NaN and +inf end up in the peaks
    drawn = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [requests[i] for i in drawn]
        tokens[rows] = _draw(logits[rows] - peaks[rows, None], chosen)
    wants_logprob = [i for i, request in enumerate(requests) if request.sampling.logprobs]
    logprobs: dict[int, float] = {}
    if wants_logprob:
        rows = torch.tensor(wants_logprob, device=logits.device)
        values = logits[rows].gather(1, tokens[rows, None]).squeeze(1) - logits[rows].logsumexp(dim=-1)
        logprobs = dict(zip(wants_logprob, values.tolist(), strict=True))
    finite = peaks.isfinite().tolist()
    return [Sampled(token, logprobs.get(i)) if finite[i] else Sampled(None) for i, token in enumerate(tokens.tolist())]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but a request's seed and the position of the token to be drawn."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def _draw(logits: Tensor, requests: Sequence[GenerationRequest]) -> Tensor:
    """logits [N, V], at most 0 -> [N] tokens, by inverting each row's cumulative distribution at its own number."""
    params = [request.sampling for request in requests]
    device = logits.device
    range_ = torch.finfo(logits.dtype)
    temperature = [min(max(p.temperature, range_.tiny), range_.max) for p in params]
    scaled = logits / torch.tensor(temperature, device=device)[:, None]
    truncated = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if truncated:
        scaled[truncated] = _truncate(scaled[truncated], [params[i] for i in truncated])
    numbers = torch.tensor(
        [uniform(request.sampling.seed, len(request.output_ids)) for request in requests],
        dtype=torch.float64,
        device=device,
    )
    return _invert(scaled.softmax(dim=-1), numbers)


def _truncate(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set all to -inf but each row's `top_k` and then `top_p` most likely tokens, as transformers' warpers do.

    Tokens as likely as the last one stay as well: low precision makes many equals, and which of them a sort puts first
    depends on who else is in the batch.
    """
    vocabulary, device = scaled.shape[1], scaled.device
    top_k = [min(p.top_k, vocabulary) for p in params]
    candidates = scaled.topk(min(vocabulary, max(k or NUM_CANDIDATES for k in top_k)), dim=-1).values
    last = torch.tensor([max(k - 1, 0) for k in top_k], device=device)
    limits = candidates.gather(1, last[:, None])
    limits[[i for i, k in enumerate(top_k) if not k]] = -torch.inf
    scaled = scaled.masked_fill(scaled < limits, -torch.inf)
    rows = [i for i, p in enumerate(params) if p.top_p < 1]
    if rows:
        top_p = torch.tensor([params[i].top_p for i in rows], dtype=torch.float64, device=device)
        scaled[rows] = _truncate_mass(scaled[rows], candidates[rows], top_p[:, None])
    return scaled


def _truncate_mass(scaled: Tensor, candidates: Tensor, top_p: Tensor) -> Tensor:
    """The `top_p` part; candidates [N, C] are each row's highest values in descending order, top_p [N, 1]."""
    sums = (candidates - scaled.logsumexp(dim=-1, keepdim=True)).exp().double().cumsum(dim=-1)
    place = (sums < top_p).sum(dim=-1, keepdim=True)  # of the token that reaches top_p
    out = scaled.masked_fill(scaled < candidates.gather(1, place.clamp(max=candidates.shape[1] - 1)), -torch.inf)
    flat = (place == candidates.shape[1]).squeeze(1)
    if candidates.shape[1] < scaled.shape[1] and bool(flat.any()):  # the candidates do not reach it
        everything = scaled[flat].sort(dim=-1, descending=True).values
        out[flat] = _truncate_mass(scaled[flat], everything, top_p[flat])
    return out


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Index of the first weight whose running sum exceeds number · total; weights [N, V], numbers [N] -> [N]."""
    sums = weights.double().cumsum(dim=-1)
    total = sums[:, -1]
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted[:, None], right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)
