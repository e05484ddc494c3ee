"""What routes get from the application, as named types."""

from typing import Annotated

from fastapi import Depends, Request

from server.adapters.service import AdapterService
from server.generation import GenerationService
from server.metrics import Metrics
from server.schemas.system import Info

__all__ = ["Adapters", "Generations", "ServedMetrics", "ServedModel"]


def _adapters(request: Request) -> AdapterService:
    return request.app.state.adapters


def _generations(request: Request) -> GenerationService:
    return request.app.state.generations


def _metrics(request: Request) -> Metrics:
    return request.app.state.metrics


def _info(request: Request) -> Info:
    return request.app.state.info


Adapters = Annotated[AdapterService, Depends(_adapters)]
Generations = Annotated[GenerationService, Depends(_generations)]
ServedMetrics = Annotated[Metrics, Depends(_metrics)]
ServedModel = Annotated[Info, Depends(_info)]
