"""`/generate` and `/generate_stream`, as TGI's and LoRAX's clients know them."""

import math
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.dependencies import Generations, ServedMetrics, ServedModel
from server.api.disconnect import ClientGoneError, or_disconnect
from server.api.envelopes import Family, dump, error_body
from server.api.sse import EventStream, event
from server.engine import Token
from server.errors import ServerError
from server.generation import Generation, GenerationService
from server.metrics import Metrics
from server.schemas.system import Info
from server.schemas.tgi import GenerateRequest

__all__ = ["router"]

router = APIRouter(tags=["generation"])

LOWEST_LOGPROB = -9999.0  # JSON knows no infinity
ERROR_WORDS = frozenset({"generation", "incomplete_generation", "overloaded", "validation"})
CLIENT_CLOSED_REQUEST = 499


@router.post("/generate", response_class=Response)
async def generate(
    body: GenerateRequest, request: Request, generations: Generations, served: ServedModel, metrics: ServedMetrics
) -> Response:
    """Generate a text with the base model, one adapter or a weighted mix, and answer when it is complete."""
    call = _Call(body, served)
    try:
        answer = await or_disconnect(request, _collect(call, generations, metrics))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(dump(answer), headers=call.headers(), media_type="application/json")


@router.post("/generate_stream", response_class=Response)
async def generate_stream(
    body: GenerateRequest, generations: Generations, served: ServedModel, metrics: ServedMetrics
) -> Response:
    """The same as a stream: one event per token, the last one with the whole text."""
    call = _Call(body, served)
    generation = await call.start(generations)
    return EventStream(_stream(call, generation, metrics), call.headers(), on_close=generation.cancel)


class _Call:
    """One request on its way: what was asked, what has come, and how both look on the wire."""

    def __init__(self, body: GenerateRequest, served: Info) -> None:
        body.parameters.refuse_unsupported()
        self.body = body
        self.model_id = served.model_id
        self.weights = body.weights()
        self.weights.pop("__base_model__", None)
        if list(self.weights) == [served.model_id]:
            self.weights = {}
        self.sampling = body.parameters.sampling(seed=secrets.randbits(63))
        self.tokens: list[dict[str, Any]] = []
        self.text = body.inputs if body.parameters.return_full_text else ""
        self.generation: Generation | None = None

    async def start(self, generations: GenerationService) -> Generation:
        self.codec = generations.codec
        self.generation = await generations.start(
            self.body.inputs, self.sampling, adapters=self.weights, stop=self.body.parameters.stop or ()
        )
        return self.generation

    def add(self, token: Token) -> dict[str, Any]:
        """Take a token; returns it as the wire shows it."""
        special = self.codec.is_special(token.token_id)
        logprob = LOWEST_LOGPROB if token.logprob is None else token.logprob
        shown = {
            "id": token.token_id,
            "text": self.codec.token_text(token.token_id) if special else token.text,
            "logprob": logprob if math.isfinite(logprob) else LOWEST_LOGPROB,
            "special": special,
            "skipped": False,
        }
        self.text += token.text
        self.tokens.append(shown)
        return shown

    def details(self) -> dict[str, Any]:
        assert self.generation is not None
        assert self.generation.request is not None
        assert self.generation.finished is not None
        num_prompt_tokens = len(self.generation.request.prompt_ids)
        return {
            "finish_reason": self.generation.finished.reason.value,
            "prompt_tokens": num_prompt_tokens,
            "input_length": num_prompt_tokens,
            "generated_tokens": len(self.tokens),
            "skipped_tokens": 0,
            "seed": self.sampling.seed if self.sampling.temperature > 0 else None,
        }

    def headers(self) -> dict[str, str]:
        """What is known when the headers go out: all of it for a plain answer, the rest is left out for a stream."""
        headers = {"x-model-id": self.model_id, "x-compute-type": "loramux"}
        if self.weights:
            headers["x-adapter-id"] = ",".join(self.weights)
            headers["x-adapter-source"] = "local"
        generation = self.generation
        if generation is None or generation.request is None:
            return headers
        if generation.adapter_generations:
            headers["x-adapter-generation"] = ",".join(map(str, generation.adapter_generations.values()))
        timing = generation.timing
        num_prompt, num_generated = len(generation.request.prompt_ids), len(self.tokens)
        headers["x-prompt-tokens"] = str(num_prompt)
        if timing.first_token_s is not None and timing.finished_s is not None:
            total_s = time.monotonic() - timing.started_s
            headers |= {
                "x-generated-tokens": str(num_generated),
                "x-total-tokens": str(num_prompt + num_generated),
                "x-queue-time": _milliseconds(generation.queue_s),
                "x-inference-time": _milliseconds(total_s - generation.queue_s),
                "x-total-time": _milliseconds(total_s),
                "x-time-to-first-token": _milliseconds(timing.first_token_s - timing.started_s),
                "x-compute-characters": str(len(self.body.inputs)),
            }
        return headers


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


async def _collect(call: _Call, generations: GenerationService, metrics: Metrics) -> dict[str, Any]:
    generation = await call.start(generations)
    try:
        with metrics.observe(generation):
            async for token in generation:
                call.add(token)
    finally:
        generation.cancel()
    answer: dict[str, Any] = {"generated_text": call.text}
    if call.body.parameters.details:
        answer["details"] = call.details() | {"prefill": [], "tokens": call.tokens}
    return answer


async def _stream(call: _Call, generation: Generation, metrics: Metrics) -> AsyncIterator[str]:
    """One event per token; the last one carries the whole text."""
    try:
        with metrics.observe(generation):
            async for token in generation:
                shown = {
                    "index": len(call.tokens) + 1,
                    "token": call.add(token),
                    "generated_text": None,
                    "details": None,
                }
                if generation.is_complete:
                    last = shown
                else:
                    yield event(shown)
    except ServerError as error:
        body = error_body(error, Family.TGI)
        if body["error_type"] not in ERROR_WORDS:
            body["error_type"] = "incomplete_generation"
        yield event(body)
        return
    last["generated_text"] = call.text
    if call.body.parameters.details:
        last["details"] = call.details()
    yield event(last)
