"""lorax-client and text-generation, unmodified. They need an old huggingface_hub, so an environment of their own."""

import json
import subprocess
import venv
from pathlib import Path

import pytest

from tests.api.conftest import Live
from tests.auth.conftest import Guarded

# lorax-client imports requests without asking for it.
REQUIREMENTS = ("lorax-client==0.6.3", "text-generation==0.7.0", "huggingface_hub<1", "requests")
PROMPT = "The quick brown fox"


@pytest.mark.slow
def test_lorax_and_text_generation(live: Live, guarded: Guarded, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True, capture_output=True, timeout=300)
    expected = {name: live.expected(name or None, PROMPT, 12) for name in ("", "rank8", "dora")}
    expected["rank4 and rank8"] = live.expected_of_mix({"rank4": 0.5, "rank8": 0.5}, PROMPT, 12)
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    script = Path(__file__).with_name("old_clients.py")
    command = [python, script, live.url, tmp_path / "expected.json", guarded.url, guarded.secrets["a"]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "fine", done.stderr[-3000:]
    live.assert_idle()
