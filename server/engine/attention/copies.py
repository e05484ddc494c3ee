"""Keys and values of sequences that decode together, kept side by side from step to step.

Attention needs the blocks of a group of sequences in one tensor. Copying them there anew at every step moves all keys
and values twice more than computing with them does. A copy lacks one token of each sequence that it had in the step
before, so only that is written; a sequence that joins is read from the cache, and the last one moves into the place of
one that has left. The blocks in the cache stay the truth: a copy can be dropped at any time, and is when its group
outgrows it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.kv_cache import KVCache, LayerShape

__all__ = ["DecodeCopies", "DecodeCopy"]

# A copy grows by so many blocks: a copy of all of it, and another compiled product, each time.
BLOCKS_AT_ONCE = 2
# A copy is made with room for so many more sequences, in parts of what it begins with.
SPARE_SEQUENCES = 1 / 2
# It is dropped when it has room for so many times the sequences that are left, ...
MAX_EMPTINESS = 4
# ... and shortened when its rows are so many times as long as the longest sequence.
MAX_LENGTH = 1.25


class DecodeCopy:
    """One group's copies, one tensor [2, R, Hkv, L, D] per layer, of which the first N rows are in use.

    Products read it as it lies in memory, so all rows are as long as the longest sequence, rounded up. Behind its own
    end a row holds zeros, or what was its own: nothing that is not finite.

    Args:
        num_rows: R, sequences that it has room for.

    Attributes:
        members: the sequences in the order of the rows, told apart by numbers that are their own while they live.
        lengths: of these, their new tokens included.
        num_keys: L.
        order: [N] for each row, which of the step's sequences it is; None where they are in the same order.
        places: [N] for each of the step's sequences, its row; None where they are in the same order.
    """

    def __init__(self, cache: KVCache, num_rows: int) -> None:
        self.num_rows = num_rows
        self.members: list[int] = []
        self.lengths: list[int] = []
        self.num_keys = 0
        self.order: Tensor | None = None
        self.places: Tensor | None = None
        self._cache = cache
        self._layers: dict[int, Tensor] = {}
        # What this step does to every layer's tensor, in this order.
        self._moves: list[tuple[int, int]] = []
        self._num_stayed = 0
        self._joined_blocks = torch.empty(0, 0)
        self._indices: dict[LayerShape, Tensor] = {}
        self._new_rows: dict[int, Tensor] = {}
        self._rows = torch.empty(0)

    def num_shared(self, members: Sequence[int], lengths: Sequence[int]) -> int:
        """How many of these sequences it holds but for their new token."""
        known = dict(zip(self.members, self.lengths, strict=True))
        return sum(known.get(member) == length - 1 for member, length in zip(members, lengths, strict=True))

    def next_num_keys(self, lengths: Sequence[int]) -> int:
        """L for a step with sequences of these lengths."""
        unit = BLOCKS_AT_ONCE * self._cache.block_size
        wanted = -(-max(lengths) // unit) * unit
        return self.num_keys if wanted <= self.num_keys <= MAX_LENGTH * wanted else wanted

    def num_bytes(self, lengths: Sequence[int]) -> int:
        """What it takes in such a step."""
        return self.num_rows * self.next_num_keys(lengths) * self._cache.num_bytes_per_token

    def advance(self, members: Sequence[int], lengths: Sequence[int], blocks: Tensor) -> None:
        """Begin a step of N sequences with these lengths and block tables [N, B], for which there is room."""
        now = dict(zip(members, lengths, strict=True))
        self._moves = []
        for row in reversed(range(len(self.members))):
            if now.get(self.members[row]) != self.lengths[row] + 1:
                last = len(self.members) - 1
                if row != last:
                    self._moves.append((row, last))
                self.members[row] = self.members[last]
                self.lengths[row] = self.lengths[last]
                del self.members[last], self.lengths[last]
        self._num_stayed = len(self.members)
        known = set(self.members)
        joined = [i for i, member in enumerate(members) if member not in known]
        self.members += [members[i] for i in joined]
        self.lengths = [now[member] for member in self.members]
        self.num_keys = self.next_num_keys(lengths)
        num_blocks = self.num_keys // self._cache.block_size
        self._joined_blocks = torch.nn.functional.pad(blocks[joined], (0, num_blocks - blocks.shape[1]))
        self._indices.clear()
        self._new_rows.clear()
        row_of = {member: row for row, member in enumerate(self.members)}
        rows = [row_of[member] for member in members]
        self._rows = torch.tensor(rows, device=blocks.device)
        is_same = rows == list(range(len(rows)))
        self.places = None if is_same else self._rows
        self.order = None if is_same else self._rows.argsort()

    def update(self, layer: int, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Bring a layer's copy up to date; the cache has the new tokens already.

        Args:
            key_value: [N, 2·Hkv, D] of the new tokens, in the step's order.

        Returns:
            keys and values, each [N·Hkv, L, D], views in the order of the rows.
        """
        num_kv_heads, dim = key_value.shape[1] // 2, key_value.shape[2]
        copy = self._layers.get(layer)
        if copy is None:
            copy = key_value.new_empty((2, self.num_rows, num_kv_heads, self.num_keys, dim))
        for row, source in self._moves:
            copy[:, row] = copy[:, source]
        if copy.shape[3] != self.num_keys:
            copy = self._resized(copy)
        self._layers[layer] = copy
        num_sequences = len(self.members)
        if self._num_stayed:
            copy.view(-1, dim).index_copy_(0, self._new_places(num_kv_heads), key_value.reshape(-1, dim))
        if self._num_stayed < num_sequences:
            joined = self._cache.read_joined(layer, self._index(layer))
            copy[:, self._num_stayed : num_sequences] = joined.view(2, -1, *copy.shape[2:])
        in_use = copy.flatten(1, 2)[:, : num_sequences * num_kv_heads]
        return in_use[0], in_use[1]

    def _resized(self, copy: Tensor) -> Tensor:
        """The same with rows of `num_keys` tokens."""
        num_kept = min(copy.shape[3], self.num_keys)
        out = copy.new_empty((*copy.shape[:3], self.num_keys, copy.shape[4]))
        out[:, : self._num_stayed, :, :num_kept] = copy[:, : self._num_stayed, :, :num_kept]
        out[:, : self._num_stayed, :, num_kept:] = 0.0
        return out

    def _index(self, layer: int) -> Tensor:
        """Where the cache has the sequences that join."""
        shape = self._cache.shape(layer)
        if shape not in self._indices:
            self._indices[shape] = self._cache.index(layer, self._joined_blocks)
        return self._indices[shape]

    def _new_places(self, num_kv_heads: int) -> Tensor:
        """[N·2·Hkv] where the new tokens go, among all rows of D numbers of a copy."""
        if num_kv_heads not in self._new_rows:
            device = self._rows.device
            lengths = torch.tensor(self.lengths, device=device)[self._rows]
            sides = torch.arange(2, device=device)[None, :, None]
            heads = torch.arange(num_kv_heads, device=device)[None, None, :]
            owner = (sides * self.num_rows + self._rows[:, None, None]) * num_kv_heads + heads
            self._new_rows[num_kv_heads] = (owner * self.num_keys + lengths[:, None, None] - 1).flatten()
        return self._new_rows[num_kv_heads]


class DecodeCopies:
    """The copies of the groups of the last step.

    Args:
        max_bytes: for all of them together; a group that does not fit has none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._copies: list[DecodeCopy] = []

    def begin_step(
        self, cache: KVCache, groups: Sequence[tuple[tuple[int, ...], Sequence[int], Tensor]]
    ) -> list[DecodeCopy | None]:
        """For each group of members, lengths and blocks [N, B]: its copy, an old one brought forward or a new one."""
        old, self._copies = self._copies, []
        room = self._max_bytes
        out: list[DecodeCopy | None] = []
        for members, lengths, blocks in groups:
            copy = max(old, key=lambda copy: copy.num_shared(members, lengths), default=None)
            if copy is not None and self._serves(copy, members, lengths) and copy.num_bytes(lengths) <= room:
                old.remove(copy)
            else:
                sizes = (math.ceil(len(members) * (1 + SPARE_SEQUENCES)), len(members))
                made = (DecodeCopy(cache, num_rows) for num_rows in sizes if cache.is_joined)
                copy = next((copy for copy in made if copy.num_bytes(lengths) <= room), None)
            out.append(copy)
            if copy is not None:
                room -= copy.num_bytes(lengths)
                copy.advance(members, lengths, blocks)
                self._copies.append(copy)
        return out

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    @staticmethod
    def _serves(copy: DecodeCopy, members: Sequence[int], lengths: Sequence[int]) -> bool:
        is_empty = copy.num_rows > MAX_EMPTINESS * (len(members) + 1)
        return len(members) <= copy.num_rows and not is_empty and copy.num_shared(members, lengths) > 0
