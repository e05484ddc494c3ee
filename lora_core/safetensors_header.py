"""A strict reading of a safetensors header, before any library touches the file.

The format: 8 bytes (little endian) of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
tensors' bytes. The library keeps the last of two equal names and does not insist on the first byte; two readers that
disagree about a file are how smuggled tensors get in, so here one file has one meaning or is refused.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from lora_core.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "TensorInfo", "read_header"]

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_DIMS = 5  # a convolution in three dimensions
MAX_ITEMS = 1 << 48
METADATA_KEY = "__metadata__"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header declares it; `start` and `end` are byte offsets into the data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(prefix: bytes | memoryview, total_bytes: int) -> dict[str, TensorInfo]:
    """Check the header of a safetensors file and list its tensors.

    Args:
        prefix: at least the first `min(total_bytes, 8 + MAX_HEADER_BYTES)` bytes of the file.
        total_bytes: size of the whole file.

    Raises:
        CheckpointError: for anything but a well-formed file whose tensors tile its data part exactly.
    """
    if total_bytes < 10:
        raise CheckpointError("not a safetensors file: shorter than its header")
    header_bytes = int.from_bytes(prefix[:8], "little")
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > total_bytes:
        raise CheckpointError("not a safetensors file: the header is too large or reaches past the end")
    raw = bytes(prefix[8 : 8 + header_bytes])
    if not raw.startswith(b"{"):
        raise CheckpointError("not a safetensors file: the header is no JSON object")
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_natural)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the safetensors header is malformed: {error}") from None
    metadata = entries.pop(METADATA_KEY, None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError("the metadata of the safetensors file must map strings to strings")
    if not entries:
        raise CheckpointError("the safetensors file holds no tensors")
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"the safetensors file holds more than {MAX_TENSORS} tensors")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_tiling(tensors, total_bytes - 8 - header_bytes)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    for text in (*out, *out.values()):
        if isinstance(text, str):
            text.encode()  # an escaped lone surrogate is a ValueError
    return out


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # -0 among them, which is no integer to other readers
        raise ValueError("a number is negative")
    return int(digits)


def _tensor(name: str, entry: Any) -> TensorInfo:
    shown = ascii(name[:120])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"the safetensors header entry {shown} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor {shown} has the unknown dtype {ascii(dtype)[:40]}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or math.prod(n or 1 for n in shape) > MAX_ITEMS:
        raise CheckpointError(f"tensor {shown} has a malformed shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {shown} has malformed offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"the size of tensor {shown} does not follow from its shape and dtype")
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_ITEMS for n in value)


def _check_tiling(tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """Every byte of the data part belongs to exactly one tensor."""
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise CheckpointError("the safetensors tensors overlap or leave gaps")
        position = info.end
    if position != data_bytes:
        raise CheckpointError("the safetensors data is shorter or longer than its header says")
