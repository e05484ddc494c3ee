"""The benchmark for GPUs runs, on a tiny model and a CPU; its figures mean nothing here."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.bench import gpu


def test_every_case_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products gain nothing from more, and wait for each other on a busy machine
    try:
        gpu.main(["--shape", "tiny", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(num_threads)
    result = json.loads((tmp_path / "out.json").read_text())
    assert {form: sorted(steps) for form, steps in result["steps_s"].items()} == {
        form: ["8", "base", "distinct", "dora", "mix", "none loaded", "one"] for form in ("bf16", "nf4")
    }
    for figure in result["figures"]:
        assert math.isfinite(figure["value"]), figure
        assert figure["value"] > 0 or "beyond" in figure["case"], figure  # noise may make a difference negative
    forms = [figure["form"] for figure in result["figures"]]
    assert forms.count("bf16") + 1 == forms.count("nf4") == 18
    assert result["bytes_per_s"] > 1e8
    shown = capsys.readouterr().out
    for figure in result["figures"]:
        assert figure["case"] in shown
    assert "NF4 decode rate at 1 row / bf16's" in shown


@pytest.mark.slow
def test_every_case_runs_on_the_kernels(tmp_path: Path) -> None:
    """In the interpreter, where each launch takes milliseconds."""
    options = ["--shape", "tiny", "--rows", "2", "--device", "cpu", "--kernels", "triton", "--no-peers"]
    result = gpu.main([*options, "--quantization", "nf4"])
    assert len(result["figures"]) == 15
    assert all(math.isfinite(figure["value"]) for figure in result["figures"])
