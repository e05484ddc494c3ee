"""`loramux quantize`."""

import random
from pathlib import Path

import torch
from typer.testing import CliRunner

from server.cli import app
from server.engine.model import load_model
from server.engine.quantization import checkpoint_quantization
from tests.tiny_folder import write_tiny_folder


def test_quantize_saves_a_copy_that_loads(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "base", "llama", random.randrange(1 << 30))
    command = [
        "quantize",
        str(tmp_path / "base"),
        str(tmp_path / "small"),
        "--quantization",
        "fp4",
        "--dtype",
        "float32",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "MB" in result.output
    model = load_model(tmp_path / "small", dtype=torch.float32, device=torch.device("cpu"))
    assert checkpoint_quantization(model.config) == "fp4"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "conflict" in again.output
    for flag, value in (("--quantization", "int3"), ("--dtype", "int8")):
        assert CliRunner().invoke(app, [*command[:3], flag, value]).exit_code == 2
