"""Attention of packed tokens by kernels: what a step's kernels must know, in one tensor, and the step itself."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.ops.tuning import Tuner, source_digest
from server.engine.attention.interface import AttentionCall, Rotations
from server.engine.kv_cache import KVCache, LayerShape

__all__ = ["NO_CONFIGS", "AttentionPlan", "DeviceAttention", "Span", "tune_attention"]

FIELDS = 4
# Queries of a prompt's tile, and programs that keep an accelerator busy while sequences decode.
PROMPT_QUERIES = 16
BUSY_PROGRAMS = 256
MAX_SPLITS = 16
ATTEND_OPTIONS = {"block_keys": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3)}
# What attention is measured on.
TRIAL_SEQUENCES = 32
TRIAL_LENGTH = 1_024
NO_CONFIGS: Mapping[Hashable, Any] = MappingProxyType({})


class Span(NamedTuple):
    """New tokens of one sequence: its cache blocks, the first one's position, and how many they are."""

    blocks: Sequence[int]
    start: int
    num_tokens: int


class AttentionPlan:
    """Tiles of decoding sequences, then tiles of prompts, then block tables: views of one int32 buffer.

    Args:
        num_decoding, num_prompt_tiles: capacities; what is left over is nobody's.
        num_blocks: capacity of all block tables together.
        num_kv_heads: of a layer; decides how far the keys of few sequences are split.
    """

    def __init__(
        self, num_decoding: int, num_prompt_tiles: int, num_blocks: int, num_kv_heads: int, device: torch.device
    ) -> None:
        self._num_tiles = num_decoding + num_prompt_tiles
        self._num_decoding = num_decoding
        self._buffer = torch.empty(self._num_tiles * FIELDS + num_blocks, dtype=torch.int32, device=device)
        fields = self._buffer[: self._num_tiles * FIELDS].view(-1, FIELDS)
        self.decoding, self.prompts = fields[:num_decoding], fields[num_decoding:]
        self.blocks = self._buffer[self._num_tiles * FIELDS :]
        wanted = BUSY_PROGRAMS // max(1, num_decoding * num_kv_heads)
        self.num_splits = min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))

    @classmethod
    def of(cls, spans: Sequence[Span], num_kv_heads: int, block_size: int, device: torch.device) -> "AttentionPlan":
        """A plan that is just large enough."""
        decoding = sum(span.num_tokens == 1 for span in spans)
        tiles = sum(-(-span.num_tokens // PROMPT_QUERIES) for span in spans if span.num_tokens > 1)
        num_blocks = sum(_num_blocks(span, block_size) for span in spans)
        plan = cls(decoding, tiles, num_blocks, num_kv_heads, device)
        plan.fill(spans, block_size)
        return plan

    def fill(self, spans: Sequence[Span], block_size: int) -> None:
        """Write a step's spans, which fit, in one copy. Single tokens come first."""
        fields: list[int] = []
        blocks: list[int] = []
        token = 0
        for span in spans:
            first_block = len(blocks)
            blocks += span.blocks[: _num_blocks(span, block_size)]
            if span.num_tokens == 1:
                fields += (first_block, token, 1, span.start)
            else:
                for done in range(0, span.num_tokens, PROMPT_QUERIES):
                    count = min(PROMPT_QUERIES, span.num_tokens - done)
                    fields += (first_block, token + done, count, span.start + done)
            token += span.num_tokens
        for place in range(len(fields) // FIELDS, self._num_tiles):
            fields += (0, place, 1, -1)  # a token of nobody's attends to nothing
        values = torch.tensor(fields + blocks, dtype=torch.int32)
        host = values.pin_memory() if self._buffer.is_cuda else values
        self._buffer[: len(host)].copy_(host, non_blocking=True)


def _num_blocks(span: Span, block_size: int) -> int:
    return -(-(span.start + span.num_tokens) // block_size)


class DeviceAttention:
    """The `AttentionStep` of an engine step whose cache is read and written by kernels.

    Args:
        positions: [T] int64, where the new tokens' keys and values go in the pool; -1 for a token of nobody's.
        plan: the step's tiles.
        configs: measured launch parameters (`tune_attention`).

    Attributes:
        cache: what it reads and writes.
    """

    def __init__(
        self, cache: KVCache, positions: Tensor, plan: AttentionPlan, configs: Mapping[Hashable, Any] = NO_CONFIGS
    ) -> None:
        from server.engine.attention import kernels  # noqa: PLC0415 - Triton is optional

        self._kernels: Any = kernels
        self.cache = cache
        self.positions = positions
        self._tiles = [
            kernels.Tiles(fields, plan.blocks, num_queries, num_splits, configs)
            for fields, num_queries, num_splits in (
                (plan.decoding, 1, plan.num_splits),
                (plan.prompts, PROMPT_QUERIES, 1),
            )
            if len(fields)
        ]
        self._rotations = Rotations()

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.heads(call.layer)
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        self._kernels.store(keys, values, self.positions, key, value)
        return self.read(call, query)

    def read(self, call: AttentionCall, query: Tensor) -> Tensor:
        """Attention of queries [T, H, D], contiguous along D, whose keys and values the cache holds: [T, H, Dv]."""
        keys, values = self.cache.heads(call.layer)
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        for tiles in self._tiles:
            self._kernels.attend(call, query, keys, values, tiles, out)
        return out

    def attend_joined(
        self, call: AttentionCall, heads: Tensor, num_kv_heads: int, embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        self._rotations.rotate(heads[:, :-num_kv_heads], embeddings)
        parts = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        return self.attend(call, *parts)


def tune_attention(
    tuner: Tuner, layers: Iterable[tuple[LayerShape, int]], block_size: int, dtype: torch.dtype, device: torch.device
) -> dict[Hashable, Any]:
    """Measure the attention kernel on sequences made for it; returns the `configs` of a `DeviceAttention`.

    Args:
        layers: what each layer keeps of a token, and its number of query heads.
    """
    configs: dict[Hashable, Any] = {}
    for shape, num_heads in sorted(set(layers), key=repr):
        num_blocks = -(-TRIAL_LENGTH // block_size)
        cache = KVCache([shape], 1 + num_blocks, block_size, dtype=dtype, device=device)
        cache.zero(range(1, 1 + num_blocks))
        blocks = range(1, 1 + num_blocks)
        num_new = TRIAL_SEQUENCES * PROMPT_QUERIES
        decoding = [Span(blocks, TRIAL_LENGTH - 1, 1)] * TRIAL_SEQUENCES
        for spans in (decoding, [Span(blocks, TRIAL_LENGTH - num_new, num_new)]):
            key, config = _tune_spans(tuner, cache, spans, num_heads)
            configs[key] = config
    return configs


def _tune_spans(tuner: Tuner, cache: KVCache, spans: Sequence[Span], num_heads: int) -> tuple[Hashable, Any]:
    """The best parameters for spans of one kind, and the key under which they are looked up."""
    from server.engine.attention import kernels  # noqa: PLC0415 - Triton is optional

    shape = cache.shape(0)
    keys, values = cache.heads(0)
    plan = AttentionPlan.of(spans, shape.num_kv_heads, cache.block_size, cache.device)
    is_decoding = spans[0].num_tokens == 1
    fields = plan.decoding if is_decoding else plan.prompts
    num_queries, splits = (1, plan.num_splits) if is_decoding else (PROMPT_QUERIES, 1)
    num_tokens = sum(span.num_tokens for span in spans)
    query = torch.randn(num_tokens, num_heads, shape.key_dim, device=cache.device).to(keys.dtype)
    out = query.new_empty(*query.shape[:2], shape.value_dim)
    call = AttentionCall(0, shape.key_dim**-0.5)
    key = (num_queries, num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim)

    def run(config: Any) -> None:
        tiles = kernels.Tiles(fields, plan.blocks, num_queries, splits, {key: config})
        kernels.attend(call, query, keys, values, tiles, out)

    digest = source_digest(kernels)
    name = f"attend {digest} {key}, {shape.num_kv_heads} heads, {keys.dtype}, blocks of {cache.block_size}"
    rows = kernels.num_rows(*key[:2])
    sizes = out.element_size(), rows, shape.key_dim, shape.value_dim
    start = kernels.AttendConfig.default(*sizes)
    return key, tuner.best(name, start, ATTEND_OPTIONS, run, lambda config: config.shared_bytes(*sizes))
