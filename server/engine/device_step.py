"""One forward pass with kernels, over tensors on the device."""

import os
import shutil
from collections.abc import Hashable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import Route, Router
from server.engine.attention import NO_CONFIGS, AttentionPlan, DeviceAttention, use_step
from server.engine.batch import Batch, with_tokens
from server.engine.kv_cache import KVCache
from server.engine.transfers import upload

__all__ = ["DeviceStep", "what_kernels_lack"]


def what_kernels_lack() -> str | None:
    """What is missing for Triton's kernels to be compiled, or None."""
    if find_spec("triton") is None:
        return "package `triton`"
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return None if has_compiler else "C compiler, with which Triton builds what launches them"


class DeviceStep:
    """Runs a model whose attention and adapters are kernels'.

    Args:
        configs: as for `DeviceAttention`.
    """

    def __init__(
        self, model: nn.Module, router: Router, cache: KVCache, configs: Mapping[Hashable, Any] = NO_CONFIGS
    ) -> None:
        self._configs = configs
        self._model = model
        self._router = router
        self.cache = cache

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def num_kv_heads(self) -> int:
        """Of a layer, by which plans are made."""
        return self.cache.shape(0).num_kv_heads

    def run(self, batch: Batch, last: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the batch's last rows; `last` as for `with_tokens`."""
        device = self.device
        inputs = torch.stack([batch.input_ids[0], batch.position_ids[0], batch.cache_positions])
        on_device = upload(inputs, device)
        on_device[0] = with_tokens(on_device[0], last)
        plan = AttentionPlan.of(batch.spans, self.num_kv_heads, self.cache.block_size, device)
        last_rows = upload(batch.last_rows, device)
        return self.compute(on_device, plan, batch.route, batch.head_route, last_rows)

    def compute(
        self, inputs: Tensor, plan: AttentionPlan, route: Route, head_route: Route, last_rows: Tensor
    ) -> Tensor:
        """The same from tensors on the device; asks the device for nothing.

        Args:
            inputs: [3, T] int64: tokens, positions, and places in the cache, -1 for a token of nobody's.
            last_rows: [N] tokens whose logits are wanted.
        """
        attention: Any = DeviceAttention(self.cache, inputs[2], plan, self._configs)
        with torch.inference_mode(), self._router.use(route, head_route):
            output = self._model(
                input_ids=inputs[:1],
                position_ids=inputs[1:2],
                use_cache=False,
                logits_to_keep=last_rows,
                **use_step(attention),
            )
            return output.logits[0]
