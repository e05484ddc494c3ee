"""Peers on the same device and model: PEFT's mixed batch, and transformers' continuous batching without adapters."""

import itertools
import statistics
import time
import warnings
from dataclasses import fields
from typing import Any

import torch

from tests.bench.gpu_model import Shape

__all__ = ["continuous_step_s", "peft_step_s"]

RANK = 16
MAX_BATCH_TOKENS = 2_048


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


def continuous_step_s(model: Any, shape: Shape, prompts: list[list[int]]) -> float:
    """Seconds of a decode step of all rows: what further tokens cost beyond a short run."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    known = {each.name: each.default for each in fields(ContinuousBatchingConfig)}
    page_size: Any = known.get("page_size") or known.get("block_size")  # its name before 5.18, and its own choice
    num_blocks = 2 * len(prompts) * -(-(shape.context + shape.num_new) // page_size)
    # Left alone it takes most of the memory, on a CPU most of the machine's.
    sizes = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max(MAX_BATCH_TOKENS, len(prompts)))
    model.set_attn_implementation("sdpa")
    short = 2

    def run(num_new: int) -> float:
        config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=sizes)
        seconds = time.perf_counter() - start
        assert all(len(result.generated_tokens) == num_new for result in out.values())
        return seconds

    run(short)
    return max(run(shape.num_new) - run(short), 1e-9) / (shape.num_new - short)
