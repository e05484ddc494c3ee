"""Slots in host memory: an adapter in a slot is held once, and comes out as it went in."""

import copy

import pytest
import torch
from torch import nn

from lora_core import ModelSlots, Part, Router, attach_slots, wrap_linears
from lora_core.maths import Folded
from lora_core.serving import ModuleCopy
from server.adapters.loader import BankSlots, FoldedAdapter


@pytest.fixture
def bank() -> ModelSlots:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    return attach_slots(wrap_linears(model, Router()), 3, dtype=torch.float32, model=model)


def adapter(rank: int, *, has_vectors: bool = False) -> FoldedAdapter:
    modules: dict[str, Part] = {"1": ModuleCopy(nn.LayerNorm(5))}
    for name, (in_features, out_features) in {"0": (6, 5), "2": (5, 4)}.items():
        gain, bias = (torch.randn(out_features) if has_vectors else None for _ in range(2))
        modules[name] = Folded(torch.randn(rank, in_features), torch.randn(rank, out_features), gain, bias)
    return FoldedAdapter(modules, sum(t.numel() * t.element_size() for m in modules.values() for t in m.tensors()))


def assert_equal(found: FoldedAdapter, wanted: FoldedAdapter) -> None:
    assert found.num_bytes == wanted.num_bytes
    assert found.modules.keys() == wanted.modules.keys()
    for name, part in wanted.modules.items():
        mine, theirs = found.modules[name].tensors(), part.tensors()
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("has_vectors", [False, True])
def test_an_adapter_lends_its_arrays_to_a_slot_and_gets_them_back(bank: ModelSlots, has_vectors: bool) -> None:
    slots = BankSlots(bank)
    one, other = adapter(3, has_vectors=has_vectors), adapter(2)
    wanted = copy.deepcopy(one)
    for slot in (0, 2, 0):  # whatever slot it had before
        slots.load(slot, one)
        assert list(one.modules) == ["1"]  # its own module, which the model uses as it is
        assert one.num_bytes == wanted.num_bytes
        found = bank.read(slot)
        assert all(torch.equal(found[name].a, wanted.modules[name].tensors()[0]) for name in ("0", "2"))
        slots.load(1, other)  # arenas grow and move
        slots.free(slot)
        slots.free(1)
        assert_equal(one, wanted)
        for part in one.modules.values():  # copies: whoever gets the rows next does not write into them
            assert all(part.tensors()[0].data_ptr() != layer.a.data_ptr() for layer in bank.layers.values())
    assert bank.loaded_slots == frozenset()


def test_what_nobody_has_any_more_is_not_copied(bank: ModelSlots, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = BankSlots(bank)
    slots.load(0, adapter(3))
    monkeypatch.setattr(bank, "read", lambda _: pytest.fail("copied for nobody"))
    slots.free(0)
    assert bank.loaded_slots == frozenset()


def test_an_adapter_that_does_not_get_its_slot_keeps_its_arrays(bank: ModelSlots) -> None:
    slots = BankSlots(bank)
    slots.load(0, adapter(3))
    late = adapter(2)
    wanted = copy.deepcopy(late)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        slots.load(0, late)
    assert_equal(late, wanted)
