"""Attention of packed tokens over a block-wise cache, in PyTorch's scaled dot-product attention.

The tokens of a step are split into groups that one call can handle: all sequences that decode one token and are about
equally long share a call, with their cache blocks gathered into one padded tensor; a longer chunk has a call of its
own. Groups, block tables and masks are made once a step and serve every layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from server.engine.attention.interface import AttentionCall
from server.engine.kv_cache import KVCache

__all__ = ["AttentionGroup", "PagedAttention"]


@dataclass(slots=True)
class AttentionGroup:
    """Tokens [start, stop) of the step: N sequences with Q new tokens each.

    Attributes:
        blocks: [N, B] their block tables, padded with the null block.
        lengths: [N] tokens of each sequence, the new ones included.
        num_queries: Q.
    """

    start: int
    stop: int
    blocks: Tensor
    lengths: Tensor
    num_queries: int
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, num_keys: int, heads_per_key: int, dtype: torch.dtype) -> Tensor:
        """[N, 1, G·Q, num_keys], 0 where the query may see the key and -inf elsewhere; kept for the other layers."""
        if (window, heads_per_key) not in self._masks:
            device = self.lengths.device
            keys = torch.arange(num_keys, device=device)
            new = torch.arange(self.num_queries, device=device)
            queries = self.lengths[:, None] - self.num_queries + new  # [N, Q], position of each query
            hidden = keys > queries[..., None]
            if window is not None:
                hidden |= keys <= queries[..., None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            self._masks[window, heads_per_key] = mask.repeat(1, heads_per_key, 1).unsqueeze(1)
        return self._masks[window, heads_per_key]


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

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._cache.write(call.layer, self._positions, key, value)
        outputs = [self._attend_group(call, group, query[group.start : group.stop]) for group in self._groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_group(self, call: AttentionCall, group: AttentionGroup, query: Tensor) -> Tensor:
        """query [N·Q, H, D] -> [N·Q, H, Dv]."""
        keys, values = self._cache.read(call.layer, group.blocks)
        num_sequences, num_kv_heads = keys.shape[:2]
        mask = group.mask(call.window, keys.shape[2], query.shape[1] // num_kv_heads, query.dtype)
        # [N, Q, Hkv, G, D] -> [N, Hkv, G·Q, D]: the G query heads of a key head become more queries of it.
        split = query.view(num_sequences, group.num_queries, num_kv_heads, -1, query.shape[-1])
        folded = split.permute(0, 2, 3, 1, 4).reshape(num_sequences, num_kv_heads, -1, query.shape[-1])
        if call.softcap is None and call.sinks is None:
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=call.scaling)
        else:
            sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, -1, 1)
            out = _attend_plainly(call, folded, keys, values, mask, sinks, group.num_queries)
        out = out.view(num_sequences, num_kv_heads, -1, group.num_queries, out.shape[-1])
        return out.permute(0, 3, 1, 2, 4).reshape(query.shape[0], query.shape[1], -1)


def _attend_plainly(
    call: AttentionCall,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    num_queries: int,
) -> Tensor:
    """The formula itself, for what the fused operator does not know; sinks [Hkv, G, 1]."""
    scores = (query @ keys.transpose(2, 3)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = (scores + mask).float()
    if sinks is not None:
        column = sinks.repeat_interleave(num_queries, dim=1).expand(scores.shape[0], -1, -1, -1)
        scores = torch.cat([scores, column.float()], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    return weights.to(values.dtype) @ values
