"""From an adapter's two files to arrays in a slot: checking, folding, and the bridge to the engine's slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core import (
    AdapterWeights,
    LoraConfig,
    LoraError,
    ModelSlots,
    Part,
    TensorLedger,
    flatten_parts,
    fold_adapter,
    parse_adapter,
)
from lora_core.checkpoint import non_finite_tensor
from lora_core.transfer import SideWork, side_work_for
from server.adapters.report import import_report
from server.adapters.tiers import HostAdapter
from server.errors import InvalidAdapterError

__all__ = ["AdapterLoader", "BankSlots", "FoldedAdapter"]


@dataclass(frozen=True, slots=True)
class FoldedAdapter:
    """An adapter folded for the served model (`HostAdapter`): arrays by layer name."""

    modules: Mapping[str, Part]
    num_bytes: int


class AdapterLoader:
    """Checks and folds adapters for one model, on several threads at once, beside the engine's.

    What needs the base weights (DoRA's norms, an adapter's own copies of modules) is computed where they are.

    Args:
        model: the served model, with its linear layers wrapped.
        dtype: of the folded arrays, the model's own.
        max_rank: highest rank that is accepted.
        flatten_for: keep each adapter in one piece of memory, from which one copy brings it to this device; None: no.
        work: how to compute on the model's device; by default beside the steps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        max_rank: int,
        flatten_for: torch.device | None = None,
        work: SideWork | None = None,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self.max_rank = max_rank
        self._flatten_for = flatten_for
        self._work = side_work_for(next(model.parameters()).device) if work is None else work

    def fold(self, config_json: bytes, weights: bytes | memoryview) -> FoldedAdapter:
        """Make an adapter ready for a slot; a memoryview is not copied first.

        Raises:
            InvalidAdapterError: it is malformed or does not fit the model.
        """
        adapter = self._fold(self._parse(config_json, weights))
        if self._flatten_for is None:
            return adapter
        return FoldedAdapter(flatten_parts(adapter.modules, self._flatten_for), adapter.num_bytes)

    @staticmethod
    def changes_base(config_json: bytes) -> bool:
        """It was trained on a base that its initialisation changed; False for one that `check` will refuse anyway."""
        try:
            return LoraConfig.from_json(config_json).changes_base
        except LoraError:
            return False

    def check(self, config_json: bytes, weights: bytes, *, converted: str = "") -> dict[str, Any]:
        """Check an upload by all that serving it takes, folding included.

        Args:
            converted: how its A and B came to be, if they are not those that were sent.

        Returns:
            What to tell about it: rank, kind, targets, and as `report` what becomes of its tensors.

        Raises:
            InvalidAdapterError: naming the first thing that is wrong; its `details` have the report too, if the files
                could be read.
        """
        adapter = self._parse(config_json, weights)
        ledger = TensorLedger(adapter, converted=converted)
        try:
            self._check_values(adapter, ledger)
            folded = self._fold(adapter, ledger)
        except InvalidAdapterError as error:
            error.details = {"report": import_report(ledger.groups())}
            raise
        return {
            "type": "dora" if adapter.config.use_dora else "lora",
            "rank": _rank(adapter),
            "rslora": adapter.config.use_rslora,
            "num_modules": len(adapter.modules),
            "folded_bytes": folded.num_bytes,
            "targets": sorted({name.rpartition(".")[2] for name in adapter.modules}),
            "report": import_report(ledger.groups()),
        }

    def _check_values(self, adapter: AdapterWeights, ledger: TensorLedger) -> None:
        bad = non_finite_tensor(adapter)
        if bad is not None:
            error = LoraError(f"module {bad!r} holds NaN or infinite values", code="adapter_not_finite")
            ledger.refuse(bad, error)
            raise InvalidAdapterError(str(error), code=error.code)
        if _rank(adapter) > self.max_rank:
            message = f"the adapter has rank {_rank(adapter)}, at most {self.max_rank} is allowed"
            raise InvalidAdapterError(message, code="adapter_rank_too_large")

    @staticmethod
    def _parse(config_json: bytes, weights: bytes | memoryview) -> AdapterWeights:
        try:
            return parse_adapter(config_json, weights)
        except LoraError as error:
            raise InvalidAdapterError(str(error), code=error.code) from error

    def _fold(self, adapter: AdapterWeights, ledger: TensorLedger | None = None) -> FoldedAdapter:
        try:
            with self._work.begin():
                modules = fold_adapter(adapter, self._model, dtype=self._dtype, ledger=ledger)
        except LoraError as error:
            raise InvalidAdapterError(str(error), code=error.code) from error
        num_bytes = sum(t.numel() * t.element_size() for folded in modules.values() for t in folded.tensors())
        return FoldedAdapter(modules, num_bytes)


def _rank(adapter: AdapterWeights) -> int:
    return max((part.rank for part in adapter.modules.values()), default=0)


class BankSlots:
    """The engine's slot bank as the registry sees it (`SlotStore`)."""

    def __init__(self, bank: ModelSlots) -> None:
        self._bank = bank

    @property
    def max_slots(self) -> int:
        return self._bank.max_slots

    @property
    def allocated_bytes(self) -> int:
        return self._bank.num_bytes

    def load(self, slot: int, adapter: HostAdapter) -> None:
        assert isinstance(adapter, FoldedAdapter)
        self._bank.load(slot, adapter.modules)

    def free(self, slot: int) -> None:
        self._bank.free(slot)
