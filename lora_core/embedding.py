"""LoraEmbedding: an embedding table with adapters.

As a linear map the table's weight is W0 = weightᵀ [O = dimensions, I = vocabulary], applied to one-hot inputs: A's part
of a token is a column of A. DoRA's norm is taken per dimension over the whole vocabulary (PEFT's choice).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.layer import LoraLayer
from lora_core.maths import Folded
from lora_core.ops import apply_rows
from lora_core.routing import Key, Route, Router

__all__ = ["LoraEmbedding"]


class LoraEmbedding(LoraLayer):
    """An nn.Embedding with adapters: `lora_embedding_A` [R, V] and `lora_embedding_B` [D, R], named as in PEFT.

    A table that scales its output (`embed_scale`, as in Gemma 3) scales the adapters' part too. Dropout does not apply.
    """

    def __init__(self, base_layer: nn.Module, router: Router, *, is_head: bool = False) -> None:
        super().__init__(base_layer, router, is_head=is_head)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        return cast(int, module.embedding_dim), cast(int, module.num_embeddings)

    def matrix(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight).T

    def weight_of(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def add_adapter(self, name: str, r: int, lora_alpha: float, scaling: float, **options: Any) -> None:
        super().add_adapter(name, r, lora_alpha, scaling, **options | {"dropout": 0.0, "lora_bias": False})
        for own, made in ((self.lora_embedding_A, self.lora_A), (self.lora_embedding_B, self.lora_B)):
            own[name] = cast(nn.ParameterDict, made.pop(name))["weight"]

    def make_factors(self, r: int, *, bias: bool) -> tuple[nn.Module, nn.Module]:
        assert not bias
        a, b = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        return nn.ParameterDict({"weight": nn.Parameter(a)}), nn.ParameterDict({"weight": nn.Parameter(b)})

    def delete(self, name: str) -> None:
        super().delete(name)
        for parts in (self.lora_embedding_A, self.lora_embedding_B):
            if name in parts:
                del parts[name]

    def factor_state(self, name: str) -> dict[str, nn.Parameter]:
        return {
            "lora_embedding_A": self.lora_embedding_A[name],
            "lora_embedding_B": self.lora_embedding_B[name],
        }

    def folded(self, key: Key) -> Folded | None:
        out = super().folded(key)
        scale = getattr(self.base_layer, "embed_scale", None)
        return out if out is None or scale is None else Folded(out.a, out.b * scale, out.gain, out.bias)

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.T, padding_idx=cast(int | None, getattr(self.base_layer, "padding_idx", None)))

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        rows = y.reshape(-1, self.out_features)
        return apply_rows(rows, x.reshape(-1), self.source(), route, None, self.shrink).view(y.shape)
