"""`loramux keys`: API keys, in a file of this machine or on a running server."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from loramux_client import Key, KeyLimits
from server.auth.key_file import KeyFile
from server.auth.keys import KeyLimits as StoredLimits
from server.auth.keys import KeyRecord, Scope, new_key
from server.cli.connection import ApiKey, AsJson, ServerUrl, connected
from server.cli.console import console, report, show_json, show_table
from server.errors import ServerError

__all__ = ["app"]

app = typer.Typer(
    help="Make, list and revoke API keys: in a `--file`, or on a server with a key of the scope `admin`.",
    no_args_is_help=True,
)

T = TypeVar("T")
File = Annotated[Path | None, typer.Option("--file", envvar="LORAMUX_KEYS", help="The file that `serve --keys` reads.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="For people, to tell the keys apart.")],
    scope: Annotated[list[Scope], typer.Option("--scope", help="Repeatable.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="It sees this tenant's adapters.")] = None,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="Name or pattern; repeatable.")] = None,
    weight: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="Its tenant's share when all are busy.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1)] = None,
    expires: Annotated[datetime | None, typer.Option(help="In local time.")] = None,
    file: File = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its secret goes to standard output, this one time."""
    limits = {
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
    }
    expires_at = None if expires is None else expires.astimezone()
    if file is None:
        scopes = [one.value for one in scope]
        with connected(url, api_key) as client:
            key = client.keys.create(
                name, scopes, tenant=tenant, adapters=adapter, limits=KeyLimits(**limits), expires_at=expires_at
            )
        shown, secret = Key(**key.model_dump(exclude={"secret"})), key.secret
    else:
        try:
            record, secret = new_key(
                name, scope, tenant=tenant, adapters=adapter, limits=StoredLimits(**limits), expires_at=expires_at
            )
        except ValidationError as error:
            raise typer.BadParameter(str(error.errors()[0]["msg"])) from None
        _in_file(file, lambda keys: keys.add(record))
        shown = _key(record)
    if as_json:
        show_json(shown.model_dump(mode="json") | {"secret": secret})
    else:
        report(f"made key {shown.key_id}; it is shown this once:")
        typer.echo(secret)


@app.command("ls")
def list_keys(file: File = None, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List keys."""
    if file is None:
        with connected(url, api_key) as client:
            keys = client.keys.list()
    else:
        keys = [_key(record) for record in _in_file(file, _load)]
    if as_json:
        show_json(keys)
        return
    columns = ("ID", "NAME", "TENANT", "SCOPES", "ADAPTERS", "LIMITS", "EXPIRES")
    show_table(columns, map(_row, keys))


@app.command()
def revoke(
    key_id: str, file: File = None, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """End a key: it is not valid from now on."""
    if file is None:
        with connected(url, api_key) as client:
            key = client.keys.revoke(key_id)
    else:
        key = _key(_in_file(file, lambda keys: keys.remove(key_id)))
    if as_json:
        show_json(key)
    else:
        report(f"revoked key {key.key_id}")


def _load(keys: KeyFile) -> list[KeyRecord]:
    keys.load()
    return keys.records()


def _in_file(file: Path, use: Callable[[KeyFile], T]) -> T:
    try:
        return use(KeyFile(file))
    except ServerError as error:
        console.print("[red]error[/red]", error.message, f"({error.code})", markup=True)
        raise typer.Exit(3 if error.kind == "not_found" else 1) from None


def _key(record: KeyRecord) -> Key:
    values = record.model_dump(mode="json", exclude={"sha256"})
    return Key.model_validate(values | {"scopes": sorted(values["scopes"])})


def _row(key: Key) -> tuple[object, ...]:
    limits = ", ".join(f"{name} {value}" for name, value in key.limits.model_dump().items() if value is not None)
    adapters = "all" if key.adapters is None else ", ".join(key.adapters)
    expires = "never" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
    return key.key_id, key.name, key.tenant or "", ", ".join(sorted(key.scopes)), adapters, limits, expires
