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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

__all__ = ["SHARED_BYTES", "compile_all"]

# What one program may have of shared memory: A100; L4 and RTX 4090; H100.
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of a thread's bytes: ptxas stops at 128 registers where two programs then run side by side, at the price of a few.
MAX_SPILLED_BYTES = 128
UNALIGNED = ("num_tokens", "window", "group_size", "num_entries", "num_rows", "num_slots")
CONFIG_FIELDS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched.

    Attributes:
        kind: for people.
        pointers: types by argument; arguments that are neither pointers nor constants are 32-bit integers.
        own_shared_bytes: of memory that the kernel asks for itself.
    """

    kind: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    own_shared_bytes: int = 0

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
            if signature[name] not in ("constexpr", "fp32") and name not in UNALIGNED
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
        return made.metadata.shared + self.own_shared_bytes, registers, spilled


def adapters(dtype: str) -> Iterator[Launch]:
    """At the defaults for layers of an 8B model."""
    from lora_core.device_slots import FIELDS
    from lora_core.ops import launch
    from lora_core.ops.plan import LARGE_TILE, SMALL_TILE, RoutePlan

    for tile_tokens, num_entries in ((SMALL_TILE, 8), (LARGE_TILE, 8), (LARGE_TILE, LARGE_TILE + 1)):
        plan = RoutePlan(num_entries, num_entries, tile_tokens, torch.device("cpu"), tile_tokens)
        for rank in launch.RANK_BLOCKS:
            shrink = launch.ShrinkConfig.default(plan, 4_096, rank, DTYPES[dtype].itemsize)
            own = {"NUM_FIELDS": FIELDS, "WIDEN": False, "M": tile_tokens}
            kind = f"{dtype} tiles of {tile_tokens}, rank {rank}"
            yield shrink_launch(f"{kind}, {shrink.split_k} splits", dtype, shrink, own)
            expand = launch.ExpandConfig.default(plan, 14_336, rank, DTYPES[dtype].itemsize)
            for in_place in (True, False) if tile_tokens == SMALL_TILE else (True,):
                flags = {"HAS_BASE_BIAS": rank > SMALL_TILE, "IS_ALIGNED": rank < LARGE_TILE, "IN_PLACE": in_place}
                yield expand_launch(f"{kind}, in place {in_place}", dtype, expand, own | flags)


def shrink_launch(kind: str, dtype: str, config: Any, own: dict[str, Any]) -> Launch:
    """The first of the adapters' kernels."""
    from lora_core.ops import adapter_kernels as kernels

    names = ("counters", "layers", "counts", "tokens", "entry_tiles", "entry_slots")
    types = dict.fromkeys(names, "*i32") | {"table": "*i64", "weights": "*fp32", "x": f"*{dtype}", "h": f"*{dtype}"}
    types["parts"] = "*fp32" if config.split_k > 1 else f"*{dtype}"
    constants, launch = _split(config)
    return Launch(
        f"shrink {kind}", kernels.shrink_kernel, types, own | {"SPLIT_K": config.split_k} | constants, **launch
    )


def expand_launch(kind: str, dtype: str, config: Any, own: dict[str, Any]) -> Launch:
    """The second."""
    from lora_core.ops import adapter_kernels as kernels

    names = ("layers", "member_starts", "member_sizes", "counts", "flags", "tokens", "tile_starts", "tile_slots")
    types = dict.fromkeys((*names, "entry_slots"), "*i32") | {"table": "*i64", "weights": "*fp32"}
    types |= dict.fromkeys(("y", "gains", "h", "base_bias"), f"*{dtype}")
    constants, launch = _split(config)
    return Launch(f"expand {kind}", kernels.expand_kernel, types, own | constants, **launch)


def between_products(dtype: str) -> Iterator[Launch]:
    """What lies between the products of an 8B model's layers."""
    from server.engine import layer_kernels as kernels

    own = f"*{dtype}"
    delta = {"flags": "*i32", "added": own, "gains": own, "bias": own}
    for flags in ({"HAS_DELTA": False, "HAS_BIAS": False}, {"HAS_DELTA": True, "HAS_BIAS": True}):
        kind = f"{dtype} {'with' if flags['HAS_DELTA'] else 'without'} adapters"
        names = ("heads", "query_weights", "key_weights", "cos", "sin", "query", "keys", "values")
        types = delta | dict.fromkeys(names, own) | {"positions": "*i64"}
        sizes = {"DIM": 128, "BLOCK_HALF": 64, "HEADS": kernels.HEADS, "HAS_NORMS": flags["HAS_BIAS"]}
        yield Launch(f"rotate {kind}", kernels._rotate, types, flags | sizes, ("query_eps", "key_eps"))
        types = delta | dict.fromkeys(("both", "out"), own)
        yield Launch(f"gate {kind}", kernels._gate, types, flags | {"BLOCK": kernels.GATE_COLUMNS})
        types = delta | dict.fromkeys(("hidden", "y", "weight", "out"), own)
        constants = flags | {"HAS_NORM": True, "BLOCK": 4_096}
        yield Launch(f"add_norm {kind}", kernels._add_norm, types, constants, ("eps",), num_warps=8)


def few_rows(dtype: str) -> Iterator[Launch]:
    """Products of an 8B model's layers in half precision."""
    from lora_core.ops import few_rows as kernels

    types = dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
    for block_o, block_i in ((2, 2_048), (8, 512), (16, 256)):
        constants = {"HAS_BIAS": True, "BLOCK_O": block_o, "BLOCK_I": block_i}
        yield Launch(f"one row {dtype}, blocks of {block_o}", kernels._multiply_one, types, constants)
    for rows, block_i in itertools.product((16, 32), (kernels.INPUT_STEP, kernels.INPUT_STEP // 2)):
        constants = {"HAS_BIAS": True, "M": rows, "BLOCK_O": kernels.OUTPUT_STEP, "BLOCK_I": block_i, "WIDEN": False}
        yield Launch(f"few rows {dtype}, {rows} by {block_i}", kernels._multiply, types, constants, num_stages=4)


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


def four_bit(dtype: str) -> Iterator[Launch]:
    """At the defaults for layers of an 8B model."""
    from lora_core.ops import four_bit as kernels

    types = dict.fromkeys(("y", "x", "pairs", "bias"), f"*{dtype}") | {"codes": "*u8", "absmax": "*fp32"}
    rows = (1,) if dtype == "fp32" else (1, 16, kernels.MAX_ROWS)
    for num_rows, num_outputs in itertools.product(rows, (4_096, 28_672)):
        config = kernels.FourBitConfig.default(num_rows, num_outputs, DTYPES[dtype].itemsize)
        constants, launch = _split(config)
        is_half = dtype != "fp32"
        flags = {"HAS_BIAS": num_rows == 1, "IS_EVEN": num_outputs < 8_192, "LOOK_UP": is_half, "WIDEN": False}
        own = {"STAGES": config.num_stages}
        kind = f"four bits {dtype} {num_rows} rows, {num_outputs} outputs"
        table = kernels.TABLE_BYTES if is_half else 0
        yield Launch(kind, kernels._multiply, types, own | flags | constants, own_shared_bytes=table, **launch)


def _split(config: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """A config's constants and its launch options."""
    fields = asdict(config)
    launch = {name: fields.pop(name) for name in CONFIG_FIELDS}
    fields.pop("split_k", None)
    return {name.upper(): value for name, value in fields.items()}, launch


def compile_all(forms: Iterable[tuple[str, int]]) -> None:
    """Prints a line for each kernel in each dtype and for each capability, and what is wrong with it."""
    seen: set[str] = set()  # a second compilation says nothing
    for dtype, capability in forms:
        small = few_rows(dtype) if capability == 90 and dtype != "fp32" else ()
        for launch in itertools.chain(
            adapters(dtype), between_products(dtype), attention(dtype), four_bit(dtype), small
        ):
            key = f"{capability} {replace(launch, kind='')}"
            if key in seen:
                continue
            seen.add(key)
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
