"""The pool of KV-cache blocks: plain bookkeeping, no tensors."""

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
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._is_free = [False] + [True] * (num_blocks - 1)

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
        """Take `count` blocks; the caller has checked `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back, each exactly once."""
        for block in reversed(blocks):
            if block == NULL_BLOCK or self._is_free[block]:
                raise ValueError(f"block {block} is not allocated")
            self._is_free[block] = True
            self._free.append(block)

    def check_integrity(self, in_use: list[int]) -> None:
        """Assert that every block is either free or in `in_use`, once."""
        assert sorted(self._free + in_use) == list(range(1, self.num_blocks)), "blocks lost or shared"
        assert all(self._is_free[block] for block in self._free)
