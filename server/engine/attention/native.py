"""Attention of packed tokens in one call of C a layer, over the cache's blocks as they lie (`lora_core/native`)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.native import library
from server.engine.attention.device import Span
from server.engine.attention.interface import AttentionCall
from server.engine.kv_cache import KVCache

__all__ = ["LayerAttention", "NativeAttention"]


class _Step(ctypes.Structure):
    """As in functions.h; the tensors are held by whoever fills it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "table", "sequences", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_sequences", "table_width")),
    )


class LayerAttention(ctypes.Structure):
    """As `Attention` in functions.h, likewise."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "keys", "values", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("query_stride", "key_stride", "value_stride", "keys_head", "values_head")
        ),
        *((name, ctypes.c_int64) for name in ("block_size", "num_heads", "num_kv_heads", "dim", "value_dim", "window")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )

    @classmethod
    def of(
        cls, call: AttentionCall, cache: KVCache, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> "LayerAttention":
        """A layer's attention but for its sinks.

        Args:
            query, key, value, out: [T, heads, dim] whose last two dimensions lie together.
        """
        keys, values = cache.heads(call.layer)
        return cls(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            out=out.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            query_stride=query.stride(0),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            keys_head=keys.stride(0),
            values_head=values.stride(0),
            block_size=cache.block_size,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            dim=key.shape[2],
            value_dim=value.shape[2],
            window=call.window or 0,
            scaling=call.scaling,
            softcap=call.softcap or 0.0,
        )


class NativeAttention:
    """The `AttentionStep` of an engine step on a CPU.

    Args:
        positions: [T] int64, where the new tokens' keys and values go in the pool.
        spans: the tokens of each sequence, in order.

    Attributes:
        cache: what it reads and writes.
    """

    def __init__(self, cache: KVCache, positions: Tensor, spans: Sequence[Span]) -> None:
        found = library(cache.dtype)
        assert found is not None
        self._attend = found.attend
        self.cache = cache
        width = max(len(span.blocks) for span in spans)
        table = torch.tensor([[*span.blocks, *[0] * (width - len(span.blocks))] for span in spans], dtype=torch.int32)
        rows, start = [], 0
        for span in spans:
            rows.append((start, span.num_tokens, span.start + span.num_tokens))
            start += span.num_tokens
        sequences = torch.tensor(rows, dtype=torch.int32)
        self._held = positions, table, sequences
        addresses = positions.data_ptr(), table.data_ptr(), sequences.data_ptr()
        self._step = _Step(*addresses, None, None, start, len(spans), width)
        self._address = ctypes.addressof(self._step)
        self._embeddings: tuple[Tensor, Tensor] | None = None
        self._rotation: Sequence[Tensor] = ()

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
        return self._run(call, query, key, value, embeddings)

    def _run(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, embeddings: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        layer = LayerAttention.of(call, self.cache, query, key, value, out)
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        layer.sinks = None if sinks is None else sinks.data_ptr()
        self._attend(ctypes.byref(layer), self.address(embeddings))
        return out

    def address(self, embeddings: tuple[Tensor, Tensor] | None) -> int:
        """What C has to know of the step, right until the next call.

        Args:
            embeddings: as in `attend_joined`; None if queries and keys are rotated already.
        """
        if embeddings is not self._embeddings:
            self._embeddings = embeddings
            self._rotation = [part.to(self.cache.dtype).contiguous() for part in embeddings or ()]
            self._step.cos, self._step.sin = [part.data_ptr() for part in self._rotation] or (None, None)
        return self._address
