"""Compile launch parameters that tuning may try, for NVIDIA GPUs: `python -m tests.engine.compile_candidates COUNT`.

There are some thousands; each run takes other ones, of those whose bound is what a GPU has: is it a bound?
"""

import itertools
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

from tests.engine.compile_kernels import DTYPES, SHARED_BYTES, Launch, _split, expand_launch, shrink_launch

__all__ = ["main"]


def _combinations(start: Any, options: Any) -> list[Any]:
    from dataclasses import replace

    return [replace(start, **dict(zip(options, each, strict=True))) for each in itertools.product(*options.values())]


def candidates(dtype: str) -> Iterator[tuple[int, Launch]]:
    """Each with its bound."""
    from lora_core.device_slots import FIELDS
    from lora_core.ops import launch as configs
    from lora_core.ops.plan import LARGE_TILE, SMALL_TILE
    from lora_core.ops.tuning import EXPAND_OPTIONS, SHRINK_OPTIONS, expand_bytes, shrink_bytes

    itemsize = DTYPES[dtype].itemsize
    for tile_tokens, block_r in itertools.product((SMALL_TILE, LARGE_TILE), configs.RANK_BLOCKS):
        own = {"NUM_FIELDS": FIELDS, "WIDEN": False, "M": tile_tokens}
        for shrink in _combinations(configs.ShrinkConfig(block_r, 64, 1, 4, 2), SHRINK_OPTIONS):
            yield shrink_bytes(shrink, tile_tokens, itemsize), shrink_launch(f"{dtype} {shrink}", dtype, shrink, own)
        for expand in _combinations(configs.ExpandConfig(block_r, 64, 4, 2), EXPAND_OPTIONS):
            flags = {"HAS_BASE_BIAS": True, "IS_ALIGNED": True, "IN_PLACE": bool(random.getrandbits(1))}
            launch = expand_launch(f"{dtype} {expand} {flags}", dtype, expand, own | flags)
            yield expand_bytes(expand, tile_tokens, itemsize), launch


def attention_candidates(dtype: str) -> Iterator[tuple[int, Launch]]:
    from server.engine.attention import kernels
    from server.engine.attention.device import ATTEND_OPTIONS, PROMPT_QUERIES

    pool = f"*{dtype}"
    types = dict.fromkeys(("query", "keys", "values", "sinks", "out", "sums"), pool)
    types |= {"fields": "*i32", "blocks": "*i32"}
    for dim, group, num_queries in itertools.product((64, 96, 128, 256), (1, 4, 8), (1, PROMPT_QUERIES)):
        rows, block = kernels.num_rows(num_queries, group), kernels._block(dim)
        shape = {"BLOCK_SIZE": 16, "DIM": dim, "VALUE_DIM": dim, "BLOCK_DIM": block, "BLOCK_VALUE_DIM": block}
        flags = dict.fromkeys(("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS"), False)
        for config in _combinations(kernels.AttendConfig(16, 4, 2), ATTEND_OPTIONS):
            constants, launch = _split(config)
            constants |= shape | flags | {"GROUP": group, "ROWS": rows, "SPLITS": 1, "WIDEN": False}
            bound = config.shared_bytes(DTYPES[dtype].itemsize, rows, dim, dim)
            kind = f"attend {dtype} {constants}"
            yield bound, Launch(kind, kernels._attend, types, constants, ("scaling", "softcap"), **launch)


def main(count: int) -> None:
    """Prints a line for each of `count` candidates of each kernel."""
    random.seed(seed := random.SystemRandom().randrange(1 << 30))
    print(f"seed {seed}")
    for capability, limit in SHARED_BYTES.items():
        found = [each for dtype in DTYPES for each in (*candidates(dtype), *attention_candidates(dtype))]
        for kernel in ("shrink", "expand", "attend"):
            fitting = [(bound, launch) for bound, launch in found if launch.kind.startswith(kernel) and bound <= limit]
            for bound, launch in random.sample(fitting, count):
                shared, _, _ = launch.compile(capability)
                word = "fits" if shared <= bound else "FAULT"
                print(f"{word}: sm_{capability} {launch.kind}: {shared} bytes of at most {bound}", flush=True)


if __name__ == "__main__":
    assert os.environ.pop("TRITON_INTERPRET", None) in {None, "1"}  # set for the tests
    main(int(sys.argv[1]))
