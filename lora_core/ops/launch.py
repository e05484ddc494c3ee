"""Launch parameters of the adapters' kernels (`lora_core.ops.triton`), and what they are when nothing was measured."""

from dataclasses import dataclass

from lora_core.ops.plan import LARGE_TILE, RoutePlan

__all__ = ["RANK_BLOCKS", "ExpandConfig", "LaunchConfigs", "ShrinkConfig"]

# Input features that one program of a split sums over, in decoding; and ranks that one product takes at once.
SPLIT_FEATURES, MAX_SPLITS = 512, 8
RANK_BLOCKS = (16, 32, 64)
# In decoding, whose recorded steps know only the highest rank that there may be, most adapters have few.
MOST_RANKS = 32


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """Launch parameters of the shrink kernel."""

    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, plan: RoutePlan, in_features: int, rank: int, itemsize: int) -> "ShrinkConfig":
        """For a plan and the highest rank. Small tiles split the input features: there would be few programs."""
        block_k = min(128 if itemsize < 4 else 64, max(16, _power_of_2(in_features)))
        splits = min(MAX_SPLITS, _power_of_2(-(-in_features // SPLIT_FEATURES)))
        if plan.tile_tokens == LARGE_TILE:
            splits = min(splits, 4) if plan.num_entries <= LARGE_TILE else 1
        return cls(
            _rank_block(plan, rank),
            block_k,
            splits,
            4 if plan.tile_tokens == LARGE_TILE else 2,
            3 if itemsize < 4 else 2,
        )


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Launch parameters of the expand kernel."""

    block_r: int
    block_o: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, plan: RoutePlan, max_size: int, rank: int, itemsize: int) -> "ExpandConfig":
        """Large tiles have the sums of outputs and gains in the registers of eight warps."""
        is_large, is_wide = plan.tile_tokens == LARGE_TILE, itemsize >= 4
        most = 256 if not is_large and not is_wide else 64 if is_large and (is_wide or rank > 32) else 128
        block_o = min(most, max(16, _power_of_2(max_size)))
        return cls(_rank_block(plan, rank), block_o, 8 if is_large else 4, 2)


@dataclass(frozen=True, slots=True)
class LaunchConfigs:
    """Of both kernels."""

    shrink: ShrinkConfig
    expand: ExpandConfig

    @classmethod
    def default(cls, plan: RoutePlan, in_features: int, max_size: int, rank: int, itemsize: int) -> "LaunchConfigs":
        """For layers of so many inputs, the widest with `max_size` outputs."""
        return cls(
            ShrinkConfig.default(plan, in_features, rank, itemsize),
            ExpandConfig.default(plan, max_size, rank, itemsize),
        )


def _rank_block(plan: RoutePlan, rank: int) -> int:
    block = next((block for block in RANK_BLOCKS if block >= rank), RANK_BLOCKS[-1])
    return block if plan.tile_tokens == LARGE_TILE else min(block, MOST_RANKS)


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << max(0, number - 1).bit_length()
