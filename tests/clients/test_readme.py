"""The examples of the client's README, run one after the other against a live server."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from loramux_client import Client
from tests.api.conftest import Live
from tests.architecture.source_tree import ROOT

README = ROOT / "clients/python/README.md"


def test_every_example_runs(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(live.folders["rank8"], tmp_path / "my-adapter")
    shutil.copytree(live.folders["rank16"], tmp_path / "my-adapter-2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMUX_URL", live.url)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    with Client() as client:
        for name, folder in {"pirate": "rank4", "json": "dora"}.items():
            client.adapters.upload(live.folders[folder], name)
        namespace: dict[str, Any] = {"__name__": "readme"}
        for number, block in enumerate(blocks):
            code = block.replace('"http://127.0.0.1:8000"', f'"{live.url}"')
            exec(compile(code, f"README example {number}", "exec"), namespace)
        for name in ("pirate", "json"):
            client.adapters.delete(name)
    assert "adapter_not_found" in capsys.readouterr().out
