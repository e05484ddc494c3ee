"""The operations on adapters, without input or output of their own."""

from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel

from loramux_client._operation import Operation, reader
from loramux_client._upload import Progress, adapter_upload
from loramux_client.models import Adapter

__all__ = ["delete_adapter", "get_adapter", "list_adapters", "upload_adapter"]


class AdapterList(BaseModel):
    """All adapters, by name."""

    adapters: list[Adapter]


def _path(name: str, action: str = "") -> str:
    return f"/admin/adapters/{quote(name, safe='')}{action}"


def list_adapters() -> Operation[list[Adapter]]:
    """All that the caller may see."""
    read = reader(AdapterList)
    return Operation(
        method="GET", path="/admin/adapters", read=lambda content: read(content).adapters, changes_nothing=True
    )


def get_adapter(name: str) -> Operation[Adapter]:
    """One by name."""
    return Operation(method="GET", path=_path(name), read=reader(Adapter), changes_nothing=True)


def delete_adapter(name: str) -> Operation[Adapter]:
    """Hide one; its bytes go when nobody uses them."""
    return Operation(method="DELETE", path=_path(name), read=reader(Adapter))


def upload_adapter(
    source: str | Path, name: str | None, progress: Progress | bool, timeout_s: float | None
) -> Operation[Adapter]:
    """Publish a folder's or archive's adapter under a name, by default that of the folder or archive."""
    source = Path(source).expanduser()
    given = name or (source.resolve().name if source.is_dir() else source.name.partition(".")[0])
    return Operation(
        method="POST",
        path="/admin/adapters",
        upload=adapter_upload(source, {"name": given}, progress),
        read=reader(Adapter),
        timeout_s=timeout_s,
    )
