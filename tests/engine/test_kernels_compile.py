"""All kernels compile for NVIDIA GPUs; in a process of its own, as this one's Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.compile_kernels import DTYPES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.engine.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert not done.returncode, done.stderr
    assert done.stdout.split() == [
        word for dtype in DTYPES for kind in ("adapters", "attention") for word in ("compiled", kind, dtype)
    ]
