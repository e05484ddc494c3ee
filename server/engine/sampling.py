"""From logits to tokens: one vectorised pass for all rows of a step."""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.native.small import native_maxima
from server.engine.adjust import adjust_logits, needs_adjusting
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.transfers import Fetch, upload

__all__ = ["Drawn", "RowLogprobs", "Sampled", "draw", "sample"]

# With top_p alone, so many of the most likely tokens are looked at before all are sorted.
NUM_CANDIDATES = 1_024
# Of a row of logits, whose greatest are found side by side.
MAX_PARTS = 64
# Rows of logits that are turned into float32 at once for log-probabilities.
MAX_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's choice.

    Attributes:
        token_id: None if the row's logits are not finite, or if none is left that may come.
        is_blocked: the latter.
        logprob, top: as in `TokenLogprob`.
    """

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_blocked: bool = False


class Drawn:
    """The next tokens of a step's rows.

    Attributes:
        tokens: [N] on the device.
    """

    def __init__(self, tokens: Tensor, is_finite: Tensor, blocked: frozenset[int], logprobs: "_Logprobs") -> None:
        self.tokens = tokens
        self._rows = Fetch(torch.stack([tokens, is_finite.to(tokens.dtype)], dim=1))
        self._blocked = blocked
        self._logprobs = logprobs

    def read(self) -> list[Sampled]:
        """Wait for them: the one moment of a step in which the host waits for the device."""
        rows: list[tuple[int, int]] = self._rows.tolist()
        logprobs = self._logprobs.read()
        return [
            Sampled(None, is_blocked=bool(finite))
            if i in self._blocked or not finite
            else Sampled(token, *logprobs.get(i, ()))
            for i, (token, finite) in enumerate(rows)
        ]


def draw(
    logits: Tensor, requests: Sequence[GenerationRequest], *, eos_token_ids: frozenset[int] = frozenset()
) -> Drawn:
    """Choose the next token of every row; waits for the device only if a request `needs_adjusting`.

    Args:
        logits: [N, V], any float dtype; not needed any more when this returns.
        requests: the N requests; their sampling parameters, seeds and positions decide.
        eos_token_ids: tokens that end a sequence, for `min_tokens`.
    """
    drawn = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
    adjusted = [i for i, request in enumerate(requests) if needs_adjusting(request)]
    found = native_maxima(logits)
    if found is None or drawn or adjusted or any(request.sampling.logprobs for request in requests):
        logits = logits.float()
    peaks, tokens = found or _maxima(logits)  # NaN and +inf end up in the peaks
    is_finite = peaks.isfinite()
    if adjusted:
        known = is_finite.tolist()
        adjusted = [i for i in adjusted if known[i]]
    changed = logits[adjusted] if adjusted else logits
    blocked: set[int] = set()
    if adjusted:
        adjust_logits(changed, [requests[i] for i in adjusted], eos_token_ids)
        peaks[adjusted], tokens[adjusted] = changed.max(dim=-1)
        blocked = {i for i, peak in zip(adjusted, peaks[adjusted].tolist(), strict=True) if peak == -torch.inf}
    if drawn:
        rows = upload(drawn, logits.device)
        shifted = logits[rows]
        places = {i: place for place, i in enumerate(drawn)}
        both = [(places[i], k) for k, i in enumerate(adjusted) if i in places]
        if both:
            shifted[[place for place, _ in both]] = changed[[k for _, k in both]]
        tokens[rows] = _draw(shifted - peaks[rows, None], [requests[i] for i in drawn])
    return Drawn(tokens, is_finite, frozenset(blocked), _Logprobs(logits, tokens, requests))


def _maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [N, V], and where they are; a GPU has few programs for few long rows, so these are taken in parts."""
    if not logits.is_cuda or logits.shape[1] % MAX_PARTS:
        peaks, tokens = logits.max(dim=-1)
        return peaks, tokens
    peaks, places = logits.view(len(logits), MAX_PARTS, -1).max(dim=-1)
    found, parts = peaks.max(dim=-1)
    within = places.gather(1, parts[:, None])[:, 0]
    return found, parts * (logits.shape[1] // MAX_PARTS) + within


def sample(
    logits: Tensor, requests: Sequence[GenerationRequest], *, eos_token_ids: frozenset[int] = frozenset()
) -> list[Sampled]:
    """`draw`, and wait for the tokens."""
    return draw(logits, requests, eos_token_ids=eos_token_ids).read()


class _Logprobs:
    """Of the rows that want them: the chosen token's, and the pairs of the most likely ones."""

    def __init__(self, logits: Tensor, tokens: Tensor, requests: Sequence[GenerationRequest]) -> None:
        wanted = [i for i, request in enumerate(requests) if request.sampling.logprobs]
        self._numbers = {i: requests[i].sampling.num_top_logprobs for i in wanted}
        self._rows: RowLogprobs | None = None
        if wanted:
            rows = upload(wanted, logits.device)
            self._rows = RowLogprobs(logits[rows], tokens[rows], max(self._numbers.values()))

    def read(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        if self._rows is None:
            return {}
        return {
            i: (value, pairs[:n])
            for (i, n), value, pairs in zip(self._numbers.items(), *self._rows.read(), strict=True)
        }


class RowLogprobs:
    """Log-probabilities of one token a row, and of the `num_top` most likely ones, on their way to the host.

    Args:
        logits: [N, V], any float dtype; not needed any more when this returns.
        tokens: [N], on the same device.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, num_top: int) -> None:
        parts = [
            _row_logprobs(rows.float(), own, num_top)
            for rows, own in zip(logits.split(MAX_LOGPROB_ROWS), tokens.split(MAX_LOGPROB_ROWS), strict=True)
        ]
        values, indices, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
        self._values = Fetch(values)
        self._best = (Fetch(indices), Fetch(logprobs)) if num_top else None

    def read(self) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
        values: list[float] = self._values.tolist()
        if self._best is None:
            return values, [()] * len(values)
        indices, logprobs = self._best
        pairs = zip(indices.tolist(), logprobs.tolist(), strict=True)
        return values, [tuple(zip(ids, each, strict=True)) for ids, each in pairs]


def _row_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], tokens [N] -> their log-probabilities [N], and the K most likely ones with theirs [N, K]."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    best = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    return (logits.gather(1, tokens[:, None]) - total).squeeze(1), best.indices, best.values - total


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
    scaled = logits / upload(temperature, device)[:, None]
    truncated = [i for i, p in enumerate(params) if p.truncates]
    if truncated:
        rows = upload(truncated, device)
        scaled[rows] = _truncate(scaled[rows], [params[i] for i in truncated])
    numbers = upload([uniform(r.sampling.seed, r.num_output) for r in requests], device, torch.float64)
    return _invert(scaled.softmax(dim=-1), numbers)


def _truncate(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set to -inf what `top_k`, `top_p`, `min_p` and `typical_p` exclude, in this order, as transformers' warpers do.

    scaled [N, V] has 0 as each row's highest value. Tokens as likely as the last one stay as well: low precision makes
    many equals, and which of them a sort puts first depends on who else is in the batch.
    """
    likely = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if likely:
        rows = upload(likely, scaled.device)
        scaled[rows] = _truncate_likely(scaled[rows], [params[i] for i in likely])
    if any(p.min_p > 0 for p in params):
        lowest = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
        limits = upload(lowest, scaled.device, torch.float64)[:, None].to(scaled.dtype)
        scaled = scaled.masked_fill(scaled < limits, -torch.inf)
    typical = [i for i, p in enumerate(params) if p.typical_p < 1]
    if typical:
        mass = upload([params[i].typical_p for i in typical], scaled.device, torch.float64)
        rows = upload(typical, scaled.device)
        scaled[rows] = _truncate_typical(scaled[rows], mass[:, None])
    return scaled


def _truncate_typical(scaled: Tensor, mass: Tensor) -> Tensor:
    """The `typical_p` part (Meister et al. 2022, "Locally typical sampling"); mass [N, 1]."""
    logprobs = scaled.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(dim=-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    sums = logprobs.exp().gather(1, order).double().cumsum(dim=-1)
    place = (sums < mass).sum(dim=-1, keepdim=True).clamp(max=scaled.shape[1] - 1)
    return scaled.masked_fill(distance > ordered.gather(1, place), -torch.inf)


def _truncate_likely(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The `top_k` and `top_p` part."""
    vocabulary, device = scaled.shape[1], scaled.device
    top_k = [min(p.top_k, vocabulary) for p in params]
    few = NUM_CANDIDATES if _may_ask(device) else vocabulary
    candidates = scaled.topk(min(vocabulary, max(k or few for k in top_k)), dim=-1).values
    limits = candidates.gather(1, upload([max(k - 1, 0) for k in top_k], device)[:, None])
    limits = limits.masked_fill(upload([not k for k in top_k], device)[:, None], -torch.inf)
    scaled = scaled.masked_fill(scaled < limits, -torch.inf)
    likely = [i for i, p in enumerate(params) if p.top_p < 1]
    if likely:
        rows = upload(likely, device)
        top_p = upload([params[i].top_p for i in likely], device, torch.float64)
        scaled[rows] = _truncate_mass(scaled[rows], candidates[rows], top_p[:, None])
    return scaled


def _may_ask(device: torch.device) -> bool:
    """Whether looking at a value costs nothing; elsewhere the host would wait for the whole step."""
    return device.type == "cpu"


def _truncate_mass(scaled: Tensor, candidates: Tensor, top_p: Tensor) -> Tensor:
    """The `top_p` part; candidates [N, C] are each row's highest values in descending order, top_p [N, 1].

    C is V, or at least `top_k`, unless values may be asked for.
    """
    sums = (candidates - scaled.logsumexp(dim=-1, keepdim=True)).exp().double().cumsum(dim=-1)
    place = (sums < top_p).sum(dim=-1, keepdim=True)  # of the token that reaches top_p
    out = scaled.masked_fill(scaled < candidates.gather(1, place.clamp(max=candidates.shape[1] - 1)), -torch.inf)
    if candidates.shape[1] == scaled.shape[1] or not _may_ask(scaled.device):
        return out
    flat = (place == candidates.shape[1]).squeeze(1)
    if bool(flat.any()):  # the candidates do not reach it
        everything = scaled[flat].sort(dim=-1, descending=True).values
        out[flat] = _truncate_mass(scaled[flat], everything, top_p[flat])
    return out


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Index of the first weight whose running sum exceeds number · total; weights [N, V], numbers [N] -> [N]."""
    sums = weights.double().cumsum(dim=-1)
    total = sums[:, -1]
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted[:, None], right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)
