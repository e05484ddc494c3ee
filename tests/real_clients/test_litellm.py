"""litellm, unmodified. It wants its own versions of what we pin, so an environment of its own."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from tests.api.conftest import Live
from tests.auth.conftest import Guarded

REQUIREMENT = "litellm==1.110.2"
PROMPT = "The quick brown fox"
NUM_TOKENS = 12


@pytest.mark.slow
def test_litellm(live: Live, guarded: Guarded, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", REQUIREMENT], check=True, capture_output=True, timeout=600)
    messages = [{"role": "user", "content": PROMPT}]
    prompt = live.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    names = {"dummy": None, "rank8": "rank8", "dora": "dora"}
    expected = {name: live.expected(adapter, prompt, NUM_TOKENS) for name, adapter in names.items()}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    script = Path(__file__).with_name("litellm_client.py")
    command = [python, script, live.url, tmp_path / "expected.json", guarded.url, guarded.secrets["a"]]
    # Its table of prices would come from the network.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip().endswith("fine"), done.stderr[-3000:] + done.stdout[-3000:]
    live.assert_idle()
