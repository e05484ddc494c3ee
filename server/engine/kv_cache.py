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
    """Key and value tensors of every layer, [num_blocks, block_size, num_kv_heads, dim].

    The memory is reserved at once and touched as blocks come into use. A block is zeroed before it is read by a new
    owner: attention multiplies what lies behind a sequence's end by zero, which is only zero if no NaN is left there.
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

        def allocate(num_heads: int, dim: int) -> Tensor:
            return torch.zeros(num_blocks, block_size, num_heads, dim, dtype=dtype, device=device)

        self.keys = [allocate(layer.num_kv_heads, layer.key_dim) for layer in layers]
        self.values = [allocate(layer.num_kv_heads, layer.value_dim) for layer in layers]

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        return sum(layer.num_elements for layer in layers) * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def zero(self, blocks: Sequence[int]) -> None:
        """Forget what `blocks` held."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, index, 0.0)

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store new tokens.

        Args:
            positions: [T] token positions in the pool: block · block_size + offset.
            key, value: [T, num_kv_heads, dim].
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, positions, key)
        self.values[layer].flatten(0, 1).index_copy_(0, positions, value)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of some sequences, copied together.

        Args:
            blocks: [N, B] block table, padded with the null block.

        Returns:
            Two views [N, num_kv_heads, B·block_size, dim].
        """
        out = []
        for pool in (self.keys[layer], self.values[layer]):
            gathered = pool.flatten(1).index_select(0, blocks.flatten())
            out.append(gathered.view(blocks.shape[0], -1, *pool.shape[2:]).transpose(1, 2))
        return out[0], out[1]

    def check_integrity(self) -> None:
        """Assert that nobody wrote into the null block."""
        assert not any(bool(t[NULL_BLOCK].any()) for t in (*self.keys, *self.values))
