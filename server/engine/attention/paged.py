"""Attention of packed tokens over a block-wise cache.

The tokens of a step are split into groups that one call can handle: all sequences that decode one token and are about
equally long share a call, with their cache blocks gathered into one padded tensor; a longer chunk has a call of its
own. Groups, block tables and masks are made once a step and serve every layer.

The G query heads that share a key head are G more queries of it. With one query token each, PyTorch's fused attention
takes 2.5 times as long as the two batched products it stands for; with a chunk's, see `tiles.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.attention.interface import AttentionCall, Rotations
from server.engine.attention.tiles import Tile, make_tiles, visible
from server.engine.kv_cache import KVCache, LayerShape

__all__ = ["AttentionGroup", "PagedAttention"]


@dataclass(slots=True)
class AttentionGroup:
    """Tokens [start, stop) of the step: N sequences with one new token each, or one sequence with Q of them.

    Attributes:
        blocks: [N, B] their block tables, padded with the null block.
        lengths: tokens of each sequence, the new ones included.
        num_queries: Q.
    """

    start: int
    stop: int
    blocks: Tensor
    lengths: Sequence[int]
    num_queries: int
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    _tiles: dict[tuple[int | None, int, int], list[Tile]] = field(default_factory=dict)
    _indices: dict[LayerShape, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, num_keys: int, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
        """[N·Hkv, 1, num_keys] which keys the last tokens of sequences see, 0 or -inf; kept for the other layers."""
        key = (window, num_kv_heads)
        if key not in self._masks:
            device = self.blocks.device
            last = torch.tensor(self.lengths, device=device) - 1
            mask = visible(last, torch.arange(num_keys, device=device), window, dtype)
            self._masks[key] = mask.repeat_interleave(num_kv_heads, 0)[:, None]
        return self._masks[key]

    def tiles(self, window: int | None, num_kv_heads: int, query: Tensor) -> list[Tile]:
        """What a chunk's queries [Q, H, D] see; kept for the other layers."""
        num_heads = query.shape[1]
        key = (window, num_kv_heads, num_heads)
        if key not in self._tiles:
            self._tiles[key] = make_tiles(
                self.num_queries,
                self.lengths[0],
                window=window,
                num_heads=num_heads,
                group_size=num_heads // num_kv_heads,
                like=query,
            )
        return self._tiles[key]

    def index(self, cache: KVCache, layer: int) -> Tensor:
        """Where the group's keys and values are; kept for the layers of equal shape."""
        shape = cache.shape(layer)
        if shape not in self._indices:
            self._indices[shape] = cache.index(layer, self.blocks)
        return self._indices[shape]


class PagedAttention:
    """The `AttentionStep` of an engine step.

    Args:
        positions: [T] where the new tokens' keys and values go in the pool.
        groups: together they cover tokens [0, T).
    """

    def __init__(self, cache: KVCache, positions: Tensor, groups: list[AttentionGroup]) -> None:
        self._cache = cache
        self._positions = positions
        self._groups = groups
        self._rotations = Rotations()

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._cache.is_joined:
            return self._attend_joined(call, torch.cat([query, key, value], dim=1), key.shape[1])
        self._cache.write(call.layer, self._positions, key, value)
        return self._join([self._attend_group(call, g, query[g.start : g.stop]) for g in self._groups])

    def attend_joined(
        self, call: AttentionCall, heads: Tensor, num_kv_heads: int, embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        self._rotations.rotate(heads[:, :-num_kv_heads], embeddings)
        return self._attend_joined(call, heads, num_kv_heads)

    def _attend_joined(self, call: AttentionCall, heads: Tensor, num_kv_heads: int) -> Tensor:
        num_query_heads = heads.shape[1] - 2 * num_kv_heads
        query, key_value = heads[:, :num_query_heads], heads[:, num_query_heads:]
        self._cache.write_joined(call.layer, self._positions, key_value)
        return self._join([self._attend_group(call, g, query[g.start : g.stop]) for g in self._groups])

    @staticmethod
    def _join(outputs: list[Tensor]) -> Tensor:
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_group(self, call: AttentionCall, group: AttentionGroup, query: Tensor) -> Tensor:
        """query [N·Q, H, D] -> [N·Q, H, Dv]."""
        keys, values = self._cache.read(call.layer, group.index(self._cache, call.layer))
        num_kv_heads, dim = self._cache.shape(call.layer).num_kv_heads, query.shape[-1]
        if group.num_queries == 1:
            folded = query.reshape(keys.shape[0], -1, dim)  # [N·Hkv, G, D]
            mask = group.mask(call.window, keys.shape[1], num_kv_heads, query.dtype)
            return _attend_directly(call, folded, keys, values, mask, num_kv_heads).view(*query.shape[:2], -1)
        split = query.reshape(group.num_queries, num_kv_heads, -1, dim)
        outputs = []
        for tile in group.tiles(call.window, num_kv_heads, query):
            folded = split[tile.rows].permute(1, 2, 0, 3).reshape(num_kv_heads, -1, dim)  # [Hkv, G·q, D]
            out = _attend_directly(call, folded, keys[:, tile.keys], values[:, tile.keys], tile.mask, num_kv_heads)
            outputs.append(out.view(num_kv_heads, split.shape[2], -1, out.shape[-1]).permute(2, 0, 1, 3))
        return torch.cat(outputs).view(group.num_queries, query.shape[1], -1)


def _attend_directly(
    call: AttentionCall, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, num_kv_heads: int
) -> Tensor:
    """softmax(query·keysᵀ·scaling + mask)·values, in batched products.

    Args:
        query: [N·Hkv, G·Q, D], the queries of one head side by side.
        keys, values: [N·Hkv, L, D or Dv].
        mask: [N·Hkv, 1, L] or [1, G·Q, L], of 0 and -inf.
    """
    if call.softcap is None and call.sinks is None:
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=call.scaling)
        return torch.bmm(scores.softmax(dim=-1), values)
    scores = torch.bmm(query, keys.transpose(1, 2)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = (scores + mask).float()
    if call.sinks is not None:
        per_head = call.sinks.view(num_kv_heads, -1)  # [Hkv, G]
        per_row = per_head.repeat_interleave(query.shape[1] // per_head.shape[1], dim=1)
        column = per_row.repeat(query.shape[0] // num_kv_heads, 1).unsqueeze(-1)
        scores = torch.cat([scores, column.float()], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[1]]
    return torch.bmm(weights.to(values.dtype), values)
