"""A step's plan as tensors: packed tokens, cache positions, attention groups and the adapters' route."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core import Route, Run
from server.engine.attention import AttentionGroup, Span
from server.engine.blocks import NULL_BLOCK
from server.engine.request import GenerationRequest, TokenLogprob
from server.engine.sampling import RowLogprobs
from server.engine.scheduler import Chunk, Step
from server.engine.transfers import upload

__all__ = ["Batch", "PromptLogprobs", "PromptRows", "RouteMemo", "build_batch", "with_tokens"]

# Padded tokens that cost about as much as one more attention call per layer.
MAX_PADDED_TOKENS = 1_024


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Places [start, stop) among a batch's wanted logits, which tell of the prompt tokens from `position` + 1 on."""

    request: GenerationRequest
    position: int
    start: int
    stop: int

    @property
    def token_ids(self) -> list[int]:
        """Those that they tell of, which are known."""
        return self.request.prompt_ids[self.position + 1 : self.position + 1 + self.stop - self.start]


class PromptLogprobs:
    """Log-probabilities of the prompts' tokens in a step, on their way to the host: making it waits for nothing.

    Args:
        logits: [N, V] of the batch's wanted rows; not needed any more when this returns.
    """

    def __init__(self, logits: Tensor, prompt_rows: Sequence[PromptRows]) -> None:
        self._prompts = [(rows, self._begin(logits, rows)) for rows in prompt_rows]

    @staticmethod
    def _begin(logits: Tensor, rows: PromptRows) -> RowLogprobs:
        token_ids = upload(rows.token_ids, logits.device)
        return RowLogprobs(logits[rows.start : rows.stop], token_ids, rows.request.sampling.num_top_logprobs)

    def note(self) -> None:
        """Wait for them, and give each request its own; those that it has from before a preemption are left alone."""
        for rows, logprobs in self._prompts:
            if rows.request.is_finished:
                continue
            known = rows.request.prompt_logprobs
            found = [TokenLogprob(*each) for each in zip(rows.token_ids, *logprobs.read(), strict=True)]
            assert len(known) >= rows.position
            known += found[len(known) - rows.position :]


@dataclass(frozen=True, slots=True)
class Batch:
    """T packed tokens.

    Attributes:
        input_ids, position_ids: [1, T]; `-1 - i` stands for token i of the step before, see `with_tokens`.
        cache_positions: [T], block · block_size + offset.
        groups: attention groups that cover the tokens; none where attention reads spans.
        spans: the tokens of each sequence, in order; single tokens come first.
        route: which token wants which adapters, and its part for the rows in `last_rows`.
        last_rows: [N] tokens whose logits are wanted, ascending.
        sampled: the requests that get a token; the logits of the last one's row are each's ...
        sampled_rows: ... at these places of the N, or at all of them if this is None.
        prompt_rows: requests whose prompt's log-probabilities are wanted: places [start, stop) of the N are those of
            its tokens from `position` on.
        new_blocks: cache blocks to be zeroed first.
    """

    input_ids: Tensor
    position_ids: Tensor
    cache_positions: Tensor
    groups: list[AttentionGroup]
    spans: list[Span]
    route: Route
    head_route: Route
    last_rows: Tensor
    sampled: list[GenerationRequest]
    sampled_rows: list[int] | None
    prompt_rows: list[PromptRows]
    new_blocks: list[int]


class RouteMemo:
    """Keeps the last routes: while a batch decodes, each step wants what the step before it wanted.

    What the layers derive from a route is kept with it (`Route.cache`).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Route] = {}

    def get(self, runs: Sequence[Run]) -> Route:
        """The route of these runs, made anew if the last two were others."""
        key = tuple((tuple(sorted(weights.items())), num_rows) for weights, num_rows in runs)
        route = self._kept.pop(key, None)
        self._kept[key] = Route(runs) if route is None else route
        if len(self._kept) > 2:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]


def build_batch(
    step: Step, block_size: int, device: torch.device, routes: RouteMemo | None = None, *, spans_only: bool = False
) -> Batch:
    """Pack the chunks of a step: single tokens by length, then longer chunks, those of one adapter side by side.

    Args:
        routes: kept from step to step; none for a single batch.
        spans_only: attention reads `spans`, and there are no groups. All tensors are in host memory: a device gets them
            together.
    """
    device = torch.device("cpu") if spans_only else device
    routes = routes or RouteMemo()
    decoding = sorted((chunk for chunk in step.chunks if chunk.num_tokens == 1), key=lambda chunk: chunk.stop)
    longer = [chunk for chunk in step.chunks if chunk.num_tokens > 1]
    chunks = decoding + sorted(longer, key=lambda chunk: hash(chunk.request.route_key))
    input_ids: list[int] = []
    position_ids: list[int] = []
    cache_positions: list[int] = []
    last_rows: list[int] = []
    sampled_rows: list[int] = []
    prompt_rows: list[PromptRows] = []
    for chunk in chunks:
        blocks = chunk.request.block_ids
        input_ids += chunk.request.token_ids(chunk.start, chunk.stop)
        position_ids += range(chunk.start, chunk.stop)
        cache_positions += (
            blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop)
        )
        first_row = len(input_ids) - chunk.num_tokens
        num_prompt = _num_prompt_rows(chunk)
        if num_prompt:
            start = len(last_rows)
            last_rows += range(first_row, first_row + num_prompt)
            prompt_rows.append(PromptRows(chunk.request, chunk.start, start, len(last_rows)))
        if chunk.is_last:
            sampled_rows.append(len(last_rows))
            last_rows.append(len(input_ids) - 1)
    route = routes.get([Run(chunk.request.route_weights, chunk.num_tokens) for chunk in chunks])
    sampled = [chunk.request for chunk in chunks if chunk.is_last]
    return Batch(
        input_ids=torch.tensor([input_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        cache_positions=torch.tensor(cache_positions, device=device),
        groups=[] if spans_only else _attention_groups(chunks, block_size, device),
        spans=[Span(chunk.request.block_ids, chunk.start, chunk.num_tokens) for chunk in chunks],
        route=route,
        head_route=route.select(last_rows) if prompt_rows else routes.get([Run(r.route_weights, 1) for r in sampled]),
        last_rows=torch.tensor(last_rows, dtype=torch.long, device=device),
        sampled=sampled,
        sampled_rows=sampled_rows if prompt_rows else None,
        prompt_rows=prompt_rows,
        new_blocks=step.new_blocks,
    )


def with_tokens(ids: Tensor, last: Tensor | None) -> Tensor:
    """Token ids [T] with each `-1 - i` replaced by `last[i]`, on the device; `last` [N] is None if there is none."""
    return ids if last is None else torch.where(ids < 0, last[(-1 - ids).clamp_(min=0)], ids)


def _num_prompt_rows(chunk: Chunk) -> int:
    """Tokens of a chunk, from its first on, whose next token is one of the prompt's whose log-probability is wanted."""
    request = chunk.request
    if not request.sampling.prompt_logprobs:
        return 0
    return max(min(chunk.stop, len(request.prompt_ids) - 1) - chunk.start, 0)


def _attention_groups(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> list[AttentionGroup]:
    """Split packed chunks, single tokens first and by length, into groups of one attention call each."""
    groups: list[list[Chunk]] = []
    num_padded = 0
    for chunk in chunks:
        # A longer sequence pads each one that is in the group already.
        growth = (chunk.stop - groups[-1][-1].stop) * len(groups[-1]) if groups else 0
        num_padded += growth
        if not groups or chunk.num_tokens > 1 or num_padded > MAX_PADDED_TOKENS:
            groups.append([])
            num_padded = 0
        groups[-1].append(chunk)
    out = []
    start = 0
    for group in groups:
        stop = start + sum(chunk.num_tokens for chunk in group)
        out.append(_attention_group(start, stop, group, block_size, device))
        start = stop
    return out


def _attention_group(
    start: int, stop: int, chunks: Sequence[Chunk], block_size: int, device: torch.device
) -> AttentionGroup:
    width = -(-max(chunk.stop for chunk in chunks) // block_size)
    table = [(chunk.request.block_ids + [NULL_BLOCK] * width)[:width] for chunk in chunks]
    return AttentionGroup(
        start,
        stop,
        blocks=torch.tensor(table, device=device),
        lengths=[chunk.stop for chunk in chunks],
        num_queries=chunks[0].num_tokens,
    )
