"""Products with bitsandbytes' weights as a server makes them: of several layers at once, and row by row.

Layers whose outputs lie side by side are one product: in 4 bits their numbers and scales stand one after the other, in
8 bits each row of the weight has a scale of its own, so that joined they are the same numbers as apart.

LLM.int8() multiplies what is large in the input (`threshold`) in floating point and the rest in 8 bits. bitsandbytes
decides that by columns of the whole batch: a large number in one row moves that column of all other rows too, and so a
request's answer would depend on who else is in its batch. Here it is decided number by number. A row alone gets what
bitsandbytes gives it alone, and gets the same in any company.

On CUDA, few rows in half precision are multiplied by a kernel of our own (`lora_core.ops.four_bit`) that reads each
weight once, in 4 bits, if Triton is there. Nested scales, those that are quantized themselves, would keep layers apart,
as each has an offset. There they are dequantized once, which takes 0.4 bits more for each number of the weight (with
the default blocks of 64), a tenth of the whole.
"""

import copy
import logging
from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.quant import dequantized_4bit, num_bits, scales_of

logger = logging.getLogger(__name__)

__all__ = ["FourBitWeight", "Int8Weight", "is_batch_dependent", "joined_weight", "quantized_form"]

# Of products in half precision by two ways, relative.
MAX_ERROR = 2e-2


def quantized_form(layer: nn.Module) -> Hashable | None:
    """Layers of equal form can be one product; None for a layer that is not one of bitsandbytes'."""
    if not type(layer).__module__.startswith("bitsandbytes."):
        return None
    module = cast(Any, layer)
    bits = num_bits(module.weight)
    if bits == 8:
        return 8, module.state.threshold
    if bits != 4:
        return None
    state = module.weight.quant_state
    # Scales of blocks that span rows are read by the number of rows; those that are quantized have an offset a layer.
    is_nested = state.nested and not _is_for_gpu(module.weight)
    is_joinable = not is_nested and module.in_features % state.blocksize == 0
    scale_dtype = torch.float32 if state.nested and not is_nested else state.absmax.dtype
    form = 4, state.quant_type, state.blocksize, state.dtype, scale_dtype, module.compute_dtype
    return form if is_joinable else (*form, id(layer))


def _is_for_gpu(values: Tensor) -> bool:
    return values.is_cuda


def _can_use_kernel(values: Tensor) -> bool:
    """Triton is there, and the GPU is of the kind on which the kernel was measured."""
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return not values.is_cuda or torch.cuda.get_device_capability(values.device) == (9, 0)


def is_batch_dependent(layer: nn.Module) -> bool:
    """In the layer's own forward, what a row gives depends on the others."""
    return num_bits(getattr(layer, "weight", None)) == 8


def joined_weight(layers: Sequence[nn.Module]) -> "FourBitWeight | Int8Weight":
    """The weights of layers of one form side by side; of several, a copy."""
    return Int8Weight(layers) if num_bits(layers[0].weight) == 8 else FourBitWeight(layers)


class FourBitWeight:
    """y = x·Wᵀ + b for W [ΣO, I] in NF4 or FP4; on CUDA its scales are in float32, nested or not.

    Args:
        layers: of one form.

    Attributes:
        is_packed: the layers' own weights are no longer needed.
    """

    is_packed = True

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        weights = [cast(Any, layer).weight for layer in layers]
        state = copy.copy(weights[0].quant_state)
        num_outputs = sum(weight.quant_state.shape[0] for weight in weights)
        state.shape = torch.Size([num_outputs, state.shape[1]])
        # In the CPU's own layout, scales are [blocks of a row, O].
        self._is_repacked = bool(getattr(state, "packing_format_for_cpu", False))
        is_for_gpu = _is_for_gpu(weights[0])
        scales = [_whole_scales(w.quant_state) if is_for_gpu else w.quant_state.absmax for w in weights]
        if is_for_gpu:
            state.nested, state.offset, state.state2 = False, None, None
        state.absmax = scales[0] if len(scales) == 1 else torch.cat(scales, dim=1 if self._is_repacked else 0)
        self._state = state
        self._compute_dtype: torch.dtype | None = cast(Any, layers[0]).compute_dtype
        self._values = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        for weight in weights:
            weight.module = None  # so that no cycle keeps a weight that was copied
        self._kernel: Any = None
        self._pairs: dict[torch.dtype, Tensor] = {}
        if is_for_gpu and _can_use_kernel(self._values):
            self._use_kernel(has_bias=cast(Any, layers[0]).bias is not None)

    def _use_kernel(self, *, has_bias: bool) -> None:
        """Take our own kernel for few rows, if it gives what bitsandbytes gives; that compiles it, too."""
        from lora_core.ops import four_bit  # noqa: PLC0415 - Triton is optional

        dtypes = [self._compute_dtype] if self._compute_dtype else four_bit.DTYPES
        self._pairs = {dtype: four_bit.pair_table(self._state.code, dtype) for dtype in dtypes}
        num_outputs, num_inputs = self._state.shape
        generator = torch.Generator(self._values.device).manual_seed(0)
        for num_rows in four_bit.ROW_BLOCKS:
            x = torch.randn(num_rows, num_inputs, generator=generator, device=self._values.device).to(dtypes[0])
            if not four_bit.can_multiply(x, num_inputs, self._state.blocksize):
                return
            bias = x.new_ones(num_outputs) if has_bias else None
            wanted = self(x, bias).float()  # bitsandbytes' yet
            try:
                found = four_bit.four_bit_product(x, self._values, self._state.absmax, self._pairs[dtypes[0]], bias)
            except RuntimeError as error:  # another version of Triton may count shared memory in another way
                logger.warning("products in 4 bits are bitsandbytes', as the kernel cannot be launched: %s", error)
                return
            if not float((found.float() - wanted).norm()) <= MAX_ERROR * float(wanted.norm()):
                logger.warning("products in 4 bits are bitsandbytes', as the kernel gives other numbers")
                return
        self._kernel = four_bit

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [ΣO] -> [..., ΣO]."""
        from bitsandbytes import matmul_4bit  # noqa: PLC0415 - optional

        dtype, state = self._compute_dtype or x.dtype, self._state
        bias = None if bias is None else bias.to(dtype)
        x_cast = x.to(dtype)
        if self._kernel is not None and self._kernel.can_multiply(x_cast, state.shape[1], state.blocksize):
            rows = x_cast.reshape(-1, state.shape[1])
            pairs = self._pairs[dtype]
            out: Tensor = self._kernel.four_bit_product(rows, self._values, state.absmax, pairs, bias)
            return out.view(*x.shape[:-1], -1).to(x.dtype)
        out = matmul_4bit(x_cast, self._values, bias=bias, quant_state=state)
        return out.to(x.dtype)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows [rows, I] in float32, whole layers' ones: a copy."""
        start, stop, _ = rows.indices(self._state.shape[0])
        state, (num_outputs, num_inputs) = copy.copy(self._state), self._state.shape
        if (start, stop) == (0, num_outputs):
            return dequantized_4bit(self._values, state)
        state.shape = torch.Size([stop - start, num_inputs])
        values = self._values.reshape(num_outputs, -1)[start:stop]
        if self._is_repacked:
            state.absmax = state.absmax[:, start:stop]
        else:
            blocks = slice(start * num_inputs // state.blocksize, stop * num_inputs // state.blocksize)
            values, state.absmax = values.reshape(-1, 1), state.absmax[blocks]
        return dequantized_4bit(values, state)


def _whole_scales(state: Any) -> Tensor:
    """The scales of a `QuantState` in float32, as bitsandbytes dequantizes them if they are nested."""
    if not state.nested:
        return cast(Tensor, state.absmax).float()
    from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

    return (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


class Int8Weight:
    """y = x·Wᵀ + b for W [ΣO, I] in 8 bits with a scale for each row (LLM.int8(), Dettmers et al. 2022).

    Args:
        layers: of one form.
    """

    is_packed = True

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        weights = [cast(Any, layer).weight for layer in layers]
        self._values = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        self._scales = torch.cat([scales_of(layer).to(self._values.device) for layer in layers])
        self._threshold = float(cast(Any, layers[0]).state.threshold)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [ΣO] -> [..., ΣO]; a row's output depends on that row only."""
        from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

        rows = x.reshape(-1, x.shape[-1])
        if not rows.numel():
            return x.new_empty(*x.shape[:-1], len(self._scales))
        half = rows.half()
        is_large = half.abs() >= self._threshold if self._threshold else None
        if is_large is not None:
            half = half.masked_fill(is_large, 0)
        quantized, scales, _ = bnb.int8_vectorwise_quant(half)
        bias = None if bias is None else bias.to(x.dtype)
        out: Tensor = torch.ops.bitsandbytes.int8_scaled_mm(
            quantized, self._values, scales, self._scales, bias=bias, dtype=x.dtype
        )
        if is_large is not None:
            columns = is_large.any(dim=0).nonzero().flatten()
            if len(columns):
                large = rows[:, columns].where(is_large[:, columns], 0)
                weight = bnb.int8_vectorwise_dequant(self._values[:, columns], self._scales).to(x.dtype)
                out = out.addmm(large, weight.T)
        return out.view(*x.shape[:-1], -1)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows [rows, I] in float32: a copy."""
        from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

        return cast(Tensor, bnb.int8_vectorwise_dequant(self._values[rows], self._scales[rows])).float()
