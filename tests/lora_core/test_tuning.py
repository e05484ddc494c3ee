"""Launch parameters: the fastest that was measured, kept for the next start, and of no influence on the results."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.device_slots import AdapterTable
from lora_core.ops import launch, tuning
from lora_core.ops import plan as plans
from lora_core.ops import triton as kernels
from lora_core.ops.plan import LARGE_TILE, SMALL_TILE, RoutePlan, bucket_of
from lora_core.ops.tuning import Tuner, tune_adapters, tuner_for
from tests.lora_core.test_kernels import DEVICE

START = launch.ExpandConfig(block_r=16, block_o=64, num_warps=4, num_stages=2)


@dataclass
class Clock:
    """Runs what is measured, and says how long it took by the parameters that it was run with."""

    cost: Callable[[Any], float]
    seen: list[Any]

    def run(self, config: Any) -> None:
        self.seen.append(config)

    def time_s(self, run: Callable[[], object]) -> float:
        run()
        return self.cost(self.seen[-1])


def test_the_fastest_is_found_and_kept(tmp_path: Path) -> None:
    def cost(config: Any) -> float:
        if config.num_warps == 8:
            return float("inf")  # it does not fit
        return abs(config.block_o - 128) + (0 if config.num_stages == 4 else 1)

    clock = Clock(cost, [])
    path = tmp_path / "made" / "gpu.json"
    tuner = Tuner(path, clock.time_s)
    best = tuner.best("a", START, tuning.EXPAND_OPTIONS, clock.run)
    assert best == replace(START, block_o=128, num_stages=4)
    assert tuner.num_measured == len(clock.seen) == len(set(clock.seen))
    tuner.save()
    again = Tuner(path, clock.time_s)
    assert again.best("a", START, tuning.EXPAND_OPTIONS, clock.run) == best
    assert not again.num_measured
    assert again.best("b", START, {"block_o": (32,)}, clock.run) == START
    assert again.num_measured == 2


def test_what_takes_more_shared_memory_than_there_is_is_not_tried(tmp_path: Path) -> None:
    def shared_bytes(config: Any) -> int:
        return tuning.expand_bytes(config, SMALL_TILE, 2)

    clock = Clock(lambda config: -shared_bytes(config), [])
    tuner = Tuner(tmp_path / "x.json", clock.time_s, limit := 20 << 10)
    best = tuner.best("a", START, tuning.EXPAND_OPTIONS, clock.run, shared_bytes)
    assert max(map(shared_bytes, clock.seen)) == shared_bytes(best) <= limit
    assert any(shared_bytes(replace(best, num_stages=stages)) > limit for stages in (3, 4))
    tuner.save()
    smaller = Tuner(tmp_path / "x.json", clock.time_s, shared_bytes(best) - 1)
    assert smaller.best("a", START, tuning.EXPAND_OPTIONS, clock.run, shared_bytes) != best


FOREIGN = json.dumps({"a": {"block_r": 16, "block_o": 48, "num_warps": 4, "num_stages": 2}})


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"block_o": 32}}', '{"a": {"block_r": 1.5}}', FOREIGN])
def test_a_file_that_says_something_else_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    clock = Clock(lambda config: config.block_o, [])
    tuner = Tuner(tmp_path / "x.json", clock.time_s)
    assert tuner.best("a", START, {"block_o": (32, 64)}, clock.run) == replace(START, block_o=32)
    (tmp_path / "file").write_text("")
    unwritable = Tuner(tmp_path / "file" / "x.json", clock.time_s)
    unwritable.best("a", START, {}, clock.run)
    unwritable.save()
    assert not (tmp_path / "file").read_text()


def test_plans_take_what_the_next_larger_was_measured_with() -> None:
    assert bucket_of(1, SMALL_TILE, 4) == (1, SMALL_TILE, 16)
    assert bucket_of(2, SMALL_TILE, 17) == (8, SMALL_TILE, 64)
    assert bucket_of(500, LARGE_TILE, 500) == (64, LARGE_TILE, 128)


def test_adapters_kernels_are_measured_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RANKS", (16,))
    monkeypatch.setattr(plans, "RANKS", (16,))
    for module in (tuning, plans):
        monkeypatch.setattr(module, "NUM_ENTRIES", {SMALL_TILE: (1, 2), LARGE_TILE: (1,)})
    monkeypatch.setattr(tuning, "SHRINK_OPTIONS", {"block_k": (32,), "split_k": (2,)})
    monkeypatch.setattr(tuning, "EXPAND_OPTIONS", {"block_o": (16,)})
    table = AdapterTable(2, 1, DEVICE)
    tuner = tuner_for(tmp_path, DEVICE)
    tune_adapters(tuner, table, [(48, (32, 16)), (48, (32, 16))], torch.float32)
    assert table.configs.keys() == {
        (48, (32, 16), entries, size, 16) for entries, size in ((1, SMALL_TILE), (2, SMALL_TILE), (1, LARGE_TILE))
    }
    assert tuner.num_measured == 3 * (3 + 2)
    tuner.save()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("cpu-triton-" if DEVICE.type == "cpu" else "")
    tune_adapters(known := tuner_for(tmp_path, DEVICE), AdapterTable(2, 1, DEVICE), [(48, (32, 16))], torch.float32)
    assert not known.num_measured


def test_every_choice_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed := random.SystemRandom().randrange(1 << 30))
    print(f"seed {seed}")
    layers = tuning._TrialLayers(48, (32, 16), 20, torch.float32, DEVICE)
    plan = RoutePlan.of(plans.Route([plans.Run({0: 0.5}, 5)]), 5, 1, DEVICE)
    x = torch.randn(5, 48, device=DEVICE)
    outputs = []
    for split, block in ((1, 16), (4, 32)):
        chosen = launch.LaunchConfigs(
            launch.ShrinkConfig(block_r=32, block_k=16, split_k=split, num_warps=4, num_stages=2),
            launch.ExpandConfig(block_r=16, block_o=block, num_warps=4, num_stages=2),
        )
        configs = {(48, (32, 16), *bucket_of(plan.num_entries, plan.tile_tokens, 32)): chosen}
        table = replace(layers._layers, configs=configs)
        assert table.launch_configs(plan, 20, 4) is chosen
        y = torch.zeros(5, 48, device=DEVICE)
        kernels.apply_plan(y, x, table, plan, None, 20)
        outputs.append(y)
    parts = layers._parts.values()
    wanted = torch.cat([0.5 * (x @ part.a.T @ part.b) for part in parts if part.b is not None], dim=1)
    for y in outputs:
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)
