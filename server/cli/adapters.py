"""`loramux adapters`: what is there, and what is done with it."""

from pathlib import Path
from typing import Annotated

import typer

from loramux_client import Adapter
from server.cli.connection import ApiKey, AsJson, ServerUrl, connected
from server.cli.console import report, show_json, show_table

__all__ = ["app"]

app = typer.Typer(
    help="Upload, list, show, remove adapters, and choose what is current and ready.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="`name`, or `name@generation`.")]
Expected = Annotated[
    int | None, typer.Option("--expected-generation", help="Refuse unless this generation is current.")
]
COLUMNS = ("NAME", "GEN", "TYPE", "RANK", "SIZE", "WHERE", "CREATED", "NOTE")


@app.command("ls")
def list_adapters(url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List adapters."""
    with connected(url, api_key) as client:
        adapters = client.adapters.list()
    if as_json:
        show_json(adapters)
    else:
        show_table(COLUMNS, map(_row, adapters))


@app.command()
def show(name: Name, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show an adapter and its generations."""
    with connected(url, api_key) as client:
        adapter = client.adapters.get(name)
        if as_json:
            show_json(adapter)
            return
        generations = client.adapters.generations(name.partition("@")[0])
    facts = adapter.model_dump(exclude={"details", "labels", "source", "usage"})
    groups = {"details": adapter.details, "label": adapter.labels, "source": adapter.source, "usage": adapter.usage}
    more = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    show_table(("FACT", ""), (facts | more).items())
    typer.echo()
    show_table(("", *COLUMNS), (("*" if one.is_current else "", *_row(one)) for one in generations))


@app.command()
def upload(
    source: Annotated[Path, typer.Argument(help="A PEFT folder, or a zip, tar or tar.gz of one.")],
    name: Annotated[str | None, typer.Option("--name", help="By default that of the folder or archive.")] = None,
    expected_generation: Expected = None,
    promote: Annotated[bool, typer.Option(help="Make it current; else it is `name@generation`.")] = True,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")] = None,
    note: Annotated[str | None, typer.Option("--note")] = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter. When this ends, it is checked, complete and safe on disk."""
    labels = None if label is None else dict(_label(text) for text in label)
    with connected(url, api_key) as client:
        adapter = client.adapters.upload(
            source,
            name,
            expected_generation=expected_generation,
            promote=promote,
            labels=labels,
            note=note,
            progress=not as_json,
        )
    _show_change("uploaded", adapter, as_json)


@app.command("rm")
def remove(
    name: Name,
    expected_generation: Expected = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter, or with `name@generation` one that is not current."""
    if not yes:
        typer.confirm(f"Delete {name}?", abort=True, err=True)
    bare, at, generation = name.rpartition("@")
    is_one = bool(at) and generation.isdecimal()
    with connected(url, api_key) as client:
        adapter = client.adapters.delete(
            bare if is_one else name,
            generation=int(generation) if is_one else None,
            expected_generation=expected_generation,
        )
    _show_change("deleted", adapter, as_json)


@app.command()
def rollback(
    name: Name,
    to: Annotated[int | None, typer.Option("--to", help="A generation; by default the next older one.")] = None,
    expected_generation: Expected = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make another generation the current one; requests that run finish on theirs."""
    with connected(url, api_key) as client:
        if to is None:
            adapter = client.adapters.rollback(name, expected_generation=expected_generation)
        else:
            adapter = client.adapters.promote(name, to, expected_generation=expected_generation)
    _show_change("current is", adapter, as_json)


@app.command()
def warm(name: Name, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Make an adapter ready for use, before anybody asks for it."""
    with connected(url, api_key) as client:
        adapter = client.adapters.warm(name)
    _show_change("ready", adapter, as_json)


@app.command()
def evict(name: Name, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Free an adapter's memory, once the requests that use it have ended."""
    with connected(url, api_key) as client:
        adapter = client.adapters.evict(name)
    _show_change("evicted", adapter, as_json)


@app.command()
def pin(
    name: Name,
    undo: Annotated[bool, typer.Option("--undo", help="Let it come and go again.")] = False,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter's current generation, whichever it is, ready for use."""
    with connected(url, api_key) as client:
        adapter = client.adapters.unpin(name) if undo else client.adapters.pin(name)
    _show_change("unpinned" if undo else "pinned", adapter, as_json)


def _show_change(word: str, adapter: Adapter, as_json: bool) -> None:
    if as_json:
        show_json(adapter)
    else:
        report(f"{word} {adapter.name}@{adapter.generation} [dim]{adapter.digest[:12]}")


def _row(adapter: Adapter) -> tuple[object, ...]:
    where = adapter.residency + (", pinned" if adapter.is_pinned else "")
    size = f"{adapter.num_bytes / 1e6:.1f} MB"
    created = f"{adapter.created_at:%Y-%m-%d %H:%M}"
    kind, rank = adapter.details.get("type", ""), adapter.details.get("rank", "")
    return adapter.name, adapter.generation, kind, rank, size, where, created, adapter.note


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: write KEY=VALUE")
    return key, value
