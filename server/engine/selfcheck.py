"""The start-up check: the engine's logits against transformers' own, on the model that is about to be served.

An architecture can use a feature that no list foresaw. Whatever it is, it shows here: two prompts, packed and cut into
chunks as in serving, must give the logits of a plain forward pass with transformers' reference attention.
"""

import torch
from torch import Tensor

from server.engine.batch import build_batch
from server.engine.quantization import OwnLinear
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.runner import ModelRunner
from server.engine.scheduler import Chunk, Step
from server.errors import InvalidRequestError

__all__ = ["MAX_RELATIVE_ERROR", "check_against_reference"]

CUTS = ((0, 10), (10, 22), (22, 23))  # of the longer prompt; the last one is a decode step
# Layers that round what comes in: last bits decide, and transformers' int8 ones split off columns by all tokens.
MAX_RELATIVE_ERROR_ROUNDED = 0.15
MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_against_reference(runner: ModelRunner) -> float:
    """Compare and return the relative error ‖engine - reference‖ / ‖reference‖ of the logits.

    Raises:
        InvalidRequestError: code `model_unsupported`, the error is above `MAX_RELATIVE_ERROR`.
    """
    reference = runner.reference
    engine = _engine_logits(runner, reference.prompts)
    error = float((engine - reference.logits).norm() / reference.logits.norm())
    rounds_inputs = runner.quantization in ("int8", "int4") or any(
        isinstance(m, OwnLinear) for m in runner.model.modules()
    )
    if not error <= (MAX_RELATIVE_ERROR_ROUNDED if rounds_inputs else MAX_RELATIVE_ERROR.get(runner.dtype, 5e-2)):
        raise InvalidRequestError(
            f"{type(runner.model).__name__} needs something that the engine does not do: its logits differ from "
            f"transformers' own by {error:.1%}",
            code="model_unsupported",
        )
    return error


def _engine_logits(runner: ModelRunner, prompts: list[list[int]]) -> Tensor:
    """[2, V], the longer prompt in chunks, the other beside it in the first step."""
    size = runner.config.block_size
    longer, shorter = (
        GenerationRequest(f"check-{i}", prompt, SamplingParams(max_new_tokens=1), emit=lambda _: None)
        for i, prompt in enumerate(prompts)
    )
    count = -(-len(longer.prompt_ids) // size)
    longer.block_ids = list(range(1, 1 + count))
    shorter.block_ids = list(range(1 + count, 1 + count - (-len(shorter.prompt_ids) // size)))
    blocks = longer.block_ids + shorter.block_ids
    if blocks[-1] >= runner.cache.num_blocks:
        raise InvalidRequestError("the KV cache is too small for two short prompts", code="kv_cache_too_small")
    out: dict[str, Tensor] = {}
    for i, (start, end) in enumerate(CUTS):
        stop = min(end, len(longer.prompt_ids))
        if start >= stop:
            break
        step = Step([Chunk(longer, start, stop - start)], blocks if i == 0 else [])
        if i == 0:
            step.chunks.append(Chunk(shorter, 0, len(shorter.prompt_ids)))
        batch = build_batch(step, size, runner.device, spans_only=runner.reads_spans)
        logits = runner.forward(batch).float()
        out |= {request.request_id: row for request, row in zip(batch.sampled, logits, strict=True)}
        longer.num_computed = stop
    runner.cache.zero(blocks)
    return torch.stack([out[longer.request_id], out[shorter.request_id]])
