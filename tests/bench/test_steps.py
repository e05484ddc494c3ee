"""The account of a step knows where its time went."""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from server.engine import EngineConfig, load_runner
from tests.bench.steps import NATIVE_PARTS, PARTS, REST, Account, load_adapters, run_streams
from tests.tiny_folder import write_tiny_folder

ROWS, CONTEXT = 4, 24


@pytest.mark.parametrize("kind", ["base", "lora", "mix"])
def test_every_part_of_a_decode_step_is_accounted_for(tmp_path: Path, kind: str) -> None:
    write_tiny_folder(tmp_path / "model", "llama", random.randrange(1 << 30))
    config = EngineConfig(kv_bytes=1 << 24, use_prefix_cache=False)
    runner = load_runner(tmp_path / "model", config, dtype=torch.bfloat16, device=torch.device("cpu"))
    load_adapters(runner, kind)
    account = Account(ROWS)
    asyncio.run(run_streams(runner, kind, ROWS, CONTEXT, account, num_threads=torch.get_num_threads()))
    assert len(account.steps) > ROWS
    wanted = {part for part, _, _ in PARTS} | {REST}
    if runner.optimised.num_decoders:
        wanted |= set(NATIVE_PARTS.values())
    if kind == "base":
        wanted.discard("adapters")
    for step in account.steps:
        assert step.keys() - {"begin"} == wanted
        assert all(seconds > 0 for part, seconds in step.items())
