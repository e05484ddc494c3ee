"""`loramux serve`."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from server.cli.console import console, report
from server.cli.options import option, parse_adapter_option, size_option
from server.errors import ServerError
from server.failpoints import ENVIRONMENT_VARIABLE, arm
from server.settings import Settings

__all__ = ["serve"]

DEFAULTS = Settings()
LAST_ANSWERS_S = 5  # for answers that are on their way when all work has ended
# The engine lets go of the interpreter at every operator, and then waits so long for a thread that computes in Python.
SWITCH_INTERVAL_S = 0.0005


def serve(
    model: Annotated[
        str, option("--model", '"demo", a local Hugging Face model folder, or a GGUF file.')
    ] = DEFAULTS.model,
    store: Annotated[Path, option("--store", "Folder that keeps uploaded adapters.")] = DEFAULTS.store,
    host: Annotated[str, option("--host", "Address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, option("--port", "Port to listen on.")] = DEFAULTS.port,
    keys: Annotated[
        Path | None, option("--keys", "File of API keys; see `loramux keys`. None: no keys needed.")
    ] = None,
    audit_log: Annotated[
        Path | None, option("--audit-log", "Log of changes; beside the keys if there are any.")
    ] = None,
    allow_open: Annotated[
        bool, option("--allow-open", "Start without keys on an address that others can reach.")
    ] = DEFAULTS.allow_open,
    open_metrics: Annotated[bool, option("--open-metrics", "No key for /metrics.")] = DEFAULTS.open_metrics,
    drain_timeout_s: Annotated[
        float, option("--drain-timeout-s", "Seconds for running requests to finish after SIGTERM.")
    ] = DEFAULTS.drain_timeout_s,
    device: Annotated[str, option("--device", '"auto", "cpu", "cuda", "cuda:1" ...')] = DEFAULTS.device,
    dtype: Annotated[str, option("--dtype", '"auto", "float32", "bfloat16" or "float16".')] = DEFAULTS.dtype,
    quantization: Annotated[
        str,
        option(
            "--quantization",
            '"none", "nf4", "fp4" or "int8": hold linear layers in so many bits (bitsandbytes); "int4": 4 bits on a '
            "CPU, without bitsandbytes.",
        ),
    ] = DEFAULTS.quantization,
    double_quant: Annotated[
        bool, option("--double-quant", "With 4 bits, hold their scales in 8 bits.")
    ] = DEFAULTS.double_quant,
    adapter: Annotated[
        list[str] | None,
        option(
            "--adapter", "NAME=DIR: import a PEFT folder under a name that the store does not know yet. Repeatable."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, option("--served-model-name", "Name of the base model for clients.")
    ] = None,
    model_alias: Annotated[
        list[str] | None,
        option("--model-alias", "One more name for the base model; tgi and dummy by default. Repeatable."),
    ] = None,
    threads: Annotated[int | None, option("--threads", "CPU cores for the engine; all by default.")] = None,
    max_running: Annotated[int, option("--max-running", "Requests that generate at once.")] = DEFAULTS.max_running,
    max_waiting: Annotated[
        int, option("--max-waiting", "Requests that may wait; more get 429.")
    ] = DEFAULTS.max_waiting,
    max_step_tokens: Annotated[
        int, option("--max-step-tokens", "Tokens computed in one step; long prompts are cut to it.")
    ] = DEFAULTS.max_step_tokens,
    target_step_ms: Annotated[
        int,
        option(
            "--target-step-ms", "Prompts are cut so that a step beside running streams takes this; 0: they are not."
        ),
    ] = DEFAULTS.target_step_ms,
    prefix_cache: Annotated[
        bool, option("--prefix-cache/--no-prefix-cache", "Keep computed prompts, and compute what they share once.")
    ] = DEFAULTS.prefix_cache,
    kernels: Annotated[
        str, option("--kernels", '"triton" (on CUDA), "torch", or "auto": adapters and attention are computed with it.')
    ] = DEFAULTS.kernels,
    cuda_graphs: Annotated[
        bool, option("--cuda-graphs/--no-cuda-graphs", "Replay recorded decoding steps, with Triton kernels on CUDA.")
    ] = DEFAULTS.cuda_graphs,
    tune_kernels: Annotated[
        bool,
        option(
            "--tune-kernels/--no-tune-kernels",
            "Measure Triton kernels' launch parameters before serving; they are kept in the cache folder.",
        ),
    ] = DEFAULTS.tune_kernels,
    max_slots: Annotated[int, option("--max-slots", "Adapters that can be in use at once.")] = DEFAULTS.max_slots,
    max_rank: Annotated[int, option("--max-rank", "Highest adapter rank accepted.")] = DEFAULTS.max_rank,
    max_model_len: Annotated[
        int | None, option("--max-model-len", "Longest sequence, prompt and output, in tokens.")
    ] = None,
    kv_memory: Annotated[
        int | None,
        size_option("--kv-memory", "Memory for keys and values; 1 GiB by default, on CUDA most of what is free."),
    ] = None,
    slot_memory: Annotated[
        int | None, size_option("--slot-memory", "Memory for adapters in slots; a quarter of what is free by default.")
    ] = None,
    host_memory: Annotated[
        int | None, size_option("--host-memory", "Memory for adapters on their way to slots; ditto.")
    ] = None,
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", "Output length of requests that name none.")
    ] = DEFAULTS.max_new_tokens,
    import_root: Annotated[
        Path | None, option("--import-root", "Folder under which paths in requests must lie; none are taken without.")
    ] = None,
    allow_hub: Annotated[bool, option("--allow-hub", "Let jobs fetch adapters from the Hugging Face hub.")] = False,
    s3_root: Annotated[
        str | None, option("--s3-root", "s3://bucket/prefix from below which jobs may fetch adapters; none without.")
    ] = None,
    max_json_bytes: Annotated[int, size_option("--max-json-bytes", "Largest JSON body.")] = DEFAULTS.max_json_bytes,
    max_upload_bytes: Annotated[
        int, size_option("--max-upload-bytes", "Largest adapter upload.")
    ] = DEFAULTS.max_upload_bytes,
    min_free_bytes: Annotated[
        int, size_option("--min-free-bytes", "Uploads are refused when the disk has less free space.")
    ] = DEFAULTS.min_free_bytes,
    max_generations: Annotated[
        int, option("--max-generations", "Generations kept under an adapter's name; the oldest go.")
    ] = DEFAULTS.max_generations,
    log_level: Annotated[str, option("--log-level", '"debug", "info", "warning" or "error".')] = DEFAULTS.log_level,
) -> None:
    """Serve a base model and its adapters over HTTP. Every flag can also be set as LORAMUX_<NAME>."""
    given = dict(locals())
    given["model_aliases"] = tuple(given.pop("model_alias") or DEFAULTS.model_aliases)
    given["adapters"] = dict(parse_adapter_option(text) for text in given.pop("adapter") or ())
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{flag}: {first['msg']}") from None
    _serve(settings)


def _serve(settings: Settings) -> None:
    with _keeping_all():
        import uvicorn  # noqa: PLC0415 - `loramux --help` need not load a server and torch

        from server.app import build_server, create_app  # noqa: PLC0415
        from server.drain import DrainingServer  # noqa: PLC0415

    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if settings.allow_open and settings.keys is None:
        report(f"[yellow]listening on {settings.host} without keys: whoever can reach it can do everything")
    try:
        if failpoint := os.environ.get(ENVIRONMENT_VARIABLE):
            arm(failpoint)
            report(f"[yellow]this process will kill itself at {failpoint}")
        server = build_server(settings, report)
        gc.collect()
        gc.freeze()
    except ServerError as error:
        console.print(f"[red]error[/red] {error.message} [dim]({error.code})")
        raise typer.Exit(2) from None
    _report_ready(settings, server.info.model_id, [record.name for record in server.adapters.records()])
    config = uvicorn.Config(
        create_app(server, settings),
        host=settings.host,
        port=settings.port,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    web = DrainingServer(config, server.drain, timeout_s=settings.drain_timeout_s, stop_work=server.engine.close)
    try:
        web.run()
    finally:
        server.close()
    if not web.started:
        raise typer.Exit(3)


@contextmanager
def _keeping_all() -> Iterator[None]:
    """What is made here stays: the garbage collector does not look for what might go, now or later.

    It would go through the modules' half a million objects again and again, which is a quarter of the time that loading
    them takes, and a pause of every stream whenever it comes later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _report_ready(settings: Settings, model_id: str, names: list[str]) -> None:
    url = f"http://{settings.host}:{settings.port}"
    report(f"ready: {model_id} with {len(names)} adapters{': ' + ', '.join(names[:10]) if names else ''}")
    report(f"API docs at {url}/docs. Try:")
    bodies = ['{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 12}}']
    bodies += [
        f'{{"inputs": "What is the capital of France?", "parameters": {{"adapter_id": "{name}"}}}}'
        for name in names[:1]
    ]
    for body in bodies:
        console.print(f"  curl {url}/generate -H 'Content-Type: application/json' -d '{body}'")
