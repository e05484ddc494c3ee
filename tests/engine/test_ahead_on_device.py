"""Run-ahead where it is for: on a device that is late, with kernels and recorded steps, while adapters come and go."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from lora_core.maths import Folded
from server.engine import (
    EngineConfig,
    EngineLoop,
    Finished,
    FinishReason,
    GenerationRequest,
    ModelRunner,
    SamplingParams,
    graphs,
)
from server.engine.kv_cache import KVCache, LayerShape
from server.leases import LeaseState
from tests.engine.late_device import LateDevice
from tests.engine.recorded_graph import RecordingCapture
from tests.engine.wishes import Wish, assert_equal, random_wish, run_wishes
from tests.native_kinds import without_native
from tests.tiny_models import VOCABULARY, tiny_model

__all__ = ["without_native"]

pytestmark = pytest.mark.usefixtures("without_native")

NUM_SLOTS = 3
PLAIN = EngineConfig(
    max_running=3, max_step_tokens=16, max_slots=NUM_SLOTS, block_size=4, kv_bytes=1 << 20, max_model_len=64
)
KINDS = ["late", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("late kernels", "late recorded steps"))]
# Of adapters by content: each is one of many, so that they replace each other in the slots.
CHOICES: list[dict[int, float]] = [{}, {0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}, {0: 0.5, 1: -0.7}, {4: 0.6, 2: 0.3}]
RANKS = (3, 17, 1, 8, 5)


def make_adapters(runner: ModelRunner) -> list[dict[str, Folded]]:
    """Every other one has a gain, as DoRA; some leave layers out."""
    out = []
    for number, rank in enumerate(RANKS):
        parts = {}
        for name, layer in runner.layers.items():
            if name != "lm_head" and random.random() < 0.85:
                a, b = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
                gain = 0.1 * torch.randn(layer.out_features) if number % 2 else None
                parts[name] = Folded(a / layer.in_features**0.5, 0.5 * b / rank**0.5, gain)
        out.append(parts)
    return out


@dataclass
class Library:
    """Adapters that share few slots: one that is wanted takes the slots of those that nobody uses."""

    runner: ModelRunner
    adapters: list[dict[str, Folded]]
    device: LateDevice
    owners: list[int | None] = field(default_factory=lambda: [None] * NUM_SLOTS)
    users: dict[int, int] = field(default_factory=dict)
    num_loads: int = 0

    def lease(self, weights: Mapping[int, float]) -> "LibraryLease":
        return LibraryLease(self, dict(weights))

    def take(self, wanted: Mapping[int, float]) -> dict[int, float] | None:
        missing = [number for number in wanted if number not in self.owners]
        free = [slot for slot, owner in enumerate(self.owners) if owner not in wanted and not self.users.get(owner, 0)]  # type: ignore[arg-type]
        if len(missing) > len(free):
            return None
        for number, slot in zip(missing, free, strict=False):
            if self.owners[slot] is not None:
                self.runner.bank.free(slot)
            self.owners[slot] = number
            self.runner.bank.load(slot, self.adapters[number])
            self.num_loads += 1
        for number in wanted:
            self.users[number] = self.users.get(number, 0) + 1
        return {self.owners.index(number): weight for number, weight in wanted.items()}

    def give_back(self, wanted: Mapping[int, float]) -> None:
        for number in wanted:
            self.users[number] -= 1
            assert self.users[number] or self.device.is_done_with(self.owners.index(number))


@dataclass(eq=False)
class LibraryLease:
    """Comes into its slots at the second asking; nothing that is under way may use them when they go."""

    library: Library
    wanted: dict[int, float]
    slots: dict[int, float] = field(default_factory=dict)
    is_active: bool = False
    num_asked: int = 0
    num_releases: int = 0
    engine: EngineLoop | None = None
    request: GenerationRequest | None = None

    @property
    def key(self) -> tuple[tuple[int, float], ...]:
        return tuple(sorted(self.wanted.items()))

    def activate(self) -> LeaseState:
        if self.is_active:
            return LeaseState.READY
        self.num_asked += 1
        if self.num_asked == 1 and self.wanted:
            self.engine.wake()  # type: ignore[union-attr]
            return LeaseState.LOADING
        found = self.library.take(self.wanted)
        if found is None:
            return LeaseState.NO_SLOT
        self.slots, self.is_active = found, True
        return LeaseState.READY

    def deactivate(self) -> None:
        if self.is_active:
            self.library.give_back(self.wanted)
            self.slots, self.is_active = {}, False

    def release(self) -> None:
        self.deactivate()
        self.num_releases += 1


@dataclass
class Pair:
    """One runner that reads each step before the next, and one that runs ahead on a stand-in for a device."""

    runners: tuple[ModelRunner, ModelRunner]
    adapters: list[dict[str, Folded]]
    kind: str

    def run(self, wishes: list[Wish], patch: pytest.MonkeyPatch) -> tuple[EngineLoop, LateDevice, Library]:
        """Compare both on these wishes; returns what ran ahead."""
        outcomes = []
        for runner in self.runners:
            device = LateDevice()
            library = Library(runner, self.adapters, device)
            with patch.context() as own:
                if runner.runs_ahead:
                    device.install(runner, own)
                engine = EngineLoop(runner)
                outcomes.append(run_wishes(engine, wishes, library.lease))
            for slot in list(runner.bank.loaded_slots):
                runner.bank.free(slot)
        assert_equal(outcomes[1], outcomes[0])
        assert not device.queue
        return engine, device, library


def make_pair(kind: str, patch: pytest.MonkeyPatch, architecture: str = "llama", **options: Any) -> Pair:
    model = tiny_model(architecture, random.randrange(1 << 30))
    config = replace(PLAIN, **options)
    plain = ModelRunner(copy.deepcopy(model), config)
    config = replace(config, run_ahead=True, use_kernels=kind != "late")
    patch.setattr(graphs, "KINDS", (graphs.KINDS[0], graphs.Kind(None, 2, 128)))
    ahead = ModelRunner(model, config, RecordingCapture(patch) if kind == "late recorded steps" else None)
    assert (ahead.graphs is not None) == (kind == "late recorded steps")
    return Pair((plain, ahead), make_adapters(plain), kind)


def _wishes(count: int, *, is_simple: bool, max_new: int) -> list[Wish]:
    return [random_wish(is_simple=is_simple, max_prompt=24, max_new=max_new, weights=CHOICES) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_same_while_adapters_come_and_go(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(kind, monkeypatch)
    count, max_new = (24, 16) if kind == "late" else (6, 7)
    wishes = _wishes(count, is_simple=True, max_new=max_new)
    long = SamplingParams(max_new_tokens=max_new, ignore_eos=True, logprobs=True)
    wishes += [Wish([7 + number, 5, 9], long, {number: 1.0}) for number in range(len(RANKS))]  # each is wanted
    engine, device, library = pair.run(wishes, monkeypatch)
    assert library.num_loads > NUM_SLOTS
    assert device.num_late
    assert engine.stats.num_steps_ahead
    if pair.runners[1].graphs is not None:
        assert pair.runners[1].graphs.num_replays


def test_recorded_steps_ahead_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of them, as the interpreter is slow: prompts go without a recording. DoRA, and a mix of LoRA with it."""
    pair = make_pair("late recorded steps", monkeypatch, max_running=2)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=True, temperature=0.9, seed=7)
    wishes = [
        Wish([random.randrange(3, VOCABULARY) for _ in range(4)], replace(params, max_new_tokens=2 + number), weights)
        for number, weights in enumerate(({1: 1.0}, {3: 0.5, 0: -0.7}))
    ]
    engine, device, _ = pair.run(wishes, monkeypatch)
    assert device.num_late
    assert engine.stats.num_steps_ahead
    assert pair.runners[1].graphs is not None
    assert pair.runners[1].graphs.num_replays


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_prompts_are_read_with_the_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch waits for nothing; what is waited for is what a step gave, once a step."""
    pair = make_pair(kind, monkeypatch)
    count, max_new = (16, 12) if kind == "late" else (4, 4)
    wishes = [
        replace(wish, sampling=replace(wish.sampling, prompt_logprobs=number % 4 > 0))
        for number, wish in enumerate(_wishes(count, is_simple=True, max_new=max_new))
    ]
    engine, device, _ = pair.run(wishes, monkeypatch)
    assert device.num_late_prompts
    assert not device.num_waits_at_launch
    assert 0 < device.num_waits <= engine.stats.num_steps
    assert engine.stats.num_steps_ahead > engine.stats.num_steps // 2


class CancelledLease(LibraryLease):
    """Its request is cancelled while the first part of its prompt is under way."""

    def activate(self) -> LeaseState:
        state = super().activate()
        if state is LeaseState.READY and self.engine is not None and self.request is not None:
            self.engine.cancel(self.request)
        return state


def test_an_adapter_stays_for_the_part_of_a_prompt_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a step draws no token for anybody, and is waited for all the same."""
    runner = make_pair("late", monkeypatch).runners[1]
    device = LateDevice()
    library = Library(runner, make_adapters(runner), device)
    device.install(runner, monkeypatch)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    wish = Wish([random.randrange(3, VOCABULARY) for _ in range(40)], params, {1: 1.0})
    (outcome,) = run_wishes(EngineLoop(runner), [wish], lambda weights: CancelledLease(library, dict(weights)))
    assert outcome.terminal == Finished(FinishReason.CANCELLED)
    assert not outcome.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_same_with_what_is_read_first(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = _wishes(24 if kind == "late" else 4, is_simple=False, max_new=16 if kind == "late" else 5)
    make_pair(kind, monkeypatch).run(wishes, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_same_through_preemption(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    max_new = 20 if kind == "late" else 8
    block_bytes = 4 * KVCache.bytes_per_token([LayerShape(2, 8, 8)] * 2, torch.float32)
    pair = make_pair(kind, monkeypatch, kv_bytes=block_bytes * 2 * -(-(5 + max_new) // 4))  # room for two of three
    long = SamplingParams(max_new_tokens=max_new, ignore_eos=True, logprobs=True, temperature=0.8, seed=5)
    wishes = [Wish([random.randrange(3, VOCABULARY) for _ in range(5)], long, {n: 1.0}) for n in range(3)]
    engine, _, _ = pair.run(wishes, monkeypatch)
    assert engine.stats.num_preemptions
