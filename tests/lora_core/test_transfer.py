"""Adapters on their way to a device: one copy, beside the running step, complete before anybody may use the slot."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import DeviceModelSlots, LoraLinear, Router, attach_slots, flatten_parts
from lora_core.device_slots import DeviceSlots
from lora_core.maths import Folded
from lora_core.transfer import DirectCopies, DirectWork, copies_for, side_work_for

CPU = torch.device("cpu")
SIZES = (6, 9, 33)


class LateCopies:
    """A stand-in for a stream (`Copies`): nothing arrives before `finish`, which waits for a sign."""

    def __init__(self) -> None:
        self.may_finish = threading.Event()
        self.is_waiting = threading.Event()
        self.num_copies = 0
        self._pending: list[Callable[[], object]] = []

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8, device=device)  # NaN, whatever the dtype

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.num_copies += 1
        self._pending.append(lambda: target.copy_(source))

    def finish(self) -> None:
        self.is_waiting.set()
        assert self.may_finish.wait(10)
        for copy in self._pending:
            copy()
        self._pending.clear()


def layers() -> dict[str, LoraLinear]:
    router = Router()
    return {str(size): LoraLinear(nn.Linear(5, size), router) for size in SIZES}


def adapter(dtype: torch.dtype) -> dict[str, Folded]:
    out = {}
    for size in SIZES[random.randint(0, 1) :]:
        rank = random.randint(0, 7)
        gain, bias = (torch.randn(size) if random.random() < 0.5 else None for _ in range(2))
        out[str(size)] = Folded(torch.randn(rank, 5), torch.randn(rank, size), gain, bias).to(dtype)
    return out


def assert_same(bank: DeviceModelSlots, slot: int, wanted: dict[str, Folded]) -> None:
    """The slot's arrays, as layers and as the table see them."""
    for number, (name, slots) in enumerate(bank.layers.items()):
        assert isinstance(slots, DeviceSlots)
        assert slots.table is not None
        row = slots.table.rows[number, slot].tolist()
        found = slots.folded(slot)
        if name not in wanted:
            assert found is None
            assert not any(row)
            continue
        assert found is not None
        for mine, theirs in zip(found.tensors(), wanted[name].tensors(), strict=True):
            assert torch.equal(mine, theirs)
        arrays = (found.a, found.b, found.gain, found.bias)
        assert row[:5] == [*(0 if t is None else t.data_ptr() for t in arrays), found.rank]
        assert all(address % 16 == 0 for address in row[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_flat", [True, False])
def test_an_adapter_arrives_bit_for_bit_and_in_one_copy(dtype: torch.dtype, is_flat: bool) -> None:
    copies = LateCopies()
    copies.may_finish.set()
    bank = DeviceModelSlots(layers(), 3, dtype=dtype, copies=copies)
    for slot in (2, 0):
        wanted = adapter(dtype)
        parts = flatten_parts(wanted, CPU) if is_flat else wanted
        before = copies.num_copies
        bank.load(slot, parts)
        num_arrays = sum(len(folded.tensors()) for folded in wanted.values())
        assert copies.num_copies - before == (1 if is_flat else num_arrays) + 1  # and the table
        assert_same(bank, slot, wanted)
    bank.free(2)
    bank.check_integrity()
    assert bank.num_bytes == sum(t.numel() * t.element_size() for f in wanted.values() for t in f.tensors())
    bank.load(2, wanted)
    assert_same(bank, 2, wanted)


@pytest.mark.parametrize("num_outputs", [1 << 10, 1 << 20])
def test_flat_arrays_are_those_that_they_were(num_outputs: int) -> None:
    """Small ones, and ones that several threads copy."""
    parts = {
        str(i): Folded(torch.randn(4, 33), torch.randn(num_outputs, 4).T, torch.randn(num_outputs) if i % 2 else None)
        for i in range(3)
    }
    flat = flatten_parts(parts, CPU)
    assert flat.keys() == parts.keys()
    for name, part in parts.items():
        for mine, expected in zip(flat[name].tensors(), part.tensors(), strict=True):
            assert torch.equal(mine, expected)
            assert mine.is_contiguous()
    assert len({t.untyped_storage().data_ptr() for part in flat.values() for t in part.tensors()}) == 1
    assert flatten_parts({}, CPU) == {}


def test_a_slot_is_nobodys_until_all_of_it_has_arrived() -> None:
    copies = LateCopies()
    bank = DeviceModelSlots(layers(), 2, dtype=torch.float32, copies=copies)
    wanted = adapter(torch.float32)
    thread = threading.Thread(target=bank.load, args=(1, flatten_parts(wanted, CPU)))
    thread.start()
    assert copies.is_waiting.wait(10)
    assert not bank.loaded_slots
    assert all(slots.folded(1) is None for slots in bank.layers.values())
    assert not bank.can_plan([1], 64)
    copies.may_finish.set()
    thread.join(10)
    assert bank.loaded_slots == {1}
    assert bank.can_plan([1], 64)
    assert_same(bank, 1, wanted)


def test_a_taken_slot_is_refused_and_keeps_what_it_has() -> None:
    bank = attach_slots(layers(), 1, dtype=torch.float32, use_kernels=True)
    assert isinstance(bank, DeviceModelSlots)
    wanted = adapter(torch.float32)
    bank.load(0, wanted)
    for slot in (0, 1, -1):
        with pytest.raises(ValueError, match="taken or out of range"):
            bank.load(slot, adapter(torch.float32))
    assert_same(bank, 0, wanted)


def test_what_a_plan_of_fixed_size_cannot_follow() -> None:
    bank = attach_slots(layers(), 2, dtype=torch.float32, use_kernels=True)
    assert isinstance(bank, DeviceModelSlots)
    high = Folded(torch.randn(65, 5), torch.randn(65, SIZES[0]))
    bank.load(0, {str(SIZES[0]): high})
    assert bank.can_plan([], 64)
    assert not bank.can_plan([0], 64)
    assert bank.can_plan([0], 65)
    assert not bank.can_plan([0, 1], 65)


@dataclass
class FakeStreams:
    """In the place of CUDA's streams: which one is current, and what was asked of them, in order."""

    current: str = "steps"
    log: list[str] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "Stream", lambda device: self.stream(f"side {device}"))
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(name=self.current))
        patch.setattr(torch.cuda, "stream", self.use)
        patch.setattr(torch.cuda, "Event", self.event)

    def stream(self, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def event(self, *, blocking: bool) -> Any:
        assert blocking  # a thread that spins takes a core from the engine's
        marks: list[str] = []

        def record(stream: Any) -> None:
            marks.append(f"{stream.name} after {len(self.log)}")

        def synchronize() -> None:
            self.log.append(f"the host waits for {marks[0]}")

        return SimpleNamespace(record=record, synchronize=synchronize)


def test_work_and_copies_run_on_a_stream_of_their_own_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    streams = FakeStreams()
    streams.install(monkeypatch)
    work = side_work_for(device)
    behind = "side cuda:1 waits for steps"
    assert streams.log == [behind]  # the weights may still be on their way
    with work.begin():
        streams.log.append(f"norms on {streams.current}")
    assert streams.current == "steps"
    assert streams.log == [behind, "norms on side cuda:1", "the host waits for side cuda:1 after 2"]
    with pytest.raises(ValueError, match="no such weight"), work.begin():
        raise ValueError("no such weight")
    assert streams.current == "steps"

    streams.log.clear()
    copies = copies_for(device)
    source, target = torch.randn(3), torch.zeros(3)
    copies.copy(target, source)
    assert torch.equal(target, source)
    copies.finish()
    assert streams.log == [behind, "the host waits for side cuda:1 after 1"]
    assert streams.current == "steps"


def test_the_host_computes_at_once() -> None:
    assert isinstance(side_work_for(CPU), DirectWork)
    assert isinstance(copies_for(CPU), DirectCopies)
    with side_work_for(CPU).begin():
        assert torch.ones(2).sum() == 2
