"""Keys and values of sequences that decode together, kept side by side from step to step.

Attention needs the blocks of a group of sequences in one tensor. Copying them there anew at every step moves all keys
and values twice more than computing with them does. While the same sequences decode, the copy of the step before
lacks one token of each, so only that is written. The blocks in the cache stay the truth: a copy can be dropped at any
time, and is, when its group changes or grows out of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.kv_cache import KVCache

__all__ = ["DecodeCopies", "DecodeCopy"]

# A copy is made this many blocks longer than its sequences are.
SPARE_BLOCKS = 2


class DecodeCopy:
    """One group's copies, one tensor [2, N·Hkv, capacity, D] per layer, made when the layer first runs.

    Args:
        members: the sequences, told apart for as long as they live.
        blocks: [N, B] their block tables, padded to the copy's length.
    """

    def __init__(self, cache: KVCache, members: tuple[int, ...], blocks: Tensor) -> None:
        self.members = members
        self.lengths: Sequence[int] = ()
        self._cache = cache
        self._blocks = blocks
        self._layers: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Tokens per sequence."""
        return self._blocks.shape[1] * self._cache.block_size

    def advance(self, lengths: Sequence[int]) -> None:
        """Begin a step: the sequences have these lengths now, the new token of each included."""
        self.lengths = lengths
        self._rows.clear()

    def update(self, layer: int, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Bring a layer's copy up to date; the cache has the new tokens already.

        Args:
            key_value: [N, 2·Hkv, D] of the new tokens.

        Returns:
            keys and values, each [N·Hkv, capacity, D].
        """
        copy = self._layers.get(layer)
        if copy is None:
            copy = self._layers[layer] = self._cache.read_joined(layer, self._cache.index(layer, self._blocks))
        else:
            rows = self._new_rows(key_value.shape[1] // 2)
            copy.view(-1, copy.shape[-1]).index_copy_(0, rows, key_value.reshape(-1, copy.shape[-1]))
        return copy[0], copy[1]

    def _new_rows(self, num_kv_heads: int) -> Tensor:
        """[N·2·Hkv] where the new tokens go, among all rows of D numbers of a copy."""
        if num_kv_heads not in self._rows:
            device = self._blocks.device
            sequences = torch.arange(len(self.lengths), device=device)[:, None, None]
            sides = torch.arange(2, device=device)[None, :, None]
            heads = torch.arange(num_kv_heads, device=device)[None, None, :]
            places = torch.tensor(self.lengths, device=device)[:, None, None] - 1
            owner = (sides * len(self.lengths) + sequences) * num_kv_heads + heads
            self._rows[num_kv_heads] = (owner * self.capacity + places).flatten()
        return self._rows[num_kv_heads]


class DecodeCopies:
    """The copies of the groups of the last step.

    Args:
        max_bytes: for all of them together; a group that does not fit has none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._copies: dict[tuple[int, ...], DecodeCopy] = {}

    def begin_step(
        self, cache: KVCache, groups: Sequence[tuple[tuple[int, ...], Sequence[int], Tensor]]
    ) -> list[DecodeCopy | None]:
        """For each group of members, lengths and blocks [N, B]: its copy, an old one brought forward or a new one."""
        old, self._copies = self._copies, {}
        room = self._max_bytes
        out: list[DecodeCopy | None] = []
        for members, lengths, blocks in groups:
            copy = old.pop(members, None)
            if copy is None or not self._continues(copy, lengths):
                padded = torch.nn.functional.pad(blocks, (0, SPARE_BLOCKS))
                copy = DecodeCopy(cache, members, padded)
            num_bytes = len(members) * copy.capacity * cache.num_bytes_per_token
            if not cache.is_joined or num_bytes > room:
                out.append(None)
                continue
            room -= num_bytes
            copy.advance(lengths)
            self._copies[members] = copy
            out.append(copy)
        return out

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    @staticmethod
    def _continues(copy: DecodeCopy, lengths: Sequence[int]) -> bool:
        grown = all(new == old + 1 for new, old in zip(lengths, copy.lengths, strict=True))
        return grown and max(lengths) <= copy.capacity
