"""Decoder layers in one call of C: the bits of the model's own code with the same parts, and the way back to it."""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.maths import Folded
from lora_core.shared import SharedLinears
from server.engine import EngineConfig, ModelRunner
from server.engine.batch import Batch, build_batch
from server.engine.decoder import DecoderStack, Seconds
from server.engine.layers import Seen, StackedForward
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import Chunk, Step
from tests.engine_driver import FixedLease
from tests.native_kinds import native_kind
from tests.tiny_models import VOCABULARY, tiny_model

__all__ = ["native_kind"]

BLOCK = 4
NUM_LAYERS = 2
CONFIG = EngineConfig(max_running=6, max_step_tokens=64, max_slots=4, block_size=BLOCK, kv_bytes=1 << 20)
FUSED = ["llama", "mistral", "qwen2", "qwen3"]
Chunks = list[tuple[GenerationRequest, int, int]]


@pytest.fixture(autouse=True)
def _c_only(native_kind: str) -> None:
    if native_kind == "off":
        pytest.skip("about C")


def make_runner(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, change: Callable[[nn.Module], object] | None = None
) -> ModelRunner:
    """A model with two random adapters, of which one has gains and biases."""
    model = tiny_model(architecture, random.randrange(1 << 30)).to(dtype)
    if change is not None:
        change(model)
    runner = ModelRunner(model, CONFIG)
    for slot in range(2):
        modules = {}
        for name, layer in runner.layers.items():
            rank = random.randint(1, 9)
            gain, bias = (torch.randn(layer.out_features) * 0.1 if slot else None for _ in range(2))
            a, b = torch.randn(rank, layer.in_features) * 0.2, torch.randn(rank, layer.out_features) * 0.2
            modules[name] = Folded(a, b, gain, bias).to(dtype)
        runner.bank.load(slot, modules)
    return runner


def requests() -> list[GenerationRequest]:
    """Of the base, of one adapter each, of a mix; their blocks lie in any order."""
    out, blocks = [], random.sample(range(1, 61), 60)
    for i, weights in enumerate(({}, {0: 1.0}, {1: 1.0}, {0: 0.5, 1: -0.7})):
        prompt = [random.randrange(3, VOCABULARY) for _ in range(random.randint(9, 30))]
        lease = FixedLease(weights) if weights else None
        request = GenerationRequest(f"r{i}", prompt, SamplingParams(max_new_tokens=2), lambda _: None, lease)
        request.block_ids = [blocks.pop() for _ in range(-(-len(prompt) // BLOCK))]
        out.append(request)
    return out


def batches(made: list[GenerationRequest]) -> list[Batch]:
    """Prompts cut anywhere, then a step in which some decode and some are still read."""
    cuts = [random.randint(1, len(request.prompt_ids) - 1) for request in made]
    cuts[0] = len(made[0].prompt_ids) - 1
    first = [Chunk(request, 0, cut) for request, cut in zip(made, cuts, strict=True)]
    second = [Chunk(request, cut, len(request.prompt_ids) - cut) for request, cut in zip(made, cuts, strict=True)]
    return [
        build_batch(Step(chunks, []), BLOCK, torch.device("cpu"), spans_only=True) for chunks in (first, second, second)
    ]


def logits(runner: ModelRunner, steps: list[Batch]) -> list[Tensor]:
    return [runner.forward(batch).clone() for batch in steps]


def stacks(runner: ModelRunner) -> list[DecoderStack]:
    """Each once, in the order of the layers."""
    forwards = [module.__dict__.get("forward") for module in runner.model.modules()]
    return list(dict.fromkeys(f._stack for f in forwards if isinstance(f, StackedForward)))


def without_stacks(runner: ModelRunner, steps: list[Batch], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the model's own code gives."""
    with monkeypatch.context() as patch:
        patch.setattr(DecoderStack, "end", lambda _, first: first)
        return logits(runner, steps)


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_in_one_call_give_the_same_bits(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(architecture, dtype)
    assert runner.optimised.num_decoders == NUM_LAYERS
    (stack,) = stacks(runner)
    steps = batches(requests())
    calls = count_calls(stack, monkeypatch)
    ours = logits(runner, steps)
    assert calls == [NUM_LAYERS] * len(steps)
    theirs = without_stacks(runner, steps, monkeypatch)
    assert len(calls) == len(steps)
    assert all(map(torch.equal, ours, theirs))


def count_calls(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many layers each run of a stack computes."""
    calls: list[int] = []
    run = stack.run

    def counted(first: int, stop: int, *args: Any) -> Tensor:
        calls.append(stop - first)
        return run(first, stop, *args)

    monkeypatch.setattr(stack, "run", counted)
    return calls


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt2"])
def test_layers_of_other_kinds_stay_as_they_are(architecture: str) -> None:
    runner = make_runner(architecture)
    assert runner.optimised.num_decoders == 0
    assert runner.optimised.straight is None
    assert not stacks(runner)


def test_an_adapter_that_comes_or_goes_between_steps_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    made = requests()
    step = Step([Chunk(request, 0, len(request.prompt_ids)) for request in made], [])
    batch = build_batch(step, BLOCK, torch.device("cpu"), spans_only=True)
    before = runner.forward(batch).clone()
    found = {name: layer.slots.folded(1) for name, layer in runner.layers.items() if layer.slots is not None}
    other = {name: Folded(f.a.clone(), -f.b, None) for name, f in found.items() if f is not None}
    runner.bank.free(1)
    runner.bank.load(2, other)
    runner.bank.load(1, other)
    after = runner.forward(batch).clone()
    assert not torch.equal(after, before)
    assert torch.equal(after, without_stacks(runner, [batch], monkeypatch)[0])


def test_a_layer_with_a_module_of_an_adapters_own_is_the_models_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    steps = batches(requests())
    (stack,) = stacks(runner)
    layer: Any = runner.model.get_submodule(f"model.layers.{NUM_LAYERS - 1}")
    down = layer.mlp.down_proj
    layer.mlp.down_proj = nn.Sequential(down)
    calls = count_calls(stack, monkeypatch)
    changed = logits(runner, steps)
    assert calls == [NUM_LAYERS - 1] * len(steps)
    layer.mlp.down_proj = down
    assert all(map(torch.equal, changed, logits(runner, steps)))


def test_products_that_are_not_c_s_are_done_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedLinears, "native", property(lambda _: None))
    runner = make_runner()
    (stack,) = stacks(runner)
    assert not any(product.weight for product in stack._products)
    steps = batches(requests())
    ours = logits(runner, steps)
    assert all(map(torch.equal, ours, without_stacks(runner, steps, monkeypatch)))


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_past_the_models_own_code_gives_the_same_bits(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(architecture, dtype)
    straight = runner.optimised.straight
    assert straight is not None
    runs: list[Tensor | None] = []
    run = straight.run
    monkeypatch.setattr(straight, "run", lambda *args: runs.append(run(*args)) or runs[-1])
    # A prompt's last token is computed to the end, and no token of a part that is not its last.
    made = requests()
    cut = Chunk(made[1], 0, len(made[1].prompt_ids) - 3)
    steps = [*batches(made), build_batch(Step([cut], []), BLOCK, torch.device("cpu"), spans_only=True)]
    assert not len(steps[-1].last_rows)
    ours = logits(runner, steps)
    assert [None if own is None else own.shape for own in runs] == [own.shape for own in ours]
    runner.optimised = dataclasses.replace(runner.optimised, straight=None)
    assert all(map(torch.equal, ours, logits(runner, steps)))
    assert len(runs) == len(steps)


def test_products_that_are_not_c_s_get_only_the_rows_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedLinears, "native", property(lambda _: None))
    runner = make_runner()
    steps = batches(requests())
    rows: list[int] = []
    multiply = SharedLinears.multiply
    monkeypatch.setattr(SharedLinears, "multiply", lambda own, x: rows.append(len(x)) or multiply(own, x))
    runner.forward(steps[1])
    num_tokens, num_wanted = steps[1].input_ids.shape[1], len(steps[1].last_rows)
    assert rows[: 4 * NUM_LAYERS] == [num_tokens] * (4 * NUM_LAYERS - 3) + [num_wanted] * 3
    assert num_wanted < num_tokens


@pytest.mark.parametrize("in_place", [False, True])
def test_code_between_the_modules_is_not_passed_by(in_place: bool) -> None:
    def double(model: Any) -> None:
        forward = model.forward

        @functools.wraps(forward)
        def doubled(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits.mul_(2) if in_place else output.logits * 2
            return output

        model.forward = doubled

    runner = make_runner(change=double)
    assert runner.optimised.num_decoders == NUM_LAYERS
    assert runner.optimised.straight is None


@pytest.mark.parametrize("name", ["norm", "embed_tokens"])
def test_what_an_adapter_puts_in_a_modules_place_is_called(name: str) -> None:
    runner = make_runner()
    steps = batches(requests())
    before = logits(runner, steps)
    model: Any = runner.model
    own = getattr(model.model, name)
    setattr(model.model, name, Negative(own))
    ours = logits(runner, steps)
    runner.optimised = dataclasses.replace(runner.optimised, straight=None)
    assert all(map(torch.equal, ours, logits(runner, steps)))
    assert not torch.equal(ours[1], before[1])


class Negative(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = -self.module(x)
        return out


def test_layers_that_somebody_listens_to_stay_as_they_are() -> None:
    def listen(model: Any) -> None:
        model.model.layers[0].register_forward_hook(lambda _module, _args, output: 2 * output)

    runner = make_runner(change=listen)
    assert runner.optimised.num_decoders == NUM_LAYERS - 1
    runner = make_runner(change=lambda model: model.model.layers[1].register_forward_pre_hook(lambda *_: None))
    assert runner.optimised.num_decoders == NUM_LAYERS - 1


def test_only_what_follows_directly_follows() -> None:
    x, y, shared = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    seen = Seen((x,), {"a": shared}, y)
    assert seen.is_followed_by(Seen((y,), {"a": shared}, x))
    assert Seen((), {"hidden_states": x, "a": shared}, y).is_followed_by(Seen((), {"hidden_states": y, "a": shared}, x))
    assert not seen.is_followed_by(Seen((y.clone(),), {"a": shared}, x))
    assert not seen.is_followed_by(Seen((y,), {"a": shared.clone()}, x))
    assert not seen.is_followed_by(Seen((y,), {"a": shared, "b": shared}, x))


def test_time_is_accounted_for_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    steps = batches(requests())
    seconds = Seconds()
    logits(runner, steps)
    assert seconds.products == 0
    monkeypatch.setattr(DecoderStack, "seconds", seconds)
    logits(runner, steps)
    assert min(seconds.products, seconds.adapters, seconds.attention) > 0
