"""The engine on kernels, which without a GPU run in Triton's interpreter: attention, adapters, recorded steps."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import DeviceModelSlots
from lora_core.maths import Folded
from lora_core.ops import plan as plan_module
from lora_core.ops import tuning
from server.engine import EngineConfig, EngineLoop, ModelRunner, graphs
from server.engine.attention import AttentionCall, AttentionGroup, AttentionPlan, DeviceAttention, PagedAttention, Span
from server.engine.attention import device as device_attention
from server.engine.batch import Batch, build_batch
from server.engine.device_step import DeviceStep
from server.engine.kv_cache import KVCache, LayerShape
from server.engine.scheduler import Chunk, Step
from server.engine.selfcheck import check_against_reference
from tests.device import DEVICE
from tests.engine.recorded_graph import RecordingCapture
from tests.engine_driver import Driver, FixedLease, greedy
from tests.native_kinds import without_native
from tests.tiny_models import VOCABULARY, tiny_model

__all__ = ["without_native"]

pytestmark = pytest.mark.usefixtures("without_native")

BLOCK = 4
CONFIG = EngineConfig(
    max_running=4,
    max_step_tokens=24,
    max_slots=4,
    block_size=BLOCK,
    kv_bytes=1 << 20,
    max_model_len=64,
    use_kernels=True,
)
CLOSE = 1e-4


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": 5, "softcap": 3.0, "sinks": True},
}


def _sequences(lengths: list[tuple[int, int]]) -> tuple[list[Span], int]:
    """Spans with blocks in random order, from (tokens before, new tokens); and the number of blocks."""
    counts = [-(-(before + new) // BLOCK) for before, new in lengths]
    order = random.sample(range(1, 1 + sum(counts)), sum(counts))
    spans = []
    for (before, new), count in zip(lengths, counts, strict=True):
        spans.append(Span([order.pop() for _ in range(count)], before, new))
    return spans, 1 + sum(counts)


def _positions(spans: list[Span]) -> list[int]:
    return [s.blocks[p // BLOCK] * BLOCK + p % BLOCK for s in spans for p in range(s.start, s.start + s.num_tokens)]


def _groups(spans: list[Span]) -> list[AttentionGroup]:
    groups, start = [], 0
    for span in spans:
        blocks = torch.tensor([list(span.blocks)], device=DEVICE)
        stop = start + span.num_tokens
        groups.append(AttentionGroup(start, stop, blocks, [span.start + span.num_tokens], span.num_tokens))
        start = stop
    return groups


# Rounded are what is multiplied with the values, and the sums: each by half of this, of numbers around one.
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize(
    ("dtype", "value_dim"), [(torch.float32, 8), (torch.float32, 12), (torch.bfloat16, 12), (torch.float16, 12)]
)
@pytest.mark.parametrize("kind", CALLS)
def test_attention_agrees_with_the_reference(
    kind: str, dtype: torch.dtype, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes in float32, with the same numbers."""
    monkeypatch.setattr(device_attention, "BUSY_PROGRAMS", random.choice([1, 24, 64]))
    num_kv_heads, group_size, dim = 2, random.choice([1, 3, 4]), 8
    heads = num_kv_heads * group_size
    spans, num_blocks = _sequences([(0, 1), (9, 1), (random.randint(60, 90), 1), (0, 5), (6, 18)])
    shape = LayerShape(num_kv_heads, dim, value_dim)
    exact, cache = (KVCache([shape], num_blocks, BLOCK, dtype=d, device=DEVICE) for d in (torch.float32, dtype))
    for pool, wide in zip(cache._pools[0], exact._pools[0], strict=True):
        pool[:, 1:].normal_()
        wide.copy_(pool)
    num_tokens = sum(span.num_tokens for span in spans)
    query, key, value = (
        torch.randn(num_tokens, *own, device=DEVICE).to(dtype)
        for own in ((heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim))
    )
    options = dict(CALLS[kind])
    sinks = torch.randn(heads, device=DEVICE).to(dtype) if options.pop("sinks", False) else None
    positions = torch.tensor(_positions(spans), device=DEVICE)
    call = AttentionCall(0, dim**-0.5, sinks=None if sinks is None else sinks.float(), **options)
    wanted = PagedAttention(exact, positions, _groups(spans)).attend(call, query.float(), key.float(), value.float())
    plan = AttentionPlan.of(spans, num_kv_heads, BLOCK, DEVICE)
    out = DeviceAttention(cache, positions, plan).attend(replace(call, sinks=sinks), query, key, value)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=max(ERRORS[dtype], 1e-4), atol=ERRORS[dtype])
    for pool, wide in zip(cache._pools[0], exact._pools[0], strict=True):
        assert torch.equal(pool.float(), wide)


def test_launch_parameters_are_measured_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tuning, plan_module):
        monkeypatch.setattr(module, "RANKS", (16,))
        monkeypatch.setattr(module, "NUM_ENTRIES", {16: (1,), 64: (1,)})
    for name in ("SHRINK_OPTIONS", "EXPAND_OPTIONS"):
        monkeypatch.setattr(tuning, name, {"num_warps": (2,)})
    monkeypatch.setattr(device_attention, "ATTEND_OPTIONS", {"block_keys": (16,)})
    monkeypatch.setattr(device_attention, "TRIAL_SEQUENCES", 2)
    monkeypatch.setattr(device_attention, "TRIAL_LENGTH", 50)
    config = replace(CONFIG, tuning_folder=tmp_path)
    runner = ModelRunner(tiny_model("llama", random.randrange(1 << 30)).to(DEVICE), config)
    assert isinstance(runner.bank, DeviceModelSlots)
    assert {key[:2] for key in runner.bank.table.configs} == runner.optimised.shapes  # type: ignore[index]
    head = runner.facts.layers[0]
    kinds = {key[0] for key in runner._attend_configs}  # type: ignore[index]
    assert kinds == {1, device_attention.PROMPT_QUERIES}
    assert all(key[2:] == (head.key_dim, head.value_dim) for key in runner._attend_configs)  # type: ignore[index]
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 2 * len(runner.bank.table.configs) + 2
    assert check_against_reference(runner) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_what_lies_behind_a_sequences_end_and_tokens_of_nobodys(dtype: torch.dtype) -> None:
    spans, num_blocks = _sequences([(5, 1), (2, 1)])
    cache = KVCache([LayerShape(1, 16, 16)], num_blocks, BLOCK, dtype=dtype, device=DEVICE)
    keys, values = cache.heads(0)
    keys.fill_(torch.nan)
    values.fill_(torch.nan)
    for span in spans:
        for position in range(span.start):
            for pool in (keys, values):
                pool[0, span.blocks[position // BLOCK], position % BLOCK] = torch.randn(16).to(pool)
    before = cache._pools[0][0].clone()
    plan = AttentionPlan(4, 0, 64, 1, DEVICE)
    plan.fill(spans, BLOCK)
    positions = torch.tensor([*_positions(spans), -1, -1], device=DEVICE)
    query, key, value = (torch.randn(4, heads, 16, device=DEVICE).to(dtype) for heads in (2, 1, 1))
    out = DeviceAttention(cache, positions, plan).attend(AttentionCall(0, 0.25), query, key, value)
    assert torch.isfinite(out).all()
    assert not out[2:].any()
    written = torch.zeros(num_blocks * BLOCK, dtype=torch.bool, device=DEVICE)
    written[positions[:2]] = True
    after = cache._pools[0][0].flatten(1, 2)
    assert torch.equal(after[0, positions[:2]], key[:2, 0])
    assert torch.equal(after[:, ~written].isnan(), before.flatten(1, 2)[:, ~written].isnan())


def _adapter(runner: ModelRunner, rank: int, *, has_gain: bool) -> dict[str, Folded]:
    out = {}
    for name, layer in runner.layers.items():
        if name != "lm_head" and random.random() < 0.8:
            gain = 0.1 * torch.randn(layer.out_features) if has_gain else None
            a, b = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
            out[name] = Folded(a / layer.in_features**0.5, 0.5 * b / rank**0.5, gain)
    return out


WEIGHTS: list[dict[int, float]] = [{}, {0: 1.0}, {1: 1.0}, {0: 0.5, 2: -0.7}, {2: 1.0}, {1: 0.3}, {}]


def _generate(runner: ModelRunner, prompts: list[list[int]], num_tokens: int) -> list[Any]:
    engine = EngineLoop(runner)
    driver = Driver(engine)
    for weights, prompt in zip(WEIGHTS, prompts, strict=False):  # there may be fewer prompts
        driver.submit(prompt, greedy(num_tokens), FixedLease(weights) if weights else None)
    engine.start()
    outcomes = driver.wait()
    engine.close()
    return outcomes


def _assert_equal(mine: list[Any], wanted: list[Any]) -> None:
    for row, (own, theirs) in enumerate(zip(mine, wanted, strict=True)):
        for i, (token, expected) in enumerate(zip(own.tokens, theirs.tokens, strict=True)):
            assert own.logprobs[i] == pytest.approx(theirs.logprobs[i], abs=2e-3), (row, i)
            if token != expected:  # a tie
                assert abs(own.logprobs[i] - theirs.logprobs[i]) < CLOSE, (row, i)
                break


def _runners(architecture: str, capture: RecordingCapture | None) -> tuple[ModelRunner, ModelRunner]:
    """One on kernels and one without, with the same adapters."""
    model = tiny_model(architecture, random.randrange(1 << 30)).to(DEVICE)
    plain = ModelRunner(copy.deepcopy(model), replace(CONFIG, use_kernels=False))
    runner = ModelRunner(model, CONFIG, capture)
    assert isinstance(runner.bank, DeviceModelSlots)
    for slot, (rank, has_gain) in enumerate(((4, False), (18, True), (1, False))):
        adapter = _adapter(runner, rank, has_gain=has_gain)
        for each in (runner, plain):
            each.bank.load(slot, adapter)
    return runner, plain


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gemma2", "gpt2"))]
)
def test_generated_tokens_are_those_of_the_path_without_kernels(architecture: str) -> None:
    """One prompt is longer than a step, so that it goes in two parts."""
    runner, plain = _runners(architecture, None)
    assert check_against_reference(runner) < 1e-4
    lengths = (CONFIG.max_step_tokens + 2, *(random.randint(1, 10) for _ in WEIGHTS[1:]))
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    random.shuffle(prompts)
    _assert_equal(_generate(runner, prompts, 3), _generate(plain, prompts, 3))


@pytest.mark.slow
def test_recorded_steps_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, plain = _runners("llama", RecordingCapture(monkeypatch))
    assert runner.graphs is not None
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 9))] for _ in WEIGHTS]
    _assert_equal(_generate(runner, prompts, 4), _generate(plain, prompts, 4))
    assert runner.graphs.num_replays >= 2


def test_recorded_steps_give_the_same_logits_while_adapters_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KINDS", (graphs.KINDS[0], graphs.Kind(None, 2, 128)))
    capture = RecordingCapture(monkeypatch)
    runner = ModelRunner(
        tiny_model("llama", random.randrange(1 << 30)).to(DEVICE), replace(CONFIG, max_running=2), capture
    )
    assert runner.graphs is not None
    assert capture.num_recordings == 4
    for slot in range(2):
        runner.bank.load(slot, _adapter(runner, 3 + slot, has_gain=bool(slot)))
    driver = Driver(EngineLoop(runner))  # never started: it only makes requests
    requests = [driver.submit([5] * n, greedy(9), FixedLease({})) for n in (6, 3)]
    for i, request in enumerate(requests):
        request.block_ids = [1 + 3 * i, 2 + 3 * i, 3 + 3 * i]
    step = DeviceStep(runner.model, runner.router, runner.cache)
    step.run(_batch([Chunk(request, 0, len(request.prompt_ids)) for request in requests]))
    seen = []
    for round_, weights in enumerate(([{}, {}], [{0: 1.0}, {}], [{0: 0.5, 1: 0.7}, {1: 1.0}], [{0: 1.0}, {}])):
        if round_ == 3:
            runner.bank.free(0)
            runner.bank.load(0, _adapter(runner, 20, has_gain=True))
        for request, own in zip(requests, weights, strict=True):
            request.lease = FixedLease(own)
            request.output_ids.append(random.randrange(VOCABULARY))
        count = 1 if round_ == 1 else 2
        batch = _batch([Chunk(request, request.num_tokens - 1, 1) for request in requests[:count]])
        wanted = step.run(batch).clone()
        replayed = runner.graphs.run(batch)
        assert replayed is not None
        torch.testing.assert_close(replayed, wanted, rtol=1e-5, atol=1e-5)
        seen.append(wanted[0])
        for request in requests[count:]:
            request.output_ids.pop()
    assert runner.graphs.num_replays == 4
    assert capture.num_recordings == 4
    assert not torch.allclose(seen[1], seen[3], atol=1e-2)


def _batch(chunks: list[Chunk]) -> Batch:
    return build_batch(Step(chunks), BLOCK, DEVICE, spans_only=True)


def test_what_no_recording_fits_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KINDS", graphs.KINDS[:1])
    runner = ModelRunner(
        tiny_model("llama", 1).to(DEVICE), replace(CONFIG, max_running=1), RecordingCapture(monkeypatch)
    )
    assert runner.graphs is not None
    runner.bank.load(0, _adapter(runner, 2, has_gain=False))
    driver = Driver(EngineLoop(runner))
    requests = [driver.submit([5, 6, 7], greedy(9), FixedLease({0: 1.0} if i else {})) for i in range(2)]
    for i, request in enumerate(requests):
        request.block_ids = [1 + i]
    base, adapted = requests
    for chunks in (
        [Chunk(base, 0, 3)],
        [Chunk(base, 2, 1), Chunk(adapted, 2, 1)],
        [Chunk(adapted, 2, 1)],
        [Chunk(base, 0, 1)],
    ):
        assert runner.graphs.run(_batch(chunks)) is None
    assert runner.graphs.run(_batch([Chunk(base, 2, 1)])) is not None


def test_a_model_that_cannot_be_recorded_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = ModelRunner(tiny_model("llama", 1).to(DEVICE), CONFIG, refuse)
    assert runner.graphs is None
    assert "cannot be recorded: operation not permitted" in caplog.text
    off = ModelRunner(tiny_model("llama", 1).to(DEVICE), replace(CONFIG, use_cuda_graphs=False), refuse)
    assert off.graphs is None
