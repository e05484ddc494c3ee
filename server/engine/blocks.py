"""The pool of KV-cache blocks: plain bookkeeping, no tensors.

A block belongs to one sequence, or to several that begin with the same tokens. A full block whose content is known by
a key keeps it when its last owner leaves: it is free, but found again by the key until somebody needs the room. Free
blocks without a key are given out first, then those that nobody has used for longest.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence

__all__ = ["NULL_BLOCK", "BlockPool"]

# Never allocated and always zero: pads the block tables of short sequences.
NULL_BLOCK = 0


class BlockPool:
    """Fixed number of blocks of `block_size` tokens each.

    Args:
        num_blocks: blocks in all, the null block included.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError("a pool needs the null block, one more, and at least one token per block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to go first
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, whatever they held; the caller has checked `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._num_owners[block] = 1
            self._forget(block)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """End one owner's claim on each of these blocks."""
        for block in reversed(blocks):  # the start of a sequence is likeliest to be wanted again: it goes last
            if block == NULL_BLOCK or not self._num_owners[block]:
                raise ValueError(f"block {block} is not allocated")
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._keys)

    def publish(self, block: int, key: bytes) -> None:
        """Say what an allocated, full block holds; the first block with a key keeps it."""
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of keys, from the first on, that are there."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of these blocks, free or not, which `find` has found."""
        for block in blocks:
            if not self._num_owners[block]:
                del self._free[block]
            self._num_owners[block] += 1

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of these blocks have no owner."""
        return sum(not self._num_owners[block] for block in blocks)

    def check_integrity(self, in_use: Sequence[int]) -> None:
        """Assert that every block is either free or owned as often as `in_use` has it, and that the keys agree."""
        counts = Counter(in_use)
        assert set(self._free) | set(counts) == set(range(1, self.num_blocks)), "blocks lost"
        assert all(counts[block] == self._num_owners[block] for block in range(self.num_blocks)), (
            "blocks lost or shared"
        )
        assert all((block in self._free) == (counts[block] == 0) for block in range(1, self.num_blocks))
        assert self._by_key == {key: block for block, key in self._keys.items()}

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]
