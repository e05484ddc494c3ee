"""New generations under running streams: every answer comes wholly from the generation that it names.

The adapters come in pairs of opposite effect, and prompts are long enough for the prefix cache, so that a key or value,
a prefix or a slot of another generation would change the text.
"""

import copy
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.adapters.store import FILE_NAMES
from tests import peft_adapters
from tests.api.conftest import Live

PROMPT = "What is the capital of France? The quick brown fox jumps over the lazy dog, and the dog does not mind"
NUM_TOKENS = 12


def opposite(model: Any) -> Any:
    """PEFT's model with the adapter's change of the weights turned around."""
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in turned.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    return turned


class Swaps:
    """Names whose generations change, and what was answered meanwhile."""

    def __init__(self, live: Live, root: Path, num_names: int) -> None:
        self.live = live
        self.names = [f"swap{i}" for i in range(num_names)]
        self.files: dict[str, dict[str, bytes]] = {}
        self.expected: dict[str, str] = {}
        for kind in ("rank16", "dora16"):
            for sign, model in (("+", live.references[kind]), ("-", opposite(live.references[kind]))):
                folder = peft_adapters.save(model, root / f"{kind}{sign}")
                self.files[kind + sign] = {name: (folder / name).read_bytes() for name in FILE_NAMES}
                ids = live.tokenizer(PROMPT).input_ids
                tokens, _ = peft_adapters.greedy(model, ids, NUM_TOKENS)
                self.expected[kind + sign] = live.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        self.published: dict[tuple[str, str], str] = {}
        self.answers: list[tuple[str, str, str]] = []
        self.failures: list[str] = []
        self.num_swaps = 0

    def swap(self, client: httpx.Client, name: str, kind: str) -> None:
        """Publish a new generation: the same weights under a configuration that was never there."""
        self.num_swaps += 1
        files = dict(self.files[kind])
        config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": f"base-{self.num_swaps}"}
        files["adapter_config.json"] = json.dumps(config).encode()
        parts = [("files", item) for item in files.items()]
        while (response := client.post("/admin/adapters", data={"name": name}, files=parts)).status_code == 429:
            time.sleep(0.01)
        assert response.status_code == 201, response.text
        self.published[name, str(response.json()["generation"])] = kind

    def ask(self, stop: threading.Event, seed: int) -> None:
        """Ask for one name after the other, in every second thread as a stream."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self.live.url, timeout=60) as client:
            while not stop.is_set():
                name = rng.choice(self.names)
                parameters = {"adapter_id": name, "max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
                path = "/generate_stream" if seed % 2 else "/generate"
                response = client.post(path, json={"inputs": PROMPT, "parameters": parameters})
                if response.status_code != 200:
                    self.failures.append(response.text)
                    return
                last = response.text.strip().splitlines()[-1].removeprefix("data:")
                generation = response.headers["x-adapter-generation"]
                self.answers.append((name, generation, json.loads(last)["generated_text"]))


@pytest.mark.parametrize(
    ("num_names", "num_streams", "num_swaps"), [(3, 6, 30), pytest.param(5, 16, 200, marks=pytest.mark.slow)]
)
def test_swaps_under_load_never_mix_generations(
    live: Live, client: httpx.Client, tmp_path: Path, num_names: int, num_streams: int, num_swaps: int
) -> None:
    swaps = Swaps(live, tmp_path, num_names)
    kinds = sorted(swaps.files)
    assert len(set(swaps.expected.values())) == len(kinds), "the adapters' texts do not differ"
    for name in swaps.names:
        swaps.swap(client, name, "rank16+")
    num_hit_tokens = live.server.engine.stats.num_prefix_hit_tokens
    stop = threading.Event()
    threads = [threading.Thread(target=swaps.ask, args=[stop, seed]) for seed in range(num_streams)]
    for thread in threads:
        thread.start()
    for i in range(num_swaps):
        swaps.swap(client, swaps.names[i % num_names], kinds[i // num_names % len(kinds)])
    stop.set()
    for thread in threads:
        thread.join()
    assert not swaps.failures
    assert len(swaps.answers) > num_swaps / 2
    for name, generation, text in swaps.answers:
        kind = swaps.published[name, generation]
        assert text == swaps.expected[kind], f"{name}@{generation} is {kind}"
    assert len({generation for _, generation, _ in swaps.answers}) > 1
    assert len({(name, generation) for name, generation, _ in swaps.answers}) > num_swaps / 4
    assert live.server.engine.stats.num_prefix_hit_tokens > num_hit_tokens, "within a generation, prefixes are shared"
    for name in swaps.names:
        client.delete(f"/admin/adapters/{name}")
    live.assert_idle()
