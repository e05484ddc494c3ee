"""Slots: whatever is loaded and freed, every resident adapter reads back as it was written."""

import threading
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core import AdapterNotFoundError, Route, Run, apply_lora
from lora_core.maths import Folded
from lora_core.ops import cpu
from lora_core.slots import Extent, LayerSlots, Layout, SlotBank

SHAPES = {"q": (5, 4), "k": (5, 4), "up": (5, 9), "down": (9, 5)}  # in, out
MAX_SLOTS = 5
NO_VECTORS = (False, False)


def new_bank(max_slots: int = MAX_SLOTS) -> SlotBank:
    layers = {
        name: LayerSlots(*shape, max_slots, dtype=torch.float32, device=torch.device("cpu"))
        for name, shape in SHAPES.items()
    }
    return SlotBank(layers, max_slots)


def adapter(ranks: Mapping[str, int], vectors: tuple[bool, bool] = NO_VECTORS) -> dict[str, Folded]:
    out = {}
    for name, rank in ranks.items():
        in_features, out_features = SHAPES[name]
        gain, bias = (torch.randn(out_features) if wanted else None for wanted in vectors)
        out[name] = Folded(torch.randn(rank, in_features), torch.randn(rank, out_features), gain, bias)
    return out


def assert_holds(bank: SlotBank, resident: Mapping[int, Mapping[str, Folded]]) -> None:
    bank.check_integrity()
    assert bank.loaded_slots == frozenset(resident)
    for name, layer in bank.layers.items():
        for slot in range(MAX_SLOTS):
            wanted, found = resident.get(slot, {}).get(name), layer.folded(slot)
            assert (wanted is None) == (found is None)
            if wanted is not None and found is not None:
                for attribute in ("a", "b", "gain", "bias"):
                    mine, written = getattr(found, attribute), getattr(wanted, attribute)
                    assert (mine is None) == (written is None)
                    assert mine is None or torch.equal(mine, written)


def assert_layouts_are_shared(bank: SlotBank) -> None:
    layers = list(bank.layers.values())
    for one in layers:
        for other in layers:
            assert (one.layout is other.layout) == (one.layout.extents == other.layout.extents)


STEP = st.tuples(
    st.integers(0, MAX_SLOTS - 1),
    st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 20)),
    st.tuples(st.booleans(), st.booleans()),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(STEP, max_size=20))
def test_random_loads_and_frees(steps: list[tuple[int, dict[str, int], tuple[bool, bool]]]) -> None:
    bank = new_bank()
    resident: dict[int, dict[str, Folded]] = {}
    for slot, ranks, vectors in steps:
        if slot in resident:
            bank.free(slot)
            del resident[slot]
        else:
            resident[slot] = adapter(ranks, vectors)
            bank.load(slot, resident[slot])
        assert_holds(bank, resident)
        assert_layouts_are_shared(bank)
    for slot in list(resident):
        bank.free(slot)
        del resident[slot]
        assert_holds(bank, resident)
    assert all(layer.layout.extents == {} for layer in bank.layers.values())
    assert_layouts_are_shared(bank)


def starts(bank: SlotBank, layer: str = "q") -> dict[int, int]:
    return {slot: extent.start for slot, extent in bank.layers[layer].layout.extents.items()}


def test_gaps_are_used_again() -> None:
    bank = new_bank()
    for slot, rank in enumerate([8, 16, 8]):
        bank.load(slot, adapter({"q": rank}))
    bank.free(1)
    bank.load(3, adapter({"q": 12}))
    bank.load(4, adapter({"q": 5}))  # does not fit behind it
    assert starts(bank) == {0: 0, 2: 24, 3: 8, 4: 32}
    bank.free(4)
    bank.load(1, adapter({"q": 4}))
    assert starts(bank) == {0: 0, 2: 24, 3: 8, 1: 20}
    bank.free(0)
    bank.load(0, adapter({"q": 8}))
    assert starts(bank) == {0: 0, 2: 24, 3: 8, 1: 20}


def test_an_arena_of_changing_adapters_does_not_grow() -> None:
    bank = new_bank()
    for slot in range(MAX_SLOTS):
        bank.load(slot, adapter({"q": 8}))
    rows = bank.layers["q"].a.shape[0]
    for i in range(50):
        bank.free(i % MAX_SLOTS)
        bank.load(i % MAX_SLOTS, adapter({"q": 1 + i % 8}))
    assert bank.layers["q"].a.shape[0] == rows


def test_memory_is_taken_as_adapters_come() -> None:
    bank = new_bank()
    assert all(layer.a.numel() == layer.b.numel() == 0 for layer in bank.layers.values())
    bank.load(0, adapter({"q": 3}))
    layer = bank.layers["q"]
    assert 3 <= layer.a.shape[0] == layer.b.shape[0] <= 32
    assert (layer.gain, layer.bias) == (None, None)
    bank.load(1, adapter({"q": 3}, (True, False)))
    assert layer.gain is not None
    assert layer.bias is None
    assert bank.layers["up"].a.numel() == 0


def test_memory_goes_with_the_adapters() -> None:
    bank = new_bank()
    bank.load(0, adapter({"q": 3}))
    small = bank.num_bytes
    bank.load(1, adapter({"q": 64, "up": 64}, (True, True)))
    assert bank.num_bytes > 8 * small
    bank.free(1)
    assert bank.num_bytes == small
    assert_holds(bank, {0: {"q": bank.layers["q"].folded(0)}})
    bank.free(0)
    assert bank.num_bytes == 0


def test_a_slot_without_vectors_does_not_see_those_of_the_last_adapter() -> None:
    bank = new_bank()
    bank.load(0, adapter({"q": 2}, (True, True)))
    bank.free(0)
    plain = adapter({"q": 2})
    bank.load(0, plain)
    assert_holds(bank, {0: plain})


def test_find_gap() -> None:
    layout = Layout({7: Extent(4, 4), 1: Extent(16, 2)})
    assert [layout.find_gap(rank) for rank in (1, 4, 5, 8, 9)] == [0, 0, 8, 8, 18]
    assert Layout({}).find_gap(64) == 0


def test_errors() -> None:
    bank = new_bank()
    resident = {0: adapter({"q": 2}), 1: {}}
    for slot, modules in resident.items():
        bank.load(slot, modules)
    for slot in (0, 1, -1, MAX_SLOTS):
        with pytest.raises(ValueError, match=f"slot {slot} is taken or out of range"):
            bank.load(slot, adapter({"q": 2}))
    for slot in (2, -1, MAX_SLOTS):
        with pytest.raises(AdapterNotFoundError, match=f"slot {slot} is empty"):
            bank.free(slot)
    assert_holds(bank, resident)


@pytest.mark.parametrize("wrong", ["shape", "name"])
def test_a_load_that_fails_changes_nothing(wrong: str) -> None:
    bank = new_bank()
    resident = {0: adapter(dict.fromkeys(SHAPES, 3), (True, True))}
    bank.load(0, resident[0])
    good = adapter({"q": 30, "k": 30})["q"]
    with pytest.raises(RuntimeError if wrong == "shape" else KeyError):
        bank.load(1, {"q": good, ("down" if wrong == "shape" else "gate"): good})
    assert_holds(bank, resident)
    resident[1] = adapter({"q": 4, "down": 5})
    bank.load(1, resident[1])
    assert_holds(bank, resident)


@pytest.mark.parametrize("segment_rows", [-(1 << 60), 1 << 60], ids=["segments", "dense"])
def test_loading_beside_a_forward_pass_changes_no_output(segment_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SEGMENT_ROWS", segment_rows)
    bank = new_bank()
    layer = bank.layers["up"]
    bank.load(3, adapter({"up": 7}))  # its rows lie between those in use
    bank.load(0, adapter({"up": 6}, (True, True)))
    bank.free(3)
    bank.load(1, adapter({"up": 9}, (True, False)))
    x, y = torch.randn(8, 5), torch.randn(8, 9)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            route = Route([Run({0: 1.0}, 3), Run({}, 1), Run({0: 0.5, 1: -0.5}, 2), Run({1: 1.0}, 2)])
            return apply_lora(y.clone(), x, layer, route, None)

    wanted = forward()
    stop = threading.Event()
    wrong: list[object] = []
    count = 0

    def run() -> None:
        nonlocal count
        while not stop.is_set():
            try:
                out = forward()
            except Exception as error:  # noqa: BLE001 - the assertion below shows it
                wrong.append(error)
                return
            if not torch.equal(out, wanted):
                wrong.append(out)
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    loads = 0
    while thread.is_alive() and (count < 300 or loads < 100):
        for slot in (2, 3, 4):
            bank.load(slot, adapter({"up": 1 + (loads * 7 + slot) % 40}, (loads % 2 == 0, loads % 3 == 0)))
        for slot in (3, 2, 4):
            bank.free(slot)
        bank.check_integrity()
        loads += 1
    stop.set()
    thread.join()
    assert wrong == []


def test_books_can_be_checked_while_adapters_come_and_go() -> None:
    bank = new_bank()
    wrong: list[BaseException] = []
    stop = threading.Event()

    def check() -> None:
        while not stop.is_set() and not wrong:
            try:
                bank.check_integrity()
            except BaseException as error:  # noqa: BLE001 - the assertion below shows it
                wrong.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    for _ in range(300):
        bank.load(1, adapter(dict.fromkeys(SHAPES, 4)))
        bank.load(3, adapter({"q": 2, "up": 7}))
        bank.free(1)
        bank.free(3)
    stop.set()
    thread.join()
    assert wrong == []
