"""`/`, `/generate` and `/generate_stream`, as TGI's and LoRAX's clients know them."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.dependencies import Generations, Names, ServedMetrics
from server.api.disconnect import CLIENT_CLOSED_REQUEST, ClientGoneError, or_disconnect
from server.api.envelopes import Family, dump, error_body
from server.api.model_names import ADAPTER_HEADER, ModelNames
from server.api.openapi import STREAM
from server.api.sse import EventStream, event
from server.api.tgi_answer import TgiAnswer
from server.delivery import GenerationGroup
from server.errors import InvalidRequestError, ServerError
from server.generation import GenerationService, GenerationTask
from server.metrics import Metrics
from server.schemas.answers import GenerateAnswer
from server.schemas.tgi import GenerateRequest
from server.text import StopRule

__all__ = ["router"]

router = APIRouter(tags=["generation"])

ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": GenerateAnswer, "content": STREAM}}
LIST: dict[int | str, dict[str, Any]] = {200: {"model": list[GenerateAnswer], "content": STREAM}}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": STREAM}}

ERROR_WORDS = frozenset({"generation", "incomplete_generation", "overloaded", "validation"})


@router.post("/generate", response_class=Response, responses=ANSWER)
async def generate(
    body: GenerateRequest, request: Request, generations: Generations, names: Names, metrics: ServedMetrics
) -> Response:
    """Generate a text with the base model, one adapter or a weighted mix, and answer when it is complete."""
    return await _respond(body, request, generations, names, metrics, wraps_in_list=False)


@router.post("/", response_class=Response, responses=LIST)
async def root(
    body: GenerateRequest, request: Request, generations: Generations, names: Names, metrics: ServedMetrics
) -> Response:
    """The same, as a list of one answer."""
    return await _respond(body, request, generations, names, metrics, wraps_in_list=True)


@router.post("/generate_stream", response_class=Response, responses=EVENTS)
async def generate_stream(
    body: GenerateRequest, request: Request, generations: Generations, names: Names, metrics: ServedMetrics
) -> Response:
    """The same as a stream: one event per token, the last one with the whole text."""
    return await _respond_with_stream(body, request, generations, names, metrics)


async def _respond(
    body: GenerateRequest,
    request: Request,
    generations: GenerationService,
    names: ModelNames,
    metrics: Metrics,
    *,
    wraps_in_list: bool,
) -> Response:
    if body.stream:
        return await _respond_with_stream(body, request, generations, names, metrics)
    try:
        answer = await or_disconnect(request, _collect(body, request, generations, names, metrics))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    plain = answer.plain()
    return Response(dump([plain] if wraps_in_list else plain), headers=answer.headers(), media_type="application/json")


async def _respond_with_stream(
    body: GenerateRequest, request: Request, generations: GenerationService, names: ModelNames, metrics: Metrics
) -> Response:
    if body.settings.num_sequences > 1:
        raise InvalidRequestError("`best_of` cannot be streamed", param="best_of")
    group, answer = await _start(body, request, generations, names)
    return EventStream(_stream(group, answer, metrics), answer.headers(), on_close=group.cancel)


async def _start(
    body: GenerateRequest, request: Request, generations: GenerationService, names: ModelNames
) -> tuple[GenerationGroup, TgiAnswer]:
    parameters = body.settings
    parameters.refuse_unsupported()
    weights = names.choose(body.weights(), header=request.headers.get(ADAPTER_HEADER))
    sampling = parameters.sampling(seed=secrets.randbits(63))
    task = GenerationTask(
        prompts=[body.inputs],
        sampling=sampling,
        num_sequences=parameters.num_sequences,
        adapters=weights,
        stop=StopRule(tuple(parameters.stop or ()), min_tokens=sampling.min_tokens),
        bad_words=parameters.bad_words or (),
        grammar=parameters.as_grammar(),
        truncate=parameters.truncate,
    )
    group = await generations.start(task)
    return group, TgiAnswer(body, group, generations.codec, model_id=names.model_id, weights=weights)


async def _collect(
    body: GenerateRequest, request: Request, generations: GenerationService, names: ModelNames, metrics: Metrics
) -> TgiAnswer:
    group, answer = await _start(body, request, generations, names)
    try:
        with metrics.observe(group):
            async for generation, token in group:
                answer.add(generation, token)
    finally:
        group.cancel()
    return answer


async def _stream(group: GenerationGroup, answer: TgiAnswer, metrics: Metrics) -> AsyncIterator[str]:
    try:
        with metrics.observe(group):
            async for generation, token in group:
                yield event(answer.add(generation, token))
    except ServerError as error:
        body = error_body(error, Family.TGI)
        if body["error_type"] not in ERROR_WORDS:
            body["error_type"] = "incomplete_generation"
        yield event(body)
