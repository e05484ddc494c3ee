"""What a GPU would be given, found out without one, in processes of their own: this one's Triton interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(module: str, *arguments: str, cache: Path) -> list[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bf16 90", "bf16 89", "bf16 80", "fp16 90", "fp32 90", "fp32 89"])
def test_every_kernel_compiles_and_fits_at_its_defaults(form: str, tmp_path: Path) -> None:
    lines = _run("tests.engine.compile_kernels", *form.split(), cache=tmp_path)
    for kernel in ("shrink", "expand", "store", "attend", "join"):
        assert any(f" {kernel} " in line for line in lines), kernel
    assert not [line for line in lines if not line.startswith("fits: ")]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_serving_needs_no_variant_that_was_not_compiled_before(architecture: str, tmp_path: Path) -> None:
    lines = _run("tests.engine.count_variants", architecture, cache=tmp_path)
    (warm,) = (line for line in lines if line.endswith(" variants before serving"))
    assert int(warm.split()[0]) > 20
    late = [line for line in lines if " while serving: " in line]
    assert late == ["0 while serving: Counter()"], "\n".join(lines)


@pytest.mark.slow
def test_what_tuning_tries_fits_the_bound_that_it_goes_by(tmp_path: Path) -> None:
    lines = _run("tests.engine.compile_candidates", "4", cache=tmp_path)
    print("\n".join(lines))
    assert len([line for line in lines if line.startswith("fits: ")]) == 3 * 3 * 4
    assert not [line for line in lines if line.startswith("FAULT")]
