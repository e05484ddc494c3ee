"""What routes get from the application, as named types. Adapters, names and generations are those of the caller."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Request

from server.adapters.import_root import ImportRoot
from server.adapters.service import AdapterService
from server.api.model_names import ModelNames
from server.api.openai import Services
from server.auth.caller import Caller
from server.auth.key_file import KeyFile
from server.auth.limits import Limiter
from server.errors import InvalidRequestError
from server.generation import GenerationService
from server.metrics import Metrics
from server.schemas.system import Info
from server.tenancy import CallerAdapters, Note
from server.tenant_jobs import CallerJobs

__all__ = [
    "Adapters",
    "AllAdapters",
    "Generations",
    "Imports",
    "Jobs",
    "Keys",
    "Names",
    "Noted",
    "OpenAIServices",
    "ServedMetrics",
    "ServedModel",
]


async def _note(request: Request) -> Note:
    return getattr(request.state, "note", _forget)


def _forget(facts: Mapping[str, object]) -> None:
    """Where there is no audit log."""


async def _keys(request: Request) -> KeyFile:
    keys = request.app.state.keys
    if keys is None:
        raise InvalidRequestError("this server runs without keys: start it with `--keys`", code="keys_disabled")
    return keys


async def _metrics(request: Request) -> Metrics:
    return request.app.state.metrics


async def _info(request: Request) -> Info:
    return request.app.state.info


async def _all_adapters(request: Request) -> AdapterService:
    """For routes that only the scope `admin` reaches."""
    return request.app.state.adapters


async def _imports(request: Request) -> ImportRoot:
    return request.app.state.imports


AllAdapters = Annotated[AdapterService, Depends(_all_adapters)]
Imports = Annotated[ImportRoot, Depends(_imports)]
Noted = Annotated[Note, Depends(_note)]
Keys = Annotated[KeyFile, Depends(_keys)]
ServedMetrics = Annotated[Metrics, Depends(_metrics)]
ServedModel = Annotated[Info, Depends(_info)]


async def _adapters(request: Request, note: Noted) -> CallerAdapters:
    return CallerAdapters(request.app.state.adapters, request.state.caller, note)


Adapters = Annotated[CallerAdapters, Depends(_adapters)]


async def _jobs(request: Request, adapters: Adapters, note: Noted) -> CallerJobs:
    return CallerJobs(request.app.state.jobs, adapters, request.state.caller, note)


Jobs = Annotated[CallerJobs, Depends(_jobs)]


async def _generations(request: Request, adapters: Adapters) -> GenerationService:
    caller: Caller = request.state.caller
    limiter: Limiter = request.app.state.limiter
    return request.app.state.generations.for_caller(
        adapters, tenant=caller.tenant, charge=lambda num_tokens: limiter.charge(caller, num_tokens)
    )


async def _names(request: Request, adapters: Adapters) -> ModelNames:
    return request.app.state.names.for_caller(adapters.knows)


Generations = Annotated[GenerationService, Depends(_generations)]
Names = Annotated[ModelNames, Depends(_names)]


async def _services(request: Request, generations: Generations, names: Names, metrics: ServedMetrics) -> Services:
    return Services(generations, names, metrics, request.app.state.fingerprint)


OpenAIServices = Annotated[Services, Depends(_services)]
