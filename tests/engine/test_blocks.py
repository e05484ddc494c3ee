"""The block pool never loses a block and never gives one to two owners."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.blocks import NULL_BLOCK, BlockPool


class Pool(RuleBasedStateMachine):
    """Owners take and give back blocks at random."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.owned: list[list[int]] = []

    @property
    def in_use(self) -> list[int]:
        return [block for blocks in self.owned for block in blocks]

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        before = set(self.in_use)
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count
        assert not set(taken) & (before | {NULL_BLOCK})
        self.owned.append(taken)

    @rule(excess=st.integers(1, 3))
    def ask_for_too_many(self, excess: int) -> None:
        with pytest.raises(ValueError, match="wanted"):
            self.pool.allocate(self.pool.num_free + excess)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.free(blocks)
        if blocks:
            with pytest.raises(ValueError, match="not allocated"):
                self.pool.free(blocks[-1:])

    @rule()
    def free_the_null_block(self) -> None:
        with pytest.raises(ValueError, match="not allocated"):
            self.pool.free([NULL_BLOCK])

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.in_use)
            assert self.pool.num_free + len(self.in_use) == self.pool.num_usable


TestPool = Pool.TestCase


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (2, 0)])
def test_a_pool_that_can_hold_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="pool"):
        BlockPool(num_blocks, block_size)


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, 3)
    assert [pool.blocks_for(n) for n in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("in_use", [[1], [1, 2, 2], [1, 2, 3], [NULL_BLOCK, 1, 2]])
def test_check_integrity_notices_lost_and_shared_blocks(in_use: list[int]) -> None:
    pool = BlockPool(5, 1)
    assert sorted(pool.allocate(2)) == [1, 2]
    with pytest.raises(AssertionError):
        pool.check_integrity(in_use)
