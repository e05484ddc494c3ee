"""The definition of `apply_lora`: the formula of `lora_core.ops`, token by token. For tests, not for speed."""

from typing import TYPE_CHECKING

from torch import Tensor

from lora_core.routing import Route

if TYPE_CHECKING:
    from lora_core.ops import AdapterSource

__all__ = ["apply"]


def apply(y: Tensor, x: Tensor, adapters: "AdapterSource", route: Route, base_bias: Tensor | None) -> Tensor:
    """y [T, O], x [T, I] -> [T, O], new; see `lora_core.ops.apply_lora`."""
    out = y.clone()
    tokens_per_row = x.shape[0] // route.num_rows
    t = 0
    for weights, num_rows in route.runs:
        for _ in range(num_rows * tokens_per_row):
            base = y[t] if base_bias is None else y[t] - base_bias
            for key, weight in weights.items():
                adapter = adapters.folded(key)
                if adapter is None:
                    continue
                out[t] += weight * (x[t] @ adapter.a.T @ adapter.b)
                if adapter.gain is not None:
                    out[t] += weight * adapter.gain * base
                if adapter.bias is not None:
                    out[t] += weight * adapter.bias
            t += 1
    return out
