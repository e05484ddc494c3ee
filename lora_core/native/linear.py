"""A linear layer's weight in the panels that `linear.c` reads."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.native import library

__all__ = ["NativeInt4Weight", "NativeWeight"]


class NativeWeight:
    """y = x·Wᵀ + b for one W [O, I] and any number of rows; a row's result does not depend on the others.

    In bfloat16 it is multiplied in whole numbers (`tile_bf16.h`): 32 numbers along the input become multiples of one
    power of two, the largest of 13 bits, and are exact unless they are less than 1/32 of the largest. What these were
    is kept beside them.

    Args:
        weight: [O, I], copied; see `can_hold`.
    """

    def __init__(self, weight: Tensor) -> None:
        library_ = _library(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self._linear, self._unpack, self._dtype = library_.linear, library_.unpack, weight.dtype
        width, size = int(library_.panel_width()), int(library_.group_size())
        num_panels, num_groups = (-(-n // m) for n, m in zip(weight.shape, (width, size), strict=True))
        has_worth = weight.dtype == torch.bfloat16
        unit, per_unit = (torch.int16, 2) if has_worth else (torch.float32, 1)
        self._units = torch.zeros(num_panels, num_groups, size // per_unit, width, per_unit, dtype=unit)
        self._worth = weight.new_zeros(num_panels, num_groups, width) if has_worth else None
        weight, is_rounded = weight.contiguous(), torch.empty(weight.shape, dtype=torch.bool)
        library_.pack(weight.data_ptr(), *self.addresses[1:], is_rounded.data_ptr(), *weight.shape)
        self._places = is_rounded.view(-1).nonzero()[:, 0]
        self._originals = weight.view(-1)[self._places]
        if weight.numel() <= torch.iinfo(torch.int32).max:
            self._places = self._places.int()

    @staticmethod
    def can_hold(dtype: torch.dtype) -> bool:
        return library(dtype) is not None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] of the weight's dtype, bias [O] -> [..., O]."""
        return _multiply(self._linear, x, self._dtype, (self._units, self._worth), bias, self.out_features)

    @property
    def addresses(self) -> tuple[int, int, int | None]:
        """Where the product, the units and what one is worth are."""
        return _address(self._linear), self._units.data_ptr(), None if self._worth is None else self._worth.data_ptr()

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows [rows, I], which follow each other, bit for bit: a copy."""
        first, stop, _ = rows.indices(self.out_features)
        weight = torch.empty(max(stop - first, 0), self.in_features, dtype=self._dtype)
        self._unpack(*self.addresses[1:], weight.data_ptr(), first, stop, self.in_features)
        bounds = torch.tensor([first, stop], dtype=self._places.dtype) * self.in_features
        own = slice(*torch.searchsorted(self._places, bounds).tolist())
        weight.view(-1)[self._places[own] - bounds[0]] = self._originals[own]
        return weight


class NativeInt4Weight:
    """The same for a weight in 4 bits, of which groups of 32 numbers along the input share a scale and a middle.

    In whole numbers: of each row, each group of inputs is rounded to the nearest of 255 numbers from its largest to
    minus that first.

    Args:
        codes: [O, G, 32], 0 to 15.
        scale, middle: [O, G] in the dtype of what is multiplied: a weight is (code - 8)·scale + middle.
    """

    def __init__(self, codes: Tensor, scale: Tensor, middle: Tensor) -> None:
        library_ = _library(scale.dtype)
        self.out_features = codes.shape[0]
        self._linear = library_.linear_int4
        octets = _panels(codes.flatten(1).to(torch.uint8), library_).unflatten(2, (-1, 2, 4))  # [P, W, I / 8, 2, 4]
        self._codes = (octets[..., 0, :] | octets[..., 1, :] << 4).transpose(1, 2).contiguous()  # [P, I / 8, W, 4]
        parts = [_panels(part, library_).transpose(1, 2) for part in (scale, middle)]
        self._scales = torch.stack(parts, dim=2).contiguous()  # [P, G, 2, W]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [O] -> [..., O]."""
        return _multiply(self._linear, x, self._scales.dtype, (self._codes, self._scales), bias, self.out_features)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where the product, codes and scales are."""
        return _address(self._linear), self._codes.data_ptr(), self._scales.data_ptr()

    def unpack(self) -> Tensor:
        """[O, I]: a copy, rounded to the scales' dtype."""
        octets = self._codes.transpose(1, 2)  # [P, W, I / 8, 4]
        codes = torch.stack([octets & 15, octets >> 4], dim=3).flatten(2).unflatten(2, (self._scales.shape[1], -1))
        scale, middle = (self._scales[:, :, i].transpose(1, 2)[..., None].float() for i in (0, 1))
        weight = (codes.float() - 8) * scale + middle  # [P, W, G, 32]
        return weight.flatten(2).flatten(0, 1)[: self.out_features].to(self._scales.dtype)


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    found = library(dtype)
    assert found is not None
    return found


def _panels(weight: Tensor, library_: ctypes.CDLL) -> Tensor:
    """[O, I] -> [P, W, I], the last panel filled up with zeros."""
    width = int(library_.panel_width())
    missing = -weight.shape[0] % width
    return (F.pad(weight, (0, 0, 0, missing)) if missing else weight).unflatten(0, (-1, width))


def _address(function: Callable[..., int]) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def _multiply(
    function: Callable[..., int],
    x: Tensor,
    dtype: torch.dtype,
    weights: Sequence[Tensor | None],
    bias: Tensor | None,
    num_out: int,
) -> Tensor:
    """x [..., I] times what `weights` hold -> [..., num_out], in `dtype`."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or x.dtype != dtype:
        rows = rows.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    y = rows.new_empty(*x.shape[:-1], num_out)
    places = [None if part is None else part.data_ptr() for part in (*weights, bias, y)]
    if function(rows.data_ptr(), rows.stride(0), *places, len(rows), x.shape[-1], num_out, None):
        raise MemoryError(f"no memory for a product of {len(rows)} rows")
    return y
