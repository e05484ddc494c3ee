"""Keys and values of all running sequences, in blocks of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.blocks import NULL_BLOCK

__all__ = ["KVCache", "LayerShape"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class KVCache:
    """Key and value tensors of every layer, [num_kv_heads, num_blocks, block_size, dim].

    Heads come first, so that the blocks of some sequences are copied straight into the form in which a batched product
    takes them. Where keys and values are equally wide they are one tensor, written and read in one operation each.

    The memory is reserved at once and touched as blocks come into use. `PagedAttention` has a block zeroed before it is
    read by a new owner: it multiplies what lies behind a sequence's end by zero, which is only zero if no NaN is left
    there. `NativeAttention` reads nothing behind the end, and keeps a block's keys transposed, [dim, block_size].
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers = list(layers)

        def allocate(num_heads: int, dim: int) -> Tensor:
            pool = torch.empty(num_heads, num_blocks, block_size, dim, dtype=dtype, device=device)
            pool[:, NULL_BLOCK].zero_()  # every other block is zeroed when it is first used
            return pool

        self._pools: list[tuple[Tensor, ...]] = [
            (allocate(2 * layer.num_kv_heads, layer.key_dim),)
            if layer.key_dim == layer.value_dim
            else (allocate(layer.num_kv_heads, layer.key_dim), allocate(layer.num_kv_heads, layer.value_dim))
            for layer in layers
        ]
        self._heads: list[tuple[Tensor, Tensor]] = [
            (pools[0], pools[1])
            if len(pools) == 2
            else (pools[0][: len(pools[0]) // 2], pools[0][len(pools[0]) // 2 :])
            for pools in self._pools
        ]

    @property
    def device(self) -> torch.device:
        return self._pools[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._pools[0][0].dtype

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        return sum(layer.num_elements for layer in layers) * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pools in self._pools for t in pools)

    def zero(self, blocks: Sequence[int]) -> None:
        """Forget what `blocks` held."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self._pools[0][0].device)
        for pools in self._pools:
            for pool in pools:
                pool.index_fill_(1, index, 0.0)

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store new tokens.

        Args:
            positions: [T] token positions in the pool: block · block_size + offset.
            key, value: [T, num_kv_heads, dim].
        """
        parts = (torch.cat([key, value], dim=1),) if len(self._pools[layer]) == 1 else (key, value)
        for pool, part in zip(self._pools[layer], parts, strict=True):
            pool.flatten(1, 2).index_copy_(1, positions, part.transpose(0, 1))

    def write_joined(self, layer: int, positions: Tensor, key_value: Tensor) -> None:
        """The same for keys and values in one tensor, [T, 2·num_kv_heads, dim], keys first; they are equally wide."""
        (pool,) = self._pools[layer]
        pool.flatten(1, 2).index_copy_(1, positions, key_value.transpose(0, 1))

    def heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """The pools of a layer's keys and values themselves, each [num_kv_heads, num_blocks, block_size, dim]."""
        return self._heads[layer]

    @property
    def num_bytes_per_token(self) -> int:
        return self.bytes_per_token(self._layers, self._pools[0][0].dtype)

    @property
    def is_joined(self) -> bool:
        """Every layer keeps keys and values in one tensor."""
        return all(len(pools) == 1 for pools in self._pools)

    def shape(self, layer: int) -> LayerShape:
        return self._layers[layer]

    def index(self, layer: int, blocks: Tensor) -> Tensor:
        """Where the heads of a layer keep the blocks of some sequences; the same for all layers of equal shape.

        Args:
            blocks: [N, B] block table, padded with the null block.

        Returns:
            [P, N·num_kv_heads, B], with P = 2 where keys and values are one tensor, else 1.
        """
        num_kv_heads = self._layers[layer].num_kv_heads
        heads = torch.arange(self._pools[layer][0].shape[0], device=blocks.device).view(-1, 1, num_kv_heads, 1)
        index = heads * self.num_blocks + blocks[None, :, None, :]
        return index.view(index.shape[0], -1, blocks.shape[1])

    def read_joined(self, layer: int, index: Tensor) -> Tensor:
        """The same in one tensor [2, N·num_kv_heads, B·block_size, dim]; for layers that keep them in one."""
        (pool,) = self._pools[layer]
        return pool.flatten(2).flatten(0, 1).index_select(0, index.flatten()).view(*index.shape[:2], -1, pool.shape[-1])

    def read(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values, each [N·num_kv_heads, B·block_size, dim]; `index` as `index` gives it."""
        if len(self._pools[layer]) == 1:
            joined = self.read_joined(layer, index)
            return joined[0], joined[1]
        keys, values = (
            pool.flatten(2).flatten(0, 1).index_select(0, index.flatten()).view(index.shape[1], -1, pool.shape[-1])
            for pool in self._pools[layer]
        )
        return keys, values

    def check_integrity(self) -> None:
        """Assert that nobody wrote into the null block."""
        assert not any(bool(pool[:, NULL_BLOCK].any()) for pools in self._pools for pool in pools)
