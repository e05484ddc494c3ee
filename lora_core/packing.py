"""Weights laid out once in the order in which the CPU's matrix kernels read them.

`F.linear` brings its weight into that order at every call, which costs as much as the product itself when there are
few rows. A packed form holds the same numbers in about as many bytes. It is oneDNN's where the processor has
products of bfloat16 (AVX-512), with the same results; PyTorch's operators for it are private, and may be missing.
Elsewhere PyTorch multiplies bfloat16 some twenty times as slowly as the processor could: the form is
`lora_core.native`'s then, which multiplies whole numbers. Where there is neither, or the device or dtype is another, a
plain weight is used.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.native.linear import NativeInt4Weight, NativeWeight

__all__ = ["INT4_GROUP", "Int4Weight", "PackedWeight", "can_be_int4", "has_amx", "has_int4", "round_to_int4"]

# The kernels choose a layout for about so many rows; it serves other numbers nearly as well.
TYPICAL_ROWS = 16
PACKABLE = (torch.float32, torch.bfloat16)
# Numbers along the input that share a scale and an offset in 4 bits.
INT4_GROUP = 32
# With more rows oneDNN's products in bfloat16 are faster, where there are such.
MAX_INT4_ROWS = 4


class PackedWeight:
    """y = x·Wᵀ + b for one W [O, I] and any number of rows.

    Args:
        weight: [O, I]; copied if it is packed, kept as it is otherwise.

    Attributes:
        is_packed: the weight is in a packed form.
    """

    def __init__(self, weight: Tensor) -> None:
        kinds: tuple[type[_OneDnnWeight] | type[NativeWeight], ...] = (_OneDnnWeight, NativeWeight)
        kind = next((kind for kind in kinds if _is_packable(weight) and kind.can_hold(weight.dtype)), None)
        self.is_packed = kind is not None
        plain = _DeviceWeight if weight.is_cuda and find_spec("triton") is not None else _PlainWeight
        self._form = plain(weight) if kind is None else kind(weight)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [O] -> [..., O]."""
        return self._form(x, bias)

    @property
    def native(self) -> NativeWeight | None:
        """What C multiplies by, if it does."""
        return self._form if isinstance(self._form, NativeWeight) else None

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows [rows, I], bit for bit: a copy if it is packed, its own storage otherwise."""
        return self._form.unpack(rows)


class _PlainWeight:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight, bias)

    def unpack(self, rows: slice) -> Tensor:
        return self._weight[rows]


class _DeviceWeight(_PlainWeight):
    """With kernels of our own for few rows, where these are faster."""

    def __init__(self, weight: Tensor) -> None:
        from lora_core.ops import few_rows  # noqa: PLC0415 - Triton is optional

        super().__init__(weight)
        self._few_rows: Any = few_rows if few_rows.can_multiply(weight) else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        kernels, num_outputs = self._few_rows, len(self._weight)
        if kernels is None or not 0 < x.numel() <= kernels.MAX_ROWS * x.shape[-1] or x.dtype != self._weight.dtype:
            return super().__call__(x, bias)
        out: Tensor = kernels.multiply(x.reshape(-1, x.shape[-1]), self._weight, bias)
        return out.view(*x.shape[:-1], num_outputs)


class _OneDnnWeight:
    """In oneDNN's form, where it has products of the processor's own for both dtypes."""

    def __init__(self, weight: Tensor) -> None:
        packers = _packers()
        assert packers is not None
        pack, self._linear = packers
        self._weight = pack(weight.contiguous(), TYPICAL_ROWS)

    @staticmethod
    def can_hold(dtype: torch.dtype) -> bool:
        return dtype in PACKABLE and _packers() is not None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._linear(x, self._weight, bias, "none", [], "")
        return out

    def unpack(self, rows: slice) -> Tensor:
        torch.get_num_threads()  # oneDNN would ask OpenMP; a thread's first PyTorch operator sets the number there
        return self._weight.to_dense()[rows]


class Int4Weight:
    """y = x·Wᵀ + b for one W [O, I] rounded to 4 bits.

    In C a row's inputs are rounded too, to 8 bits in groups of 32, and multiplied as whole numbers: with few rows
    a product takes as long as reading its weights, with many as long as its arithmetic, and both are shorter so. With
    AMX more than a few rows take less still in bfloat16, and read oneDNN's form of the same numbers, which is held too.

    Args:
        weight: [O, I]; see `can_be_int4`.
    """

    is_packed = True

    def __init__(self, weight: Tensor) -> None:
        codes, scale, middle = _int4_parts(weight)
        is_native = NativeWeight.can_hold(weight.dtype)
        self._few: NativeInt4Weight | _TorchInt4Weight = (
            NativeInt4Weight(codes, scale.to(weight.dtype), middle.to(weight.dtype))
            if is_native
            else _TorchInt4Weight(codes, scale, middle, weight.dtype)
        )
        self._many = None if is_native and not has_amx() else PackedWeight(round_to_int4(weight))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [O] -> [..., O]."""
        if self._many is not None and x.numel() > MAX_INT4_ROWS * x.shape[-1]:
            return self._many(x, bias)
        return self._few(x, bias)

    @property
    def native(self) -> NativeInt4Weight | None:
        """What C multiplies any number of rows by, if it does."""
        return self._few if self._many is None and isinstance(self._few, NativeInt4Weight) else None

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The rounded weight's rows [rows, I]."""
        if self._many is not None:
            return self._many.unpack(rows)
        assert isinstance(self._few, NativeInt4Weight)
        return self._few.unpack()[rows]


class _TorchInt4Weight:
    """As `NativeInt4Weight`, by PyTorch's operators."""

    def __init__(self, codes: Tensor, scale: Tensor, middle: Tensor, dtype: torch.dtype) -> None:
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 1)
        self._scales = torch.stack([scale, middle], dim=-1).transpose(0, 1).contiguous().to(dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._codes, INT4_GROUP, self._scales)
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)


def has_int4() -> bool:
    """There is C for `Int4Weight`, or this build of PyTorch has the operators for it."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return NativeWeight.can_hold(torch.bfloat16) or all(hasattr(torch.ops.aten, name) for name in names)


@functools.cache
def has_amx() -> bool:
    """The processor multiplies tiles of bfloat16."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def can_be_int4(weight: Tensor) -> bool:
    """[O, I] in bfloat16 on a CPU, with O a multiple of 16 and I of the group."""
    is_whole = weight.ndim == 2 and weight.shape[0] % 16 == 0 and weight.shape[1] % INT4_GROUP == 0
    return is_whole and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.numel() > 0


def round_to_int4(weight: Tensor) -> Tensor:
    """What 4 bits hold of a weight [O, I]: in each group, 16 numbers evenly spaced from its least to its greatest."""
    codes, scale, middle = _int4_parts(weight)
    return ((codes.float() - 8) * scale[..., None] + middle[..., None]).flatten(1).to(weight.dtype)


def _int4_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, G, 32] 0 to 15, and each group's scale and the value of code 8, [O, G], as the kernel has them."""
    groups = weight.detach().float().unflatten(1, (-1, INT4_GROUP))
    least, greatest = groups.amin(-1), groups.amax(-1)
    scale = ((greatest - least) / 15).to(weight.dtype).float()
    middle = (least + 8 * scale).to(weight.dtype).float()
    steps = (groups - middle[..., None]) / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return (steps + 8).round_().clamp_(0, 15).to(torch.int32), scale, middle


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and weight.numel() > 0


@functools.cache
def _packers() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """oneDNN's reorder and product, if this build of PyTorch has them and they do what is expected."""
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight.default
        linear = torch.ops.mkldnn._linear_pointwise.default
        with torch.inference_mode():
            for dtype in PACKABLE:
                weight = torch.eye(24, 40, dtype=dtype)
                packed = pack(weight, TYPICAL_ROWS)
                product = linear(torch.eye(40, dtype=dtype), packed, None, "none", [], "")
                if not (torch.equal(packed.to_dense(), weight) and torch.equal(product, weight.T)):
                    return None
    except (AttributeError, RuntimeError):
        return None
    return pack, linear
