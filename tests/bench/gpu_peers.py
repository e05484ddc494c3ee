"""Peers on the same device and model: PEFT's mixed batch, and transformers' continuous batching without adapters."""

import itertools
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from tests.bench.gpu_model import Shape

__all__ = ["continuous_step_s", "peft_step_s"]

RANK = 16
MAX_BATCH_TOKENS = 2_048
# Its graphs are of steps padded to a multiple of so many keys.
KV_PADDING = 1_024


class _Clock:
    """Notes when each step of `generate` ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def peft_step_s(model: Any, shape: Shape, prompts: list[list[int]], num_adapters: int) -> float:
    """Median seconds of a decode step of all rows, each with one of `num_adapters` adapters of rank 16 in turn."""
    import peft

    names = [f"a{i}" for i in range(num_adapters)]
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config, names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            wrapped.add_adapter(name, config)
        wrapped = wrapped.eval()
        ids = torch.tensor(prompts, device=next(model.parameters()).device)
        clock = _Clock()
        with torch.inference_mode():
            wrapped.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=shape.num_new,
                min_new_tokens=shape.num_new, do_sample=False, pad_token_id=0, stopping_criteria=[clock],
                adapter_names=[names[i % num_adapters] for i in range(len(prompts))],
            )  # fmt: skip
    return statistics.median(b - a for a, b in itertools.pairwise(clock.times))


def continuous_step_s(model: Any, shape: Shape, prompts: list[list[int]], *, with_compiled: bool = False) -> float:
    """Median seconds of a decode step of all rows, by those of its settings that are fastest.

    Args:
        with_compiled: try a compiled forward pass too, which takes minutes for a large model.
    """
    # Without FlashAttention it leaves graphs and steps ahead out unless told otherwise, and pads to 16,384 keys.
    ahead = {
        "use_cuda_graph": True, "use_async_batching": True, "q_padding_interval_size": len(prompts),
        "kv_padding_interval_size": KV_PADDING,
    }  # fmt: skip
    settings: list[dict[str, Any]] = [{}]
    if next(model.parameters()).device.type == "cuda":
        settings += [{"use_cuda_graph": True}, ahead]
    if with_compiled:
        settings += [each | {"default_compile_level": 1} for each in settings[-1:]]
    steps = [_continuous_step_s(model, shape, prompts, each) for each in settings]
    return min(step for step in steps if step is not None)


def _continuous_step_s(model: Any, shape: Shape, prompts: list[list[int]], settings: Mapping[str, Any]) -> float | None:
    """With some settings; None if it fails with these."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    known = {each.name: each.default for each in fields(ContinuousBatchingConfig)}
    block_size: Any = known.get("page_size") or known["block_size"]  # its name in 5.17, and its own choice
    # Left alone it takes most of the memory, on a CPU most of the machine's.
    config = ContinuousBatchingConfig(
        num_blocks=2 * len(prompts) * -(-(shape.context + shape.num_new) // block_size),
        max_batch_tokens=max(MAX_BATCH_TOKENS, len(prompts)),
        **{name: value for name, value in settings.items() if name in known},
    )
    model.set_attn_implementation("sdpa")  # its name for "the best that is installed, paged"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(
                max_new_tokens=shape.num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=config,
            record_timestamps=True,
        )
    times = [result.timestamps for result in out.values() if len(result.generated_tokens) == shape.num_new]
    if len(times) < len(prompts):
        return None
    begun, first_end = max(row[0] for row in times), min(row[-1] for row in times)
    return statistics.median(
        b - a for row in times for a, b in itertools.pairwise(row) if begun <= a and b <= first_end
    )
