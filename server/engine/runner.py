"""ModelRunner: a model with slots for adapters and a cache, and the one call that runs a batch through it."""

import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import DeviceModelSlots, LoraLinear, ModelSlots, Router, attach_slots, wrap_linears
from lora_core.ops.tuning import tune_adapters, tuner_for
from server.allocator import keep_freed
from server.engine.attention import (
    NO_CONFIGS,
    AttentionStep,
    NativeAttention,
    PagedAttention,
    tune_attention,
    use_step,
)
from server.engine.batch import Batch, with_tokens
from server.engine.decoder import NativeLayers
from server.engine.device_layers import DeviceLayers
from server.engine.device_step import DeviceStep, what_kernels_lack
from server.engine.graphs import Capture, CudaCapture, DecodeGraphs
from server.engine.kv_cache import KVCache
from server.engine.layers import StackKind
from server.engine.model import ModelFacts, inspect_model, load_model
from server.engine.optimise import optimise
from server.engine.quantization import Quantization, checkpoint_quantization
from server.engine.reference import make_reference
from server.engine.warm_up import warm_up
from server.errors import InvalidRequestError
from server.memory import DEFAULT_KV_BYTES

logger = logging.getLogger(__name__)

__all__ = ["EngineConfig", "ModelRunner", "load_runner"]


# Memory for the cache on CUDA unless it is set, as a share of what is free beside the weights.
KV_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_running: requests that generate at once.
        max_step_tokens: tokens computed in one step, prompts and running streams together.
        max_slots: adapters that can be in use at once.
        kv_bytes: memory for keys and values; None for 1 GiB, on CUDA for most of what is free.
        max_model_len: longest sequence, prompt and output together; None for all that model and memory allow.
        target_step_s: how long a step should take while requests stream; long prompts are cut to it. None: no aim.
        use_prefix_cache: keep computed prompts, and compute what requests have in common once.
        use_kernels: attend and apply adapters with Triton kernels; None: on CUDA.
        use_cuda_graphs: record decoding steps and replay them, where kernels are used.
        tuning_folder: measure the kernels' launch parameters before anything is served, and keep them there; None: the
            defaults.
        run_ahead: give the device a step before the tokens of the step before are known; None: on CUDA.
    """

    max_running: int = 32
    max_step_tokens: int = 512
    max_slots: int = 32
    block_size: int = 16
    kv_bytes: int | None = None
    max_model_len: int | None = None
    target_step_s: float | None = None
    use_prefix_cache: bool = True
    use_kernels: bool | None = None
    use_cuda_graphs: bool = True
    tuning_folder: Path | None = None
    run_ahead: bool | None = None


class ModelRunner:
    """Owns the model; used by one thread at a time, whose current device is the model's (`enter_thread`).

    Args:
        model: a transformers causal language model, changed in place: its linear layers are wrapped.
        capture: how decoding steps are recorded; by default as CUDA graphs, and not at all on a CPU.
        as_int4: the model's weights are rounded by `quantization.round_weights`.
        on_facts: told what the model is like before it is made fast, for whatever can be made meanwhile.

    Attributes:
        layers: the wrapped linear layers by name; `lora_core.fold_adapter` folds for them.
        bank: their slots.
        max_model_len: longest sequence in tokens that fits model and cache.
        reference: what transformers' own code gave before the model was changed.
        optimised: what could be made faster.
        uses_kernels: Triton's kernels attend and apply adapters.
        is_native: C does (`lora_core.native`), on a CPU.
        runs_ahead: as configured, or on CUDA.
        graphs: recorded decoding steps; None without kernels or graphs.
        quantization: how the weights are held ("nf4", "int8", another method's name), or None.

    Raises:
        InvalidRequestError: the architecture is not supported, or the cache has no room for one block.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        capture: Capture | None = None,
        *,
        as_int4: bool = False,
        on_facts: Callable[[ModelFacts], object] = lambda _: None,
    ) -> None:
        self.model = model
        self.config = config
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        on_cuda = self.device.type == "cuda"
        self.enter_thread()
        self.uses_kernels = on_cuda if config.use_kernels is None else config.use_kernels
        self.runs_ahead = on_cuda if config.run_ahead is None else config.run_ahead
        if on_cuda and self.uses_kernels and (missing := what_kernels_lack()) is not None:
            raise InvalidRequestError(f"Triton's kernels cannot run: there is no {missing}", code="kernels_unavailable")
        self.quantization = "int4" if as_int4 else checkpoint_quantization(model.config)
        self.facts: ModelFacts = inspect_model(model)
        on_facts(self.facts)
        self.cache = self._make_cache()
        longest = min(self.facts.max_positions, (self.cache.num_blocks - 1) * config.block_size)
        self.max_model_len = min(longest, config.max_model_len or longest)
        self.is_native = NativeAttention.can_read(self.cache) and not self.uses_kernels
        self.reference = make_reference(model, self.facts.vocab_size, self.max_model_len)
        self.router = Router()
        self.layers: dict[str, LoraLinear] = wrap_linears(model, self.router)
        self.bank: ModelSlots = attach_slots(
            self.layers, config.max_slots, dtype=self.dtype, model=model, use_kernels=self.uses_kernels
        )
        stack: StackKind | None = None
        if self.is_native or self.uses_kernels:
            stack = (NativeLayers if self.is_native else DeviceLayers)(self.facts.layers)
        self.optimised = optimise(model, self.layers, stack, as_int4=as_int4)
        self._attend_configs: Mapping[Hashable, Any] = self._tune() if self.uses_kernels else NO_CONFIGS
        self.graphs: DecodeGraphs | None = None
        if self.uses_kernels and config.use_cuda_graphs and (on_cuda or capture is not None):
            self.graphs = self._record(capture or CudaCapture())
        if self.uses_kernels and on_cuda:
            warm_up(self.layers, self._device_step(), config.max_running)

    def forward(self, batch: Batch, last: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the batch's last rows, to be read before the next call; the cache then holds its tokens.

        Args:
            last: [M] tokens of the step before, on the device, if the batch refers to any.
        """
        if self.uses_kernels:
            replayed = None if self.graphs is None else self.graphs.run(batch, last)
            return self._device_step().run(batch, last) if replayed is None else replayed
        ids = with_tokens(batch.input_ids, last)
        with torch.inference_mode(), self.router.use(batch.route, batch.head_route):
            attention: AttentionStep
            if self.is_native:
                attention = NativeAttention(self.cache, batch.cache_positions, batch.spans)
                straight = self.optimised.straight
                if straight is not None:
                    logits = straight.run(ids, batch.position_ids, batch.last_rows, attention)
                    if logits is not None:
                        return logits
            else:
                self.cache.zero(batch.new_blocks)
                attention = PagedAttention(self.cache, batch.cache_positions, batch.groups)
            output = self.model(
                input_ids=ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.last_rows,
                **use_step(attention),
            )
            return output.logits[0]

    @property
    def reads_spans(self) -> bool:
        """Batches for it are made with `build_batch(..., spans_only=True)`."""
        return self.uses_kernels or self.is_native

    def enter_thread(self) -> None:
        """Make the model's device the calling thread's: streams, events and launches are the current device's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def settle(self) -> None:
        """Wait until the device has done what it was given, or is seen to be broken."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.device)

    def _device_step(self) -> DeviceStep:
        """What runs the model with kernels."""
        return DeviceStep(self.model, self.router, self.cache, self._attend_configs)

    def _tune(self) -> Mapping[Hashable, Any]:
        """Measure launch parameters where that is wanted; returns those of attention."""
        if self.config.tuning_folder is None:
            return NO_CONFIGS
        assert isinstance(self.bank, DeviceModelSlots)
        tuner = tuner_for(self.config.tuning_folder, self.device)
        tune_adapters(tuner, self.bank.table, self.optimised.shapes, self.dtype)
        config: Any = self.model.config
        num_heads = int(config.get_text_config().num_attention_heads)
        layers = [(shape, num_heads) for shape in self.facts.layers]
        configs = tune_attention(tuner, layers, self.config.block_size, self.dtype, self.device)
        tuner.save()
        logger.info("%d launches of kernels were measured", tuner.num_measured)
        return configs

    def _record(self, capture: Capture) -> DecodeGraphs | None:
        """Graphs of decoding, or None where the model's code does something that cannot be recorded."""
        assert isinstance(self.bank, DeviceModelSlots)
        if self.quantization == "int8":  # its products ask the device which columns are large: nothing to record
            return None
        graphs = DecodeGraphs(
            self._device_step(),
            self.bank,
            capture,
            max_tokens=self.config.max_running,
            max_blocks=-(-self.max_model_len // self.config.block_size),
        )
        try:
            graphs.record()
        except RuntimeError as error:
            logger.warning("decoding runs without graphs, as this model cannot be recorded: %s", error)
            return None
        return graphs

    def _kv_bytes(self) -> int:
        if self.config.kv_bytes is not None or self.device.type != "cuda":
            return self.config.kv_bytes or DEFAULT_KV_BYTES
        return int(torch.cuda.mem_get_info(self.device)[0] * KV_SHARE)

    def _make_cache(self) -> KVCache:
        kv_bytes = self._kv_bytes()
        block_bytes = KVCache.bytes_per_token(self.facts.layers, self.dtype) * self.config.block_size
        most = self.config.max_running * -(-self.facts.max_positions // self.config.block_size)
        num_blocks = 1 + min(most, kv_bytes // block_bytes)
        if num_blocks < 2:
            raise InvalidRequestError(
                f"the cache needs at least {block_bytes} bytes for one block, {kv_bytes} are allowed",
                code="kv_cache_too_small",
            )
        return KVCache(self.facts.layers, num_blocks, self.config.block_size, dtype=self.dtype, device=self.device)


def load_runner(
    path: str | Path,
    config: EngineConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    on_facts: Callable[[ModelFacts], object] = lambda _: None,
) -> ModelRunner:
    """Load a local model folder and make it ready; arguments and errors as in `ModelRunner` and `load_model`."""
    quantization = quantization or Quantization()
    with keep_freed():
        model = load_model(path, dtype=dtype, device=device, quantization=quantization)
        return ModelRunner(model, config, as_int4=quantization.kind == "int4", on_facts=on_facts)
