"""The operations on adapters, without input or output of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from loramux_client._operation import Operation, reader
from loramux_client._progress import Progress
from loramux_client._upload import adapter_upload
from loramux_client.models import Adapter

__all__ = [
    "annotate_adapter",
    "delete_adapter",
    "get_adapter",
    "list_adapters",
    "list_generations",
    "post_action",
    "upload_adapter",
]


class AdapterList(BaseModel):
    """All adapters, by name."""

    adapters: list[Adapter]


class GenerationList(BaseModel):
    """All kept generations of an adapter, newest first."""

    generations: list[Adapter]


def _path(name: str, action: str = "") -> str:
    return f"/admin/adapters/{quote(name, safe='')}{action}"


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def list_adapters() -> Operation[list[Adapter]]:
    """All that the caller may see."""
    read = reader(AdapterList)
    return Operation(
        method="GET", path="/admin/adapters", read=lambda content: read(content).adapters, changes_nothing=True
    )


def get_adapter(name: str) -> Operation[Adapter]:
    """One by `name` or `name@generation`."""
    return Operation(method="GET", path=_path(name), read=reader(Adapter), changes_nothing=True)


def list_generations(name: str) -> Operation[list[Adapter]]:
    """All that are kept under a name, newest first."""
    read = reader(GenerationList)
    path = _path(name, "/generations")
    return Operation(method="GET", path=path, read=lambda content: read(content).generations, changes_nothing=True)


def delete_adapter(name: str, generation: int | None, expected_generation: int | None) -> Operation[Adapter]:
    """Hide a name, or drop one of its generations."""
    path = _path(name) if generation is None else _path(name, f"/generations/{generation}")
    params = _given(expected_generation=expected_generation)
    return Operation(method="DELETE", path=path, params=params, read=reader(Adapter))


def annotate_adapter(
    name: str, generation: int | None, labels: Mapping[str, str] | None, note: str | None
) -> Operation[Adapter]:
    """Replace labels or note."""
    body = _given(generation=generation, labels=None if labels is None else dict(labels), note=note)
    return Operation(method="PATCH", path=_path(name), json=body, read=reader(Adapter))


def post_action(
    name: str, action: str, *, changes_nothing: bool = False, timeout_s: float | None = None, **body: int | None
) -> Operation[Adapter]:
    """`rollback`, `promote`, `warm`, `evict`, `pin` or `unpin`."""
    return Operation(
        method="POST",
        path=_path(name, f"/{action}"),
        json=_given(**body) or None,
        read=reader(Adapter),
        changes_nothing=changes_nothing,
        timeout_s=timeout_s,
    )


def upload_adapter(
    source: str | Path, name: str | None, progress: Progress | bool, timeout_s: float | None, **publication: Any
) -> Operation[Adapter]:
    """Publish a folder's or archive's adapter under a name, by default that of the folder or archive."""
    source = Path(source).expanduser()
    given = name or (source.resolve().name if source.is_dir() else source.name.partition(".")[0])
    fields = _given(**publication)
    if "labels" in fields:
        fields["labels"] = json.dumps(dict(fields["labels"]))
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in fields.items()}
    return Operation(
        method="POST",
        path="/admin/adapters",
        upload=adapter_upload(source, {"name": given} | texts, progress),
        read=reader(Adapter),
        timeout_s=timeout_s,
    )
