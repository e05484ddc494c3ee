"""Health, metrics, facts, and the list of models."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from server.api.dependencies import Adapters, Generations, ServedMetrics, ServedModel
from server.api.envelopes import dump
from server.errors import NotFoundError
from server.schemas.system import Info, ModelCard, ModelList

__all__ = ["router"]

router = APIRouter(tags=["system"])

EMPTY: dict[int | str, dict[str, Any]] = {200: {"description": "No body."}}
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/", response_class=Response, responses=EMPTY)
@router.get("/ping", response_class=Response, responses=EMPTY)
@router.get("/health", response_class=Response, responses=EMPTY)
async def health(generations: Generations) -> Response:
    """200 with an empty body when the engine runs."""
    if generations.engine.is_healthy:
        return Response()
    return Response(dump({"error": "unhealthy", "error_type": "healthcheck"}), 503, media_type="application/json")


@router.get("/metrics", response_class=Response, responses=METRICS)
async def metrics(served: ServedMetrics) -> Response:
    """Figures in Prometheus' text format."""
    text = await asyncio.to_thread(served.render)  # thousands of adapters take a while
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/info")
async def info(served: ServedModel) -> Info:
    """What is served, and its limits."""
    return served


@router.get("/v1/models")
async def models(served: ServedModel, adapters: Adapters) -> ModelList:
    """The base model first, then the adapters, with the base as their parent."""
    return ModelList(data=_cards(served, adapters))


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, served: ServedModel, adapters: Adapters) -> ModelCard:
    """One model of the list."""
    for card in _cards(served, adapters):
        if card.id == model_id:
            return card
    raise NotFoundError(f"The model `{model_id}` does not exist", code="model_not_found", param="model")


def _cards(served: Info, adapters: Adapters) -> list[ModelCard]:
    def card(model_id: str, created: int, parent: str | None) -> ModelCard:
        return ModelCard(
            id=model_id, created=created, root=model_id, parent=parent, max_model_len=served.max_total_tokens
        )

    base = card(served.model_id, adapters.started_at, None)
    return [base, *(card(a.name, a.created_unix, served.model_id) for a in adapters.records())]
