"""`/admin/adapters`: upload, list, show, delete, and which generation of a name is current."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from server.adapters.store import AdapterRecord
from server.api.dependencies import Adapters
from server.api.upload_form import OPENAPI_BODY, read_upload_form
from server.schemas.admin import (
    AdapterInfo,
    AdapterList,
    Annotation,
    ExpectedGeneration,
    GenerationList,
    PromoteRequest,
)
from server.tenancy import CallerAdapters

__all__ = ["adapter_info", "router"]

router = APIRouter(prefix="/admin", tags=["adapters"])

GenerationPath = Annotated[int, Path(ge=1, le=10**18)]
Expected = Annotated[int | None, Query(ge=0, le=10**18, description="refuse unless this generation is current")]
NOTHING_EXPECTED = ExpectedGeneration()


@router.post("/adapters", status_code=201, openapi_extra=OPENAPI_BODY)
async def upload(request: Request, adapters: Adapters) -> AdapterInfo:
    """Upload a PEFT adapter as a new generation. 201 means that it is checked, complete and safe on disk."""
    async with read_upload_form(request) as form:
        record = await asyncio.to_thread(form.publish, adapters)
    return adapter_info(adapters, record)


@router.get("/adapters")
async def list_adapters(adapters: Adapters) -> AdapterList:
    """The current generation of every adapter, by name."""
    return AdapterList(adapters=[AdapterInfo.of(view) for view in adapters.views()])


@router.get("/adapters/{name}")
async def show(name: str, adapters: Adapters) -> AdapterInfo:
    """One adapter, by `name` or `name@generation`."""
    return adapter_info(adapters, adapters.get(name))


@router.patch("/adapters/{name}")
async def annotate(name: str, body: Annotation, adapters: Adapters) -> AdapterInfo:
    """Replace a generation's labels or note."""
    record = await asyncio.to_thread(adapters.annotate, name, body.generation, body.labels, body.note)
    return adapter_info(adapters, record)


@router.delete("/adapters/{name}")
async def delete(name: str, adapters: Adapters, expected_generation: Expected = None) -> AdapterInfo:
    """Delete an adapter with all of its generations: new requests for it get 404 at once, running ones finish."""
    record = await asyncio.to_thread(adapters.delete, name, expected_generation=expected_generation)
    return adapter_info(adapters, record)


@router.get("/adapters/{name}/generations")
async def list_generations(name: str, adapters: Adapters) -> GenerationList:
    """All kept generations, newest first."""
    return GenerationList(name=name, generations=[AdapterInfo.of(view) for view in adapters.generations(name)])


@router.delete("/adapters/{name}/generations/{generation}")
async def delete_generation(name: str, generation: GenerationPath, adapters: Adapters) -> AdapterInfo:
    """Drop a generation that is not current."""
    return adapter_info(adapters, await asyncio.to_thread(adapters.delete_generation, name, generation))


@router.post("/adapters/{name}/promote")
async def promote(name: str, body: PromoteRequest, adapters: Adapters) -> AdapterInfo:
    """Make a kept generation the current one; requests that run finish on theirs."""
    record = await asyncio.to_thread(
        adapters.promote, name, body.generation, expected_generation=body.expected_generation
    )
    return adapter_info(adapters, record)


@router.post("/adapters/{name}/rollback")
async def rollback(name: str, adapters: Adapters, body: ExpectedGeneration = NOTHING_EXPECTED) -> AdapterInfo:
    """Make the next older kept generation the current one."""
    record = await asyncio.to_thread(adapters.rollback, name, expected_generation=body.expected_generation)
    return adapter_info(adapters, record)


def adapter_info(adapters: CallerAdapters, record: AdapterRecord) -> AdapterInfo:
    """A generation as answers show it."""
    return AdapterInfo.of(adapters.view(record))
