"""A route as tensors that kernels read: which tokens want which adapters, grouped once a step for all layers.

Tokens that want the same set of adapters stand together in tiles of M; an entry is one adapter of one tile. Tokens
that want none are in no tile, so nothing touches them.

    tile     0               1               2
    tokens   | 3 4 5 9 |     | 0 1 -1 -1 |   | 7 -1 -1 -1 |     -1: nobody
    entries  (a)             (a) (b)         (c)                weights [M] each

A plan tells how many of its tiles are in use, so that one of fixed size and addresses serves every batch that fits into
it (CUDA graphs).
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from lora_core.routing import Route, Run

__all__ = ["NUM_ENTRIES", "RANKS", "PlannedRoute", "RoutePlan", "Tile", "bucket_of", "tiles_of"]

# Tokens of a tile. Tensor cores take 16 rows at least, which is plenty for decoding; prompts have longer stretches.
SMALL_TILE = 16
LARGE_TILE = 64
# From so many tokens on, tiles are large.
MANY_TOKENS = 512
# A part of a plan's buffer begins at a multiple of so many numbers, 16 bytes: for pointers that are aligned so Triton
# compiles one variant of a kernel, for others another.
ALIGNED = 4
# Ranks, and numbers of entries by size of tile, for which launch parameters are measured (`lora_core.ops.tuning`).
RANKS = (16, 64, 128)
NUM_ENTRIES = {SMALL_TILE: (1, 8, 32), LARGE_TILE: (8, 64)}


@dataclass(frozen=True, slots=True)
class Tile:
    """At most M tokens that want the same adapters.

    Attributes:
        slots: the adapters' slots.
        tokens: places in the batch.
        weights: for each slot, those of the tokens.
    """

    slots: tuple[int, ...]
    tokens: list[int]
    weights: list[list[float]]


def tiles_of(route: Route, num_tokens: int, tile_tokens: int, max_slots: int) -> list[Tile]:
    """Group a route's tokens into tiles, those of one set of adapters side by side.

    Args:
        num_tokens: a multiple of the route's rows; each row stands for as many tokens.
        max_slots: what is no slot below it, nobody has.
    """
    per_row = num_tokens // max(route.num_rows, 1)
    groups: dict[tuple[int, ...], tuple[list[int], list[list[float]]]] = {}
    start = 0
    for weights, num_rows in route.runs:
        stop = start + num_rows * per_row
        slots = tuple(sorted(slot for slot, weight in weights.items() if weight and 0 <= slot < max_slots))
        if slots and stop > start:
            tokens, columns = groups.setdefault(slots, ([], [[] for _ in slots]))
            tokens += range(start, stop)
            for column, slot in zip(columns, slots, strict=True):
                column.extend([float(weights[slot])] * (stop - start))
        start = stop
    return [
        Tile(slots, tokens[i : i + tile_tokens], [column[i : i + tile_tokens] for column in columns])
        for slots, (tokens, columns) in sorted(groups.items())
        for i in range(0, len(tokens), tile_tokens)
    ]


def bucket_of(num_entries: int, tile_tokens: int, rank: int) -> tuple[int, int, int]:
    """What is measured in place of a plan: (entries, tokens of a tile, highest rank), the next ones or the last."""
    numbers = NUM_ENTRIES[tile_tokens]
    entries = next((number for number in numbers if number >= num_entries), numbers[-1])
    return entries, tile_tokens, next((each for each in RANKS if each >= rank), RANKS[-1])


class RoutePlan:
    """Tensors on the device, views of one buffer.

    Args:
        num_tiles, num_entries, num_tokens: capacity, C, E and T.
        tile_tokens: M, a power of two, at least 16.

    Attributes:
        counts: [2] int32, the tiles and entries in use.
        flags: [T] int32, of each token of a batch: 0 it is in no tile, 1 in one, 2 in one with an adapter with gains.
        tokens: [C, M] int32, -1 for nobody.
        starts: [C + 1] int32; the entries of tile c are [starts[c], starts[c + 1]).
        tile_slots: [C] int32, of their first ones.
        entry_tiles, entry_slots: [E] int32.
        weights: [E, M] float32.
    """

    def __init__(
        self, num_tiles: int, num_entries: int, tile_tokens: int, device: torch.device, num_tokens: int
    ) -> None:
        self.num_tiles, self.num_entries, self.tile_tokens = num_tiles, num_entries, tile_tokens
        sizes = [2, num_tokens, num_tiles * tile_tokens, num_tiles + 1, num_tiles, num_entries, num_entries]
        sizes.append(num_entries * tile_tokens)
        self._sizes = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        self._buffer = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        parts = [part[:size] for part, size in zip(self._buffer.split(self._sizes), sizes, strict=True)]
        self.counts, self.flags, self.tokens, self.starts, self.tile_slots = parts[:5]
        self.entry_tiles, self.entry_slots = parts[5:7]
        self.weights = parts[7].view(torch.float32)

    @classmethod
    def of(
        cls,
        route: Route,
        num_tokens: int,
        max_slots: int,
        device: torch.device,
        gained: Collection[int] = (),
    ) -> "RoutePlan":
        """A plan that is just large enough for a route of `num_tokens` tokens; `gained` as for `fill`."""
        tile_tokens = SMALL_TILE if num_tokens < MANY_TOKENS else LARGE_TILE
        tiles = tiles_of(route, num_tokens, tile_tokens, max_slots)
        plan = cls(len(tiles), sum(len(tile.slots) for tile in tiles), tile_tokens, device, num_tokens)
        plan.fill(tiles, gained)
        return plan

    def fits(self, tiles: list[Tile]) -> bool:
        """The plan has room for them."""
        return len(tiles) <= self.num_tiles and sum(len(tile.slots) for tile in tiles) <= self.num_entries

    def fill(self, tiles: list[Tile], gained: Collection[int] = ()) -> None:
        """Write tiles that fit into the plan, in one copy; what is left over is nobody's.

        Args:
            gained: slots whose adapters have gains.
        """
        assert self.fits(tiles)
        size = self.tile_tokens
        flags = [0] * self.flags.shape[0]
        tokens: list[int] = []
        starts = [0]
        entry_tiles: list[int] = []
        entry_slots: list[int] = []
        weights: list[float] = []
        for number, tile in enumerate(tiles):
            num_blank = size - len(tile.tokens)
            tokens += tile.tokens + [-1] * num_blank
            entry_tiles += [number] * len(tile.slots)
            entry_slots += tile.slots
            starts.append(len(entry_slots))
            flag = 2 if any(slot in gained for slot in tile.slots) else 1
            for token in tile.tokens:
                flags[token] = flag
            for column in tile.weights:
                weights += column + [0.0] * num_blank
        integers: list[int] = []
        counts = [len(tiles), len(entry_slots)]
        tile_slots = [tile.slots[0] for tile in tiles]
        lists = counts, flags, tokens, starts, tile_slots, entry_tiles, entry_slots
        parts = zip(lists, (0, 0, -1, starts[-1], 0, 0, 0), strict=True)
        for (values, blank), part_size in zip(parts, self._sizes, strict=False):  # weights are no integers
            integers += values + [blank] * (part_size - len(values))
        weights += [0.0] * (self._sizes[-1] - len(weights))
        host = torch.empty(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        host[: len(integers)] = torch.tensor(integers, dtype=torch.int32)
        host[len(integers) :].view(torch.float32).copy_(torch.tensor(weights, dtype=torch.float32))
        self._buffer.copy_(host, non_blocking=True)


class PlannedRoute(Route):
    """A route of fixed size whose contents are in a plan, and change from step to step without the layers' knowledge.

    Only linear layers whose adapters are in a table on the device can follow it; all others see the base model, so
    that whoever uses it makes sure that no adapter in the plan touches them.

    Args:
        max_rank: the highest rank that an adapter in the plan may have.
    """

    def __init__(self, num_rows: int, plan: RoutePlan, max_rank: int) -> None:
        super().__init__([Run({}, num_rows)])
        self.plan = plan
        self.max_rank = max_rank

    @property
    def is_base(self) -> bool:
        return not self.plan.num_tiles
