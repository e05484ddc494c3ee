"""schemathesis walks through the served OpenAPI document: no 5xx, no answer that the document does not describe."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Live, serve

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)


@pytest.fixture
def short(tiny: tuple[Path, dict[str, Any], dict[str, Path]], tmp_path: Path) -> Iterator[Live]:
    """A server whose sequences are short: what is tried is requests, not the model."""
    with serve(tiny, tmp_path / "store", max_model_len=48, max_waiting=2048, max_json_bytes=1 << 23) as live:
        yield live


def walk(live: Live, folder: Path, phases: str, num_examples: int) -> int:
    """Run schemathesis; returns how many requests it made."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", phases, "--max-examples", str(num_examples), "--no-color", "--workers", "1"]
    command += ["--warnings", "off"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1_500, cwd=folder)
    lines = [line[:300] for line in (done.stdout + done.stderr).splitlines()]  # bodies are long
    assert done.returncode == 0, "\n".join(lines[-400:])
    (made,) = (int(found[1]) for line in lines if (found := re.search(r"(\d+) generated", line)))
    return made


def test_every_route_a_few_times(short: Live, tmp_path: Path) -> None:
    assert walk(short, tmp_path, "examples,fuzzing", 6) > 100


@pytest.mark.slow
def test_every_route_many_times(short: Live, tmp_path: Path) -> None:
    made = walk(short, tmp_path, "examples,coverage,fuzzing", 120)
    print(f"{made} requests")
    assert made >= 2_000
