"""Compile every kernel for NVIDIA GPUs, which needs none: `python -m tests.engine.compile_kernels`, some at a time.

The interpreter runs kernels as Python. What it lets pass (types that change in a loop, shapes that are no power of two)
shows here.
"""

import itertools
import os
from typing import Any

__all__ = ["compile_all"]

CAPABILITIES = (80, 90)
DTYPES = ("fp32", "fp16", "bf16")
NUM_WARPS = 4


def _compile(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], floats: tuple[str, ...] = ()) -> Any:
    """For each capability; arguments that are neither pointers nor constants are 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "fp32" if name in floats else "i32")
        for name in kernel.arg_names
    }
    assert not pointers.keys() - set(kernel.arg_names)
    for capability in CAPABILITIES:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": NUM_WARPS, "num_stages": 2}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["ptx"]


def _compile_adapters(dtype: str) -> None:
    from lora_core.device_slots import FIELDS
    from lora_core.ops import triton as kernels

    common: dict[str, Any] = {"NUM_FIELDS": FIELDS, "BLOCK_R": 32, "WIDEN": False}
    plan = dict.fromkeys(("layers", "tokens", "entry_tiles", "entry_slots"), "*i32")
    table = {"h": "*fp32", "table": "*i64", "weights": "*fp32"}
    for size, splits in ((16, 8), (64, 1)):
        own = common | {"M": size, "SPLIT_K": splits}
        _compile(kernels._shrink, {"x": f"*{dtype}"} | plan | table, own | {"BLOCK_K": 64})
        lists = dict.fromkeys(
            ("layers", "member_starts", "member_sizes", "tokens", "tile_starts", "entry_slots"), "*i32"
        )
        outputs = {"y": f"*{dtype}", "base_bias": f"*{dtype}"}
        for has_bias in (True, False):
            blocks = {"BLOCK_O": 128, "HAS_BASE_BIAS": has_bias, "IS_ALIGNED": has_bias}
            _compile(kernels._expand, outputs | lists | table, own | blocks)


def _compile_attention(dtype: str) -> None:
    from server.engine.attention import kernels

    pool = f"*{dtype}"
    store = dict.fromkeys(("keys", "values", "key", "value"), pool) | {"positions": "*i64"}
    _compile(kernels._store, store, {"DIM": 128, "VALUE_DIM": 128, "BLOCK_DIM": 128})
    shape = {"BLOCK_SIZE": 16, "DIM": 96, "VALUE_DIM": 96, "BLOCK_DIM": 128, "BLOCK_VALUE_DIM": 128, "GROUP": 4}
    for splits, rows, is_special in ((1, 64, False), (4, 16, True)):
        pointers = dict.fromkeys(("query", "keys", "values", "sinks"), pool) | {"fields": "*i32", "blocks": "*i32"}
        pointers |= {"out": pool if splits == 1 else "*fp32", "sums": pool if splits == 1 else "*fp32"}
        flags = dict.fromkeys(("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS"), is_special)
        own = {"ROWS": rows, "BLOCK_KEYS": 32, "SPLITS": splits, "WIDEN": False}
        _compile(kernels._attend, pointers, shape | flags | own, ("scaling", "softcap"))
    parts = {"parts": "*fp32", "sums": "*fp32", "fields": "*i32", "out": pool}
    _compile(kernels._join, parts, {"VALUE_DIM": 96, "BLOCK_VALUE_DIM": 128, "SPLITS": 4})


def compile_all() -> None:
    for dtype, make in itertools.product(DTYPES, (_compile_adapters, _compile_attention)):
        make(dtype)
        print(f"compiled {make.__name__.removeprefix('_compile_')} {dtype}", flush=True)


if __name__ == "__main__":
    assert os.environ.pop("TRITON_INTERPRET", None) in {None, "1"}  # set by the package of the tests
    compile_all()
