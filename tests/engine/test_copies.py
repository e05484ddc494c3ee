"""Decode copies hold what the cache holds, whoever joins, leaves, or comes back."""

import random

import torch

from server.engine.attention.copies import DecodeCopies
from server.engine.kv_cache import KVCache, LayerShape

BLOCK_SIZE, NUM_BLOCKS, DIM = 4, 200, 8
SHAPES = [LayerShape(2, DIM, DIM), LayerShape(1, DIM, DIM)]


class Sequence:
    """A sequence whose tokens' keys and values are random."""

    def __init__(self, number: int, length: int) -> None:
        self.number, self.length = number, length
        self.blocks: list[int] = []


class World:
    """Sequences in a cache, as the engine would have them."""

    def __init__(self, rng: random.Random, max_bytes: int) -> None:
        self.rng = rng
        self.cache = KVCache(SHAPES, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
        self.copies = DecodeCopies(max_bytes)
        self.free = list(range(1, NUM_BLOCKS))
        self.running: list[Sequence] = []
        self.num_made = 0
        self.num_copied = 0

    def join(self) -> None:
        sequence = Sequence(self.num_made, 0)
        self.num_made += 1
        self.running.append(sequence)
        for _ in range(self.rng.randrange(1, 30)):
            self.append(sequence)

    def leave(self) -> None:
        gone = self.running.pop(self.rng.randrange(len(self.running)))
        # What is left in its blocks is not a number; the next owner gets them zeroed, as in the engine.
        for layer in range(len(SHAPES)):
            for pool in self.cache.heads(layer):
                pool[:, gone.blocks] = torch.nan
        self.free += gone.blocks

    def append(self, sequence: Sequence) -> list[torch.Tensor]:
        """One more token; returns its keys and values by layer."""
        if sequence.length % BLOCK_SIZE == 0:
            sequence.blocks.append(self.free.pop(self.rng.randrange(len(self.free))))
            self.cache.zero(sequence.blocks[-1:])
        place = sequence.blocks[-1] * BLOCK_SIZE + sequence.length % BLOCK_SIZE
        sequence.length += 1
        made = [torch.randn(1, 2 * shape.num_kv_heads, DIM) for shape in SHAPES]
        for layer, key_value in enumerate(made):
            self.cache.write_joined(layer, torch.tensor([place]), key_value)
        return made

    def step(self) -> None:
        """Some sequences decode, in one or two groups; each group's copy must hold what the cache does."""
        decoding = self.running if self.rng.random() < 0.8 else self.running[1:]
        decoding = sorted(decoding, key=lambda sequence: sequence.length)
        tokens = {sequence.number: self.append(sequence) for sequence in decoding}
        cut = self.rng.choice([0, 0, len(decoding) // 2])
        groups = [group for group in (decoding[:cut], decoding[cut:]) if group]
        described = []
        for group in groups:
            width = max(len(sequence.blocks) for sequence in group)
            table = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in group]
            members = tuple(sequence.number for sequence in group)
            described.append((members, [sequence.length for sequence in group], torch.tensor(table)))
        made = self.copies.begin_step(self.cache, described)
        for group, copy in zip(groups, made, strict=True):
            if copy is None:
                continue
            self.num_copied += 1
            for layer, shape in enumerate(SHAPES):
                new = torch.cat([tokens[sequence.number][layer] for sequence in group])
                parts = copy.update(layer, new)
                places = range(len(group)) if copy.places is None else copy.places.tolist()
                for sequence, row in zip(group, places, strict=True):
                    assert copy.members[row] == sequence.number
                    assert copy.lengths[row] == sequence.length
                    if copy.order is not None:
                        assert group[copy.order[row]] is sequence
                    index = self.cache.index(layer, torch.tensor([sequence.blocks]))
                    for part, truth in zip(parts, self.cache.read(layer, index), strict=True):
                        heads = part[row * shape.num_kv_heads : (row + 1) * shape.num_kv_heads]
                        assert torch.equal(heads[:, : sequence.length], truth[:, : sequence.length])
                        assert heads.isfinite().all()

    def run(self, num_steps: int, max_running: int, leaving: float) -> None:
        """Steps between which sequences join, up to so many, and leave, with such a probability."""
        for _ in range(num_steps):
            while len(self.running) < 2 or (len(self.running) < max_running and self.rng.random() < 0.3):
                self.join()
            self.step()
            if self.rng.random() < leaving:
                self.leave()


def test_copies_hold_what_the_cache_holds(seed: int) -> None:
    world = World(random.Random(seed), max_bytes=1 << 30)
    world.run(120, max_running=9, leaving=0.3)
    assert world.num_copied >= 120


def test_a_copy_that_does_not_fit_is_not_made(seed: int) -> None:
    bytes_per_token = KVCache.bytes_per_token(SHAPES, torch.float32)
    world = World(random.Random(seed), max_bytes=bytes_per_token * 3 * 40)
    world.run(60, max_running=6, leaving=0.4)
    assert 0 < world.num_copied < 120
