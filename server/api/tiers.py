"""`/admin/tiers`, and which adapters are in memory: warm, evict, pin, unpin."""

import asyncio

from fastapi import APIRouter

from server.api.admin import adapter_info
from server.api.dependencies import Adapters
from server.schemas.admin import AdapterInfo, Tiers

__all__ = ["router"]

router = APIRouter(prefix="/admin", tags=["adapters"])


@router.get("/tiers")
async def tiers(adapters: Adapters) -> Tiers:
    """What is where, and how often adapters were found there."""
    return await asyncio.to_thread(lambda: Tiers.of(adapters.tiers(), adapters.max_slots))


@router.post("/adapters/{name}/warm")
async def warm(name: str, adapters: Adapters) -> AdapterInfo:
    """Bring an adapter into a slot, after what requests wait for; answers when it is there."""
    await asyncio.wrap_future(adapters.warm(name))
    return adapter_info(adapters, adapters.get(name))


@router.post("/adapters/{name}/evict")
async def evict(name: str, adapters: Adapters) -> AdapterInfo:
    """Free an adapter's memory: at once, or when the requests that use it have ended."""
    return adapter_info(adapters, adapters.evict(name))


@router.post("/adapters/{name}/pin")
async def pin(name: str, adapters: Adapters) -> AdapterInfo:
    """Keep the name's current generation, whichever it is, in a slot, also after a restart."""
    return adapter_info(adapters, await asyncio.to_thread(adapters.pin, name))


@router.post("/adapters/{name}/unpin")
async def unpin(name: str, adapters: Adapters) -> AdapterInfo:
    """Let the adapter come and go again."""
    return adapter_info(adapters, await asyncio.to_thread(adapters.unpin, name))
