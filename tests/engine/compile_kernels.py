"""Compile every kernel for NVIDIA GPUs, which needs none: `python -m tests.engine.compile_kernels DTYPE CAPABILITY …`.

The interpreter runs kernels as Python. What it lets pass (types that change in a loop, shapes that are no power of two)
shows here, and so does what the default launch parameters ask of a GPU: shared memory beyond what the smallest has, and
registers beyond what there are, which the compiler would spill to memory.
"""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["SHARED_BYTES", "compile_all"]

# What one program may have of shared memory: A100; L4 and RTX 4090; H100.
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of a thread's bytes: ptxas stops at 128 registers where two programs then run side by side, at the price of a few.
MAX_SPILLED_BYTES = 128
CONFIG_FIELDS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched.

    Attributes:
        kind: for people.
        pointers: types by argument; arguments that are neither pointers nor constants are 32-bit integers.
    """

    kind: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    def compile(self, capability: int) -> tuple[int, int, int]:
        """Returns bytes of shared memory, registers of a thread, and bytes that are spilled."""
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        assert not self.pointers.keys() - set(names)
        signature = {
            name: "constexpr"
            if name in self.constants
            else self.pointers.get(name, "fp32" if name in self.floats else "i32")
            for name in names
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if signature[name] not in ("constexpr", "fp32") and name not in ("num_tokens", "window", "group_size")
        }
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=self.constants, attrs=aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        log = io.StringIO()
        with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.nvidia.dump_ptxas_log = True
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["ptx"]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
        registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())))
        return made.metadata.shared, registers, spilled


def adapters(dtype: str) -> Iterator[Launch]:
    """At the defaults for layers of an 8B model."""
    from lora_core.device_slots import FIELDS
    from lora_core.ops import triton as kernels
    from lora_core.ops.plan import LARGE_TILE, SMALL_TILE, RoutePlan

    plan_types = dict.fromkeys(("layers", "tokens", "entry_slots"), "*i32")
    table = {"h": "*fp32", "table": "*i64", "weights": "*fp32"}
    lists = dict.fromkeys(("member_starts", "member_sizes", "tile_starts"), "*i32")
    outputs = {"y": f"*{dtype}", "base_bias": f"*{dtype}"}
    for tile_tokens, num_entries in ((SMALL_TILE, 8), (LARGE_TILE, 8), (LARGE_TILE, LARGE_TILE + 1)):
        plan = RoutePlan(num_entries, num_entries, tile_tokens, torch.device("cpu"))
        for rank in kernels.RANK_BLOCKS:
            shrink = kernels.ShrinkConfig.default(plan, 4_096, rank, DTYPES[dtype].itemsize)
            own = {"NUM_FIELDS": FIELDS, "WIDEN": False, "M": tile_tokens, "SPLIT_K": shrink.split_k}
            constants, launch = _split(shrink)
            types = {"x": f"*{dtype}", "entry_tiles": "*i32"} | plan_types | table
            kind = f"{dtype} tiles of {tile_tokens}, rank {rank}, {shrink.split_k} splits"
            yield Launch(f"shrink {kind}", kernels._shrink, types, own | constants, **launch)
            expand = kernels.ExpandConfig.default(plan, 14_336, rank, DTYPES[dtype].itemsize)
            constants, launch = _split(expand)
            flags = {"HAS_BASE_BIAS": rank > SMALL_TILE, "IS_ALIGNED": rank < LARGE_TILE}
            types = outputs | lists | plan_types | table
            yield Launch(f"expand {kind}", kernels._expand, types, own | flags | constants, **launch)


def attention(dtype: str) -> Iterator[Launch]:
    """At the defaults, for heads of all usual sizes, alone and in groups of four and eight."""
    from server.engine.attention import kernels
    from server.engine.attention.device import PROMPT_QUERIES

    pool = f"*{dtype}"
    types = dict.fromkeys(("keys", "values", "key", "value"), pool) | {"positions": "*i64"}
    yield Launch(f"store {dtype}", kernels._store, types, {"DIM": 128, "VALUE_DIM": 128, "BLOCK_DIM": 128})
    for dim, group, (num_queries, splits, is_special) in itertools.product(
        (64, 96, 128, 256), (1, 4, 8), ((PROMPT_QUERIES, 1, False), (1, 1, True), (1, 4, False))
    ):
        if dim == 256 and group == 8 and dtype == "fp32":  # the queries alone take 128 KiB
            continue
        types = dict.fromkeys(("query", "keys", "values", "sinks"), pool) | {"fields": "*i32", "blocks": "*i32"}
        types |= {"out": pool if splits == 1 else "*fp32", "sums": pool if splits == 1 else "*fp32"}
        rows = kernels.num_rows(num_queries, group)
        config = kernels.AttendConfig.default(DTYPES[dtype].itemsize, rows, dim, dim)
        block = kernels._block(dim)
        shape = {"BLOCK_SIZE": 16, "DIM": dim, "VALUE_DIM": dim, "BLOCK_DIM": block, "BLOCK_VALUE_DIM": block}
        flags = dict.fromkeys(("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS"), is_special)
        constants, launch = _split(config)
        own = {"GROUP": group, "ROWS": rows, "SPLITS": splits, "WIDEN": False}
        kind = f"attend {dtype} {num_queries} queries of {group} heads of {dim}, {splits} splits"
        yield Launch(kind, kernels._attend, types, shape | flags | own | constants, ("scaling", "softcap"), **launch)
    types = {"parts": "*fp32", "sums": "*fp32", "fields": "*i32", "out": pool}
    constants = {"VALUE_DIM": 96, "BLOCK_VALUE_DIM": 128, "SPLITS": 4}
    yield Launch(f"join {dtype}", kernels._join, types, constants, num_warps=1)


def _split(config: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """A config's constants and its launch options."""
    fields = asdict(config)
    launch = {name: fields.pop(name) for name in CONFIG_FIELDS}
    fields.pop("split_k", None)
    return {name.upper(): value for name, value in fields.items()}, launch


def compile_all(forms: Iterable[tuple[str, int]]) -> None:
    """Prints a line for each kernel in each dtype and for each capability, and what is wrong with it."""
    for dtype, capability in forms:
        for launch in itertools.chain(adapters(dtype), attention(dtype)):
            shared, registers, spilled = launch.compile(capability)
            faults = ["too much shared memory"] * (shared > SHARED_BYTES[capability]) + ["spills"] * (
                spilled > MAX_SPILLED_BYTES
            )
            print(
                f"{'FAULT: ' + ', '.join(faults) if faults else 'fits'}: sm_{capability} {launch.kind}: "
                f"{shared} bytes shared, {registers} registers, {spilled} bytes spilled",
                flush=True,
            )


if __name__ == "__main__":
    assert os.environ.pop("TRITON_INTERPRET", None) in {None, "1"}  # set for the tests
    compile_all(zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True))
