"""vLLM's and mistral.rs' routes for loading and unloading adapters, over our own uploads and deletes.

Controllers call them in retry loops, so a call that has been obeyed already succeeds again.
"""

import asyncio

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from server.adapters.import_root import ImportRoot
from server.adapters.objects import FILE_NAMES, digest_of
from server.adapters.record import Publication
from server.adapters.service import AdapterService
from server.api.dependencies import AllAdapters, Imports
from server.errors import ConflictError, InvalidRequestError, NotFoundError
from server.schemas.lifecycle import LoadedAdapter, LoadedGeneration, LoadedList, LoadRequest, UnloadRequest

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load(body: LoadRequest, adapters: AllAdapters, imports: Imports) -> PlainTextResponse:
    """Import a folder below the import root under a name."""
    await asyncio.to_thread(_load, body, adapters, imports)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(body: UnloadRequest, adapters: AllAdapters) -> PlainTextResponse:
    """Delete an adapter; requests that run finish."""
    await asyncio.to_thread(_unload, body, adapters)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/lora_adapters")
async def list_loaded(adapters: AllAdapters) -> LoadedList:
    """All adapters, and those of their contents that are in memory or in use."""
    stats, records = adapters.tiers(), adapters.records()
    aliases: dict[str, list[str]] = {}
    ranks: dict[str, int] = {}
    for record in records:
        aliases.setdefault(record.digest, []).append(record.name)
        ranks[record.digest] = record.details["rank"]
    resident = sorted({*stats.slots, *(digest for digest, number in stats.leases.items() if number)})
    generations = [
        LoadedGeneration(
            generation=digest,
            aliases=aliases.get(digest, []),
            bytes=adapters.folded_bytes(digest),
            rank=ranks.get(digest),
            active_leases=stats.leases.get(digest, 0),
            retired=digest not in aliases,
        )
        for digest in resident
    ]
    return LoadedList(
        max_adapters=adapters.max_slots,
        max_bytes=stats.slot_tier.max_bytes,
        max_rank=adapters.max_rank,
        resident_bytes=stats.slot_tier.num_bytes,
        resident_generations=len(stats.slots),
        retired_generations=sum(one.retired for one in generations),
        generations=generations,
        data=[
            LoadedAdapter(
                id=record.name,
                generation=record.digest,
                rank=record.details["rank"],
                bytes=record.num_bytes,
                source=record.source.get("kind"),
                revision=record.source.get("options", {}).get("revision"),
            )
            for record in records
        ],
    )


def _load(body: LoadRequest, adapters: AdapterService, imports: ImportRoot) -> None:
    adapters.check_name(body.lora_name)
    folder = imports.folder(body.lora_path)
    if not all((folder / name).is_file() for name in FILE_NAMES):
        raise NotFoundError("there is no adapter in this folder", code="path_not_found", param="lora_path")
    current, digest = adapters.peek(body.lora_name).current_record, digest_of(folder)
    if current is not None and digest in (current.digest, current.source.get("sent_digest")):
        return  # a retry
    expected = _expected(body, adapters)
    if not body.load_inplace and expected is None:
        expected = 0
    # A converted adapter's own digest is another than that of what was sent.
    source = {"kind": "path", "sent_digest": digest}
    try:
        adapters.import_folder(body.lora_name, folder, Publication(expected_generation=expected, source=source))
    except ConflictError as error:
        if body.expected_generation is not None:
            raise
        raise InvalidRequestError(
            f"The lora adapter '{body.lora_name}' has already been loaded: set `load_inplace` to replace it",
            code="adapter_exists",
            param="lora_name",
        ) from error


def _unload(body: UnloadRequest, adapters: AdapterService) -> None:
    try:
        adapters.delete(body.lora_name, expected_generation=_expected(body, adapters))
    except NotFoundError:
        if not adapters.existed(body.lora_name):
            raise


def _expected(body: LoadRequest | UnloadRequest, adapters: AdapterService) -> int | None:
    """The expected generation as a number; -1, which no generation has, for a digest that is not current."""
    if not isinstance(body.expected_generation, str):
        return body.expected_generation
    current = adapters.peek(body.lora_name).current_record
    return current.generation if current is not None and current.digest == body.expected_generation else -1
