"""Attention of packed tokens in one call of C a layer, over the cache's blocks as they lie (`lora_core/native`)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.native import library
from server.engine.attention.device import Span
from server.engine.attention.interface import AttentionCall
from server.engine.kv_cache import KVCache

__all__ = ["NativeAttention"]

ADDRESSES = ("query", "key", "value", "out", "keys", "values", "cos", "sin", "sinks", "positions", "table", "sequences")
NUMBERS = (
    *("query_stride", "key_stride", "value_stride", "keys_head", "values_head"),
    *("num_tokens", "num_sequences", "table_width", "block_size", "num_heads", "num_kv_heads", "dim", "value_dim"),
    "window",
)


class _Attention(ctypes.Structure):
    """As in attention.c; the tensors are held by whoever fills it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ADDRESSES),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeAttention:
    """The `AttentionStep` of an engine step on a CPU.

    Args:
        positions: [T] int64, where the new tokens' keys and values go in the pool.
        spans: the tokens of each sequence, in order.
    """

    def __init__(self, cache: KVCache, positions: Tensor, spans: Sequence[Span]) -> None:
        found = library(cache.dtype)
        assert found is not None
        self._attend = found.attend
        self._cache = cache
        width = max(len(span.blocks) for span in spans)
        table = torch.tensor([[*span.blocks, *[0] * (width - len(span.blocks))] for span in spans], dtype=torch.int32)
        rows, start = [], 0
        for span in spans:
            rows.append((start, span.num_tokens, span.start + span.num_tokens))
            start += span.num_tokens
        sequences = torch.tensor(rows, dtype=torch.int32)
        self._held = positions, table, sequences
        self._arguments = _Attention(
            positions=positions.data_ptr(),
            table=table.data_ptr(),
            sequences=sequences.data_ptr(),
            num_tokens=start,
            num_sequences=len(spans),
            table_width=width,
            block_size=cache.block_size,
        )

    @staticmethod
    def can_read(cache: KVCache) -> bool:
        """There is a library for what the cache holds."""
        return cache.device.type == "cpu" and library(cache.dtype) is not None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.contiguous() for part in (query, key, value))
        return self._run(call, query, key, value, None)

    def attend_joined(
        self, call: AttentionCall, heads: Tensor, num_kv_heads: int, embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        cos, sin = (part.to(heads.dtype).contiguous() for part in embeddings)
        return self._run(call, query, key, value, (cos, sin))

    def _run(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Tensors [T, heads, dim] whose last two dimensions lie together."""
        keys, values = self._cache.heads(call.layer)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        a = self._arguments
        a.query, a.key, a.value, a.out = query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()
        a.keys, a.values = keys.data_ptr(), values.data_ptr()
        a.cos, a.sin = (None, None) if rotation is None else (rotation[0].data_ptr(), rotation[1].data_ptr())
        a.sinks = None if sinks is None else sinks.data_ptr()
        a.query_stride, a.key_stride, a.value_stride = query.stride(0), key.stride(0), value.stride(0)
        a.keys_head, a.values_head = keys.stride(0), values.stride(0)
        a.num_heads, a.num_kv_heads, a.dim, a.value_dim = *query.shape[1:2], *key.shape[1:], value.shape[2]
        a.window = call.window or 0
        a.scaling, a.softcap = call.scaling, call.softcap or 0.0
        self._attend(ctypes.byref(a))
        return out
