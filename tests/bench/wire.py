"""What HTTP costs, and structured output: 32 streams over `/v1/completions` against the engine driven directly.

    python -m tests.bench.wire [--streams 32] [--new 96] [--rounds 3]

The demo model in bfloat16, the base and three adapters. Two processes hold it: a server, and the same parts without
HTTP; they take turns in one run, and each waits while the other works.
"""

import argparse
import asyncio
import json
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.bench.client import Job, run_jobs
from tests.bench.machine import CpuAccount, start_quietly
from tests.bench.material import Material

ADAPTERS = [None, "a0", "a1", "d2"]
NUM_PROMPT = 32
START_TIMEOUT_S = 300
PARAGRAPH = {"type": "array", "items": {"type": "string", "minLength": 400}, "minItems": 50}
FORMS: dict[str, dict[str, Any]] = {
    "over HTTP": {},
    "with a regex": {"structured_outputs": {"regex": "[a-z ,.]{4000}"}},
    "with a schema": {"response_format": {"type": "json_object", "schema": PARAGRAPH}},
}


class Direct:
    """The server's parts without HTTP, in this process; answers commands on standard input."""

    def __init__(self, adapters: dict[str, Path], store: Path) -> None:
        from server.app import build_server
        from server.settings import Settings

        settings = Settings(store=store, adapters=adapters, min_free_bytes=0)
        self._server = build_server(settings, report=lambda _: None)
        self._server.engine.start()

    def run(self, texts: list[str], num_new: int) -> float:
        """Seconds for one request per text, from the first submission to the last token."""
        from server.engine import GenerationRequest, SamplingParams, Token
        from server.text import StopRule

        codec, engine = self._server.generations.codec, self._server.engine
        ended: queue.Queue[object] = queue.Queue()
        start = time.perf_counter()
        for i, text in enumerate(texts):
            name = ADAPTERS[i % len(ADAPTERS)]
            ids = codec.encode(text)
            engine.submit(
                GenerationRequest(
                    str(i),
                    ids,
                    SamplingParams(max_new_tokens=num_new, ignore_eos=True),
                    lambda event: None if isinstance(event, Token) else ended.put(event),
                    self._server.adapters.open_lease({name: 1.0}) if name else None,
                    codec.stream(ids, StopRule()),
                )
            )
        for _ in texts:
            ended.get()
        return time.perf_counter() - start

    def serve(self) -> None:
        print("ready", flush=True)
        for line in sys.stdin:
            print(self.run(*json.loads(line)), flush=True)
        self._server.close()


@contextmanager
def direct(folders: dict[str, Path], store: Path) -> Iterator[subprocess.Popen[str]]:
    job = json.dumps({"adapters": {name: str(path) for name, path in folders.items()}, "store": str(store)})
    command = [sys.executable, "-m", "tests.bench.wire", "--direct", job]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@contextmanager
def served(folders: dict[str, Path], store: Path) -> Iterator[str]:
    """A server in a process of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "serve", "--store", str(store), "--port", str(port)]
    command += ["--min-free-bytes", "0", *(f"--adapter={name}={folder}" for name, folder in folders.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(url):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def over_http(url: str, texts: list[str], num_new: int, fields: dict[str, Any]) -> float:
    """Seconds for the same work, streamed."""
    fixed = {"max_tokens": num_new, "temperature": 0, "ignore_eos": True, "stream": True} | fields
    # Tokens that end inside a character give no event: fewer of them are no error.
    jobs = [
        Job("/v1/completions", fixed | {"prompt": text, "model": ADAPTERS[i % len(ADAPTERS)]}, num_new // 4, NUM_PROMPT)
        for i, text in enumerate(texts)
    ]
    seconds, results = asyncio.run(run_jobs(url, jobs, len(jobs)))
    errors = [result.error for result in results if result.error]
    assert not errors, errors[0]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--direct", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        job = json.loads(args.direct)
        Direct({name: Path(path) for name, path in job["adapters"].items()}, Path(job["store"])).serve()
        return
    start_quietly()
    material = Material()
    folders = material.adapters([name for name in ADAPTERS if name])
    texts = [material.prompt(NUM_PROMPT, seed)[1] for seed in range(args.streams)]
    rates: dict[str, list[float]] = {"engine alone": [], **{form: [] for form in FORMS}}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with direct(folders, root / "one") as process, served(folders, root / "two") as url:
            assert process.stdin is not None
            assert process.stdout is not None
            account = CpuAccount()
            for i in range(args.rounds + 1):  # the first one warms up
                process.stdin.write(json.dumps([texts, args.new]) + "\n")
                process.stdin.flush()
                seconds = {"engine alone": float(process.stdout.readline())}
                seconds |= {form: over_http(url, texts, args.new, fields) for form, fields in FORMS.items()}
                for kind, value in seconds.items() if i else ():
                    rates[kind].append(args.streams * args.new / value)
            other = account.other_share()
    for kind, values in rates.items():
        share = max(values) / max(rates["engine alone"])
        print(f"{kind:14} tokens/s {'  '.join(f'{value:.1f}' for value in values)}   best / engine alone {share:.3f}")
    print(f"the machine's others took {other:.0%} of it")


if __name__ == "__main__":
    main()
