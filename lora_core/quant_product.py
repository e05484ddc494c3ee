"""Products with bitsandbytes' weights as a server makes them: of several layers at once, and row by row.

Layers whose outputs lie side by side are one product: in 4 bits their numbers and scales stand one after the other, in
8 bits each row of the weight has a scale of its own, so that joined they are the same numbers as apart.

LLM.int8() multiplies what is large in the input (`threshold`) in floating point and the rest in 8 bits. bitsandbytes
decides that by columns of the whole batch: a large number in one row moves that column of all other rows too, and so a
request's answer would depend on who else is in its batch. Here it is decided number by number. A row alone gets what
bitsandbytes gives it alone, and gets the same in any company.
"""

import copy
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.quant import dequantized_4bit, num_bits, scales_of

__all__ = ["FourBitWeight", "Int8Weight", "is_batch_dependent", "joined_weight", "quantized_form"]


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
    is_joinable = not state.nested and module.in_features % state.blocksize == 0
    form = 4, state.quant_type, state.blocksize, state.dtype, state.absmax.dtype, module.compute_dtype
    return form if is_joinable else (*form, id(layer))


def is_batch_dependent(layer: nn.Module) -> bool:
    """In the layer's own forward, what a row gives depends on the others."""
    return num_bits(getattr(layer, "weight", None)) == 8


def joined_weight(layers: Sequence[nn.Module]) -> "FourBitWeight | Int8Weight":
    """The weights of layers of one form side by side; of several, a copy."""
    return Int8Weight(layers) if num_bits(layers[0].weight) == 8 else FourBitWeight(layers)


class FourBitWeight:
    """y = x·Wᵀ + b for W [ΣO, I] in NF4 or FP4.

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
        if len(weights) > 1:
            state.absmax = torch.cat([w.quant_state.absmax for w in weights], dim=1 if self._is_repacked else 0)
        self._state = state
        self._compute_dtype: torch.dtype | None = cast(Any, layers[0]).compute_dtype
        self._values = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        for weight in weights:
            weight.module = None  # so that no cycle keeps a weight that was copied

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [ΣO] -> [..., ΣO]."""
        from bitsandbytes import matmul_4bit  # noqa: PLC0415 - optional

        dtype = self._compute_dtype or x.dtype
        bias = None if bias is None else bias.to(dtype)
        out: Tensor = matmul_4bit(x.to(dtype), self._values, bias=bias, quant_state=self._state)
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
