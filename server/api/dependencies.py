"""What routes get from the application, as named types."""

from typing import Annotated

from fastapi import Depends, Request

from server.adapters.import_root import ImportRoot
from server.adapters.service import AdapterService
from server.api.model_names import ModelNames
from server.api.openai import Services
from server.generation import GenerationService
from server.jobs.queue import JobQueue
from server.metrics import Metrics
from server.schemas.system import Info

__all__ = ["Adapters", "Generations", "Imports", "Jobs", "Names", "OpenAIServices", "ServedMetrics", "ServedModel"]


def _adapters(request: Request) -> AdapterService:
    return request.app.state.adapters


def _generations(request: Request) -> GenerationService:
    return request.app.state.generations


def _metrics(request: Request) -> Metrics:
    return request.app.state.metrics


def _names(request: Request) -> ModelNames:
    return request.app.state.names


def _imports(request: Request) -> ImportRoot:
    return request.app.state.imports


def _jobs(request: Request) -> JobQueue:
    return request.app.state.jobs


def _info(request: Request) -> Info:
    return request.app.state.info


Adapters = Annotated[AdapterService, Depends(_adapters)]
Imports = Annotated[ImportRoot, Depends(_imports)]
Jobs = Annotated[JobQueue, Depends(_jobs)]
Generations = Annotated[GenerationService, Depends(_generations)]


def _services(request: Request) -> Services:
    state = request.app.state
    return Services(state.generations, state.names, state.metrics, state.fingerprint)


Names = Annotated[ModelNames, Depends(_names)]
ServedMetrics = Annotated[Metrics, Depends(_metrics)]
ServedModel = Annotated[Info, Depends(_info)]
OpenAIServices = Annotated[Services, Depends(_services)]
