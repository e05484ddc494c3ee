"""`/admin/keys`: make, list and revoke API keys."""

import asyncio

from fastapi import APIRouter
from pydantic import ValidationError

from server.api.dependencies import Keys, Noted
from server.auth.keys import new_key
from server.errors import InvalidRequestError
from server.schemas.keys import KeyCreated, KeyInfo, KeyList, KeyRequest

__all__ = ["router"]

router = APIRouter(prefix="/admin", tags=["keys"])


@router.get("/keys")
async def list_keys(keys: Keys) -> KeyList:
    """All keys, oldest first, without their secrets."""
    return KeyList(keys=[KeyInfo.of(record) for record in keys.records()])


@router.post("/keys", status_code=201)
async def create_key(body: KeyRequest, keys: Keys, note: Noted) -> KeyCreated:
    """Make a key. Its secret is in this answer and nowhere else."""
    try:
        record, secret = new_key(
            body.name,
            body.scopes,
            tenant=body.tenant,
            adapters=body.adapters,
            limits=body.limits,
            expires_at=body.expires_at,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"`{field or 'scopes'}`: {first['msg']}", param=field or "scopes") from None
    note({"action": "create_key", "new_key_id": record.key_id})
    await asyncio.to_thread(keys.add, record)
    return KeyCreated(**KeyInfo.of(record).model_dump(), secret=secret)


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, keys: Keys, note: Noted) -> KeyInfo:
    """Revoke a key: it is not valid from now on; its running requests finish."""
    note({"action": "revoke_key", "revoked_key_id": key_id[:32]})
    return KeyInfo.of(await asyncio.to_thread(keys.remove, key_id))
