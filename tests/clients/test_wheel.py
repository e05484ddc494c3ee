"""The client's own wheel, in an environment that has nothing else."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from tests.architecture.source_tree import ROOT

SCRIPT = """
import importlib.metadata, sys
import loramux_client
assert "torch" not in sys.modules and "server" not in sys.modules
print(*sorted(d.name.lower() for d in importlib.metadata.distributions()))
"""


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def test_the_wheel_installs_without_torch(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT / "clients/python")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "loramux_client/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"loramux_client", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "-q", "--disable-pip-version-check")
    _run(*pip, "install", "-c", ROOT / "constraints.txt", wheel)
    installed = _run(python, "-I", "-c", SCRIPT).split()
    assert {"loramux-client", "httpx", "pydantic"} <= set(installed)
    assert not {"torch", "transformers", "fastapi", "loramux"} & set(installed)
