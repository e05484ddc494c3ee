"""Models that bitsandbytes has quantized, in their safetensors files: each layer as it is held there, or its numbers.

Beside a 4-bit weight `X.weight` [O·I / 2, 1] the files have `X.weight.absmax`, `X.weight.quant_map`, with double
quantization `X.weight.nested_absmax` and `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or
fp4), which is JSON; beside an 8-bit one [O, I] `X.SCB` [O] and `X.weight_format`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import UnsupportedError
from lora_core.quant import dequantized_weight, keep_layout

__all__ = ["DequantizedTensors", "has_quantized_weights"]

WEIGHT = ".weight"
STATES = tuple(f"{WEIGHT}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
SCALES, FORMAT = ".SCB", ".weight_format"
ROW_FORMAT = 0  # the others are those of early GPU kernels


def has_quantized_weights(tensors: Mapping[str, Tensor]) -> bool:
    """True if bitsandbytes has quantized a layer of these files."""
    return any(key.endswith((*STATES, SCALES)) for key in tensors)


class DequantizedTensors(Mapping[str, Tensor]):
    """The tensors that the files would hold, had they not been quantized; each is made when it is asked for.

    Args:
        tensors: of the files, such as a `TensorFolder`.
        dtype: of weights that are quantized; all others are as they are.
        transposed: keys of weights that the model stores as [I, O] (GPT-2's Conv1D); bitsandbytes has them as [O, I].

    Raises:
        UnsupportedError: bitsandbytes is not installed.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, transposed: Collection[str] = ()) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._transposed = frozenset(transposed)
        self._modules = {key.removesuffix(end) for key in tensors for end in (*STATES, SCALES) if key.endswith(end)}
        self._keys = [key for key in tensors if not self._is_beside_a_weight(key)]
        try:
            import bitsandbytes  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise UnsupportedError("quantized weights need bitsandbytes: pip install 'loramux[bnb]'") from error

    def __getitem__(self, key: str) -> Tensor:
        if not self.is_quantized(key):
            return self._tensors[key]
        return self.as_stored(key, dequantized_weight(self.layer(key)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def is_quantized(self, key: str) -> bool:
        """The weight of this key is held in 4 or 8 bits."""
        return key.endswith(WEIGHT) and key.removesuffix(WEIGHT) in self._modules

    def as_stored(self, key: str, matrix: Tensor) -> Tensor:
        """[O, I] as the files would hold it, had they not been quantized."""
        return (matrix.T if key in self._transposed else matrix).to(self._dtype).contiguous()

    def layer(self, key: str, bias: nn.Parameter | None = None) -> nn.Module:
        """The quantized layer itself, whose weight is a view of the files' where they are mapped into memory.

        Raises:
            UnsupportedError: an 8-bit weight in the layout of a kernel.
        """
        layer = self._layer_8bit(key, bias) if self._has_scales(key) else self._layer_4bit(key, bias)
        if bias is not None:
            layer.bias = bias
        keep_layout(layer)
        return layer.eval()

    def _layer_4bit(self, key: str, bias: nn.Parameter | None) -> nn.Module:
        import bitsandbytes as bnb  # noqa: PLC0415 - optional

        stats = {name: self._tensors[name] for name in self._tensors if name.startswith(f"{key}.")}
        weight = bnb.nn.Params4bit.from_prequantized(self._tensors[key], stats, device="cpu")
        out_features, in_features = weight.quant_state.shape
        options: dict[str, Any] = {"quant_type": weight.quant_type, "compute_dtype": self._dtype, "device": "meta"}
        layer = bnb.nn.Linear4bit(in_features, out_features, bias is not None, **options)
        layer.weight, layer.quant_state = weight, weight.quant_state
        weight.module = layer
        return layer

    def _layer_8bit(self, key: str, bias: nn.Parameter | None) -> nn.Module:
        import bitsandbytes as bnb  # noqa: PLC0415 - optional

        module = key.removesuffix(WEIGHT)
        found = self._tensors.get(module + FORMAT)
        if found is not None and found.item() != ROW_FORMAT:
            raise UnsupportedError(f"the 8-bit weight {key!r} is in the layout of a kernel, which cannot be read")
        values = self._tensors[key]
        layer = bnb.nn.Linear8bitLt(*values.shape[::-1], bias is not None, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(
            values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=self._tensors[module + SCALES]
        )
        return layer

    def _has_scales(self, key: str) -> bool:
        return key.removesuffix(WEIGHT) + SCALES in self._tensors

    def _is_beside_a_weight(self, key: str) -> bool:
        module, _, rest = key.rpartition(f"{WEIGHT}.")
        if rest and module in self._modules:
            return True
        return any(key.endswith(end) and key.removesuffix(end) in self._modules for end in (SCALES, FORMAT))
