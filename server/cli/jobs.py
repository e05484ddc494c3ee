"""`loramux jobs`, and the jobs that have commands of their own: `mix`, `merge`, `convert`, `loftq`."""

from typing import Annotated, Any

import typer

from loramux_client import Job
from server.cli.connection import ApiKey, AsJson, ServerUrl, connected, parse_adapters
from server.cli.console import report, show_json, show_table

__all__ = ["app", "convert", "loftq", "merge", "mix"]

app = typer.Typer(help="Long work on adapters: look at it, wait for it, end it, try it again.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB")]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="Of the new adapter.")]
Wait = Annotated[bool, typer.Option(help="Until it has ended; else it goes on without you.")]
OriginalPath = Annotated[
    str | None,
    typer.Option("--original-path", help="The unquantized model's folder, if the base's own files are quantized."),
]
Note = Annotated[str | None, typer.Option("--note", help="Kept with the new generation.")]


def mix(
    name: NewName,
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", metavar="NAME[=WEIGHT]", help="Repeat it.")],
    combination_type: Annotated[str, typer.Option("--type", help="As in PEFT: svd, cat, linear, ties, ...")] = "svd",
    rank: Annotated[int | None, typer.Option("--rank", help="For the svd types.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="For the ties, dare and prune types.")] = None,
    note: Note = None,
    wait: Wait = True,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Combine adapters into a new one. (A request can also name a mix itself, without any job.)"""
    options = {
        "name": name,
        "adapters": _sources(adapter),
        "combination_type": combination_type,
        "svd_rank": rank,
        "density": density,
        "note": note,
    }
    _run("mix", options, wait, url, api_key, as_json)


def merge(
    adapter: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...")],
    safe_merge: Annotated[bool, typer.Option(help="Look for values that are not finite.")] = True,
    original_path: OriginalPath = None,
    wait: Wait = True,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into the base: a model folder of its own, on the server."""
    options = {"adapters": _sources(adapter), "safe_merge": safe_merge, "original_path": original_path}
    _run("merge", options, wait, url, api_key, as_json)


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER")],
    name: NewName,
    rank: Annotated[
        int | None, typer.Option("--rank", help="DoRA becomes LoRA of this rank, as near as that goes.")
    ] = None,
    original_path: OriginalPath = None,
    note: Note = None,
    wait: Wait = True,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter into plain LoRA."""
    options = {"adapter": adapter, "name": name, "rank": rank, "original_path": original_path, "note": note}
    _run("convert", options, wait, url, api_key, as_json)


def loftq(
    name: NewName,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="Whose start this is; else a new one.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of a new one.")] = None,
    target_module: Annotated[
        list[str] | None, typer.Option("--target-module", help="Of a new one; all linear layers. Repeatable.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="nf4, fp4 or int8; as the base is served by default.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text of the kind that is asked. Repeatable.")
    ] = None,
    original_path: OriginalPath = None,
    judge: Annotated[bool, typer.Option(help="Keep only the modules that help on these texts.")] = True,
    compensation: Annotated[
        bool, typer.Option("--compensation", help="Not a start for training, but an adapter to mix into requests.")
    ] = False,
    note: Note = None,
    wait: Wait = True,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of what quantizing the base took from it."""
    if compensation and (adapter or target_module or not judge):
        raise typer.BadParameter("--compensation goes with --rank, --quantization, --prompt and --original-path only")
    options = {"name": name, "rank": rank, "quantization": quantization, "prompts": prompt, "note": note}
    options["original_path"] = original_path
    if not compensation:
        options |= {"adapter": adapter, "target_modules": target_module, "judge": judge}
    _run("loftq-compensation" if compensation else "loftq", options, wait, url, api_key, as_json)


@app.command("ls")
def list_jobs(url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List jobs, newest first."""
    with connected(url, api_key) as client:
        jobs = client.jobs.list()
    if as_json:
        show_json(jobs)
    else:
        show_table(("JOB", "KIND", "STATE", "DONE", "CREATED", ""), map(_row, jobs))


@app.command()
def show(job_id: JobId, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show a job."""
    with connected(url, api_key) as client:
        _show(client.jobs.get(job_id), as_json)


@app.command("wait")
def wait_for(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option("--timeout-s", min=0)] = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job's end; fails if the job does."""
    with connected(url, api_key) as client:
        _show(client.jobs.wait(job_id, progress=not as_json, timeout_s=timeout), as_json)


@app.command()
def cancel(job_id: JobId, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """End a job that has not ended."""
    with connected(url, api_key) as client:
        _show(client.jobs.cancel(job_id), as_json)


@app.command()
def retry(job_id: JobId, url: ServerUrl = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Queue a job again that failed, was cancelled or interrupted."""
    with connected(url, api_key) as client:
        _show(client.jobs.retry(job_id), as_json)


@app.command()
def verify(
    adapter: Annotated[list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="All by default.")] = None,
    wait: Wait = True,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check stored adapters again: digests, files, values, and whether they fit."""
    _run("verify", {"adapters": adapter or []}, wait, url, api_key, as_json)


def _sources(adapters: list[str]) -> list[dict[str, Any]]:
    """A job's adapters with their weights."""
    weights = parse_adapters(adapters)
    entries = {weights: 1.0} if isinstance(weights, str) else weights or {}
    return [{"name": name, "weight": weight} for name, weight in entries.items()]


def _run(kind: str, options: dict[str, Any], wait: bool, url: str | None, api_key: str | None, as_json: bool) -> None:
    with connected(url, api_key) as client:
        job = client.jobs.create(kind, **options)
        if wait:
            job = client.jobs.wait(job, progress=not as_json)
        elif not as_json:
            report(f"queued job {job.job_id}: `loramux jobs wait {job.job_id}`")
            return
    _show(job, as_json)


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        show_json(job)
        return
    facts = {"job": job.job_id, "kind": job.kind, "state": job.state, "stage": job.stage, "done": f"{job.fraction:.0%}"}
    groups = {"result": job.result, "error": job.error}
    more = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    show_table(("FACT", ""), (facts | more).items())


def _row(job: Job) -> tuple[object, ...]:
    more = job.error.get("message") or job.stage
    return job.job_id, job.kind, job.state, f"{job.fraction:.0%}", job.created_at[:16].replace("T", " "), more
