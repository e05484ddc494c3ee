"""A model whose adapters live in slots: what a server needs of this package.

Folded adapters of linear layers and embeddings go into arenas (`lora_core.slots`); an adapter's full weights (whole
modules, embedding rows, factors of experts' parameters) go into wrappers, which come into the model when the first
adapter needs them. Both may happen beside a forward pass: no route uses the slot yet.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.adapter_module import AdapterModule, base_of
from lora_core.checkpoint import ROWS_SUFFIX, check_base_weight, check_shape
from lora_core.errors import LoraError, TargetError, UnsupportedError
from lora_core.inject import layer_kind, lora_layer, parameter_layer, token_layer, whole_module
from lora_core.layer import LoraLayer, LoraLinear, is_linear, linear_weight
from lora_core.ledger import FACTORS, Outcome, TensorLedger
from lora_core.maths import Folded, fold, is_finite
from lora_core.parameter import LoraParameter
from lora_core.routing import Router
from lora_core.shared import PackedLinear
from lora_core.slots import LayerSlots, SlotBank, SlotsOfLayer
from lora_core.targets import Parts, Target, output_embedding_name, resolve
from lora_core.weights import AdapterWeights, LoraTensors

__all__ = [
    "ExpertFactors",
    "ModelSlots",
    "ModuleCopy",
    "Part",
    "TokenRows",
    "fold_adapter",
    "wrap_linears",
]


@dataclass(frozen=True, slots=True)
class ModuleCopy:
    """An adapter's own copy of a module."""

    module: nn.Module

    def tensors(self) -> list[Tensor]:
        return list(self.module.state_dict().values())


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows [n, D] of an embedding minus the base's, in float32, and the n tokens that they belong to."""

    indices: tuple[int, ...]
    change: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.change]


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """Factors of a parameter in PEFT's layout, and the scaling of their product."""

    factors: LoraTensors
    scaling: float

    def tensors(self) -> list[Tensor]:
        return self.factors.tensors()


Part = Folded | ModuleCopy | TokenRows | ExpertFactors


def wrap_linears(model: nn.Module, router: Router, names: Iterable[str] | None = None) -> dict[str, LoraLinear]:
    """Put a LoraLinear in the place of linear layers of `model`, in place.

    Args:
        names: dotted names of the layers; all linear layers by default. One that is wrapped already stays as it is.

    Returns:
        The wrapped layers by name.
    """
    head = output_embedding_name(model)
    if names is None:
        names = [n for n, m in model.named_modules() if is_linear(m) and not n.endswith(".base_layer")]
    return {name: cast(LoraLinear, lora_layer(model, router, name, is_head=name == head)) for name in names}


class ModelSlots(SlotBank):
    """The slots of a whole model.

    Args:
        layers: the model's wrapped linear layers, by name.
        dtype: of folded adapters.
        model: without it adapters may touch these layers only.
    """

    def __init__(
        self, layers: Mapping[str, LoraLinear], max_slots: int, *, dtype: torch.dtype, model: nn.Module | None = None
    ) -> None:
        self._model = nn.Module() if model is None else model
        self._router = next(iter(layers.values())).router
        self._dtype = dtype
        self._max_slots = max_slots
        self._head = output_embedding_name(self._model)
        self._placed: dict[int, list[tuple[Any, Part]]] = {}
        super().__init__({name: self._make_slots(layer) for name, layer in layers.items()}, max_slots)

    @property
    def num_bytes(self) -> int:
        held = [tensor for placed in self._placed.values() for _, part in placed for tensor in part.tensors()]
        return super().num_bytes + sum(t.numel() * t.element_size() for t in held)

    def load(self, slot: int, modules: Mapping[str, Part]) -> None:
        """Put a folded adapter into an empty slot.

        Raises:
            ValueError: the slot is taken or out of range.
        """
        folded = {name: part for name, part in modules.items() if isinstance(part, Folded)}
        for name in folded.keys() - self.layers.keys():
            layer = lora_layer(self._model, self._router, name, is_head=name == self._head)
            self.add_layer(name, self._make_slots(layer))
        super().load(slot, folded)
        self._placed[slot] = [
            (self._place(name, part, slot), part) for name, part in modules.items() if not isinstance(part, Folded)
        ]

    def free(self, slot: int) -> None:
        super().free(slot)
        for holder, _ in self._placed.pop(slot, ()):
            del holder[slot]

    def _make_slots(self, layer: LoraLayer) -> SlotsOfLayer:
        slots = LayerSlots(
            layer.in_features, layer.out_features, self._max_slots, dtype=self._dtype, device=layer.device
        )
        layer.slots = slots
        return slots

    def _place(self, name: str, part: Part, slot: int) -> dict[Any, Any]:
        """Give a part to its wrapper; returns the dictionary that holds it."""
        if isinstance(part, ModuleCopy):
            copies = whole_module(self._model, self._router, name, is_head=name == self._head).copies
            copies[slot] = part.module
            return copies
        if isinstance(part, TokenRows):
            rows = token_layer(self._model, self._router, name, head=self._head).slots
            rows[slot] = (torch.tensor(part.indices, device=part.change.device), part.change)
            return rows
        assert isinstance(part, ExpertFactors)
        module, _, parameter = name.rpartition(".")
        factors = parameter_layer(self._model, self._router, module, parameter).slots
        factors[slot] = (part.factors, part.scaling)
        return factors


def fold_adapter(
    adapter: AdapterWeights, model: nn.Module, *, dtype: torch.dtype, ledger: TensorLedger | None = None
) -> dict[str, Part]:
    """Make a whole adapter ready for a slot of `model`: folded in float32, then cast to `dtype`.

    Args:
        ledger: gets the fate of every tensor, also when the adapter is refused.

    Returns:
        Its parts by module, or by parameter; they share no memory with the adapter's tensors.

    Raises:
        TargetError: file and configuration disagree for this model, a shape is another, or folding overflows `dtype`.
    """
    return _Folding(adapter, model, dtype, ledger or TensorLedger(adapter)).run()


class _Folding:
    """One adapter's way into parts. `rest` are the full weights that nothing has asked for yet."""

    def __init__(self, adapter: AdapterWeights, model: nn.Module, dtype: torch.dtype, ledger: TensorLedger) -> None:
        self.adapter = adapter
        self.model = model
        self.dtype = dtype
        self.ledger = ledger
        self.rest = dict(adapter.full)
        self.out: dict[str, Part] = {}

    def run(self) -> dict[str, Part]:
        parts = resolve(self.adapter.config, self.model)
        nested = _nested(parts)
        self._check_modules({target.name for target in parts.modules} | set(nested))
        biases: dict[str, Tensor] = {}
        for name in parts.biases:
            with self._refusing(name):
                biases[name] = self._bias(name, parts)
        for target in parts.modules:
            if target.name in self.adapter.modules:
                with self._refusing(target.name):
                    self.out[target.name] = self._folded(target, biases.pop(target.name, None))
        for name, bias in biases.items():
            empty = bias.new_empty(0, self._layer_shape(name)[1]), bias.new_empty(0, len(bias))
            self.out[name] = Folded(*empty, None, bias)
        for prefix, target in nested.items():
            if prefix in self.adapter.modules:
                with self._refusing(prefix):
                    self.out[target.name] = self._experts(target, prefix)
        for name in parts.whole:
            with self._refusing(name):
                self.out[name] = self._copy(name)
        for name, indices in parts.tokens.items():
            with self._refusing(name + ROWS_SUFFIX):
                self.out[name] = self._rows(name, indices)
        for name, part in self.out.items():
            if not all(map(is_finite, part.tensors())):
                error = TargetError(f"module {name!r} is not finite in {self.dtype}", code="adapter_not_finite")
                self.ledger.refuse(name, error)
        self.ledger.settle()
        return self.out

    def _check_modules(self, targets: set[str]) -> None:
        """Refuse modules that are not targeted, and note those that are and have no tensors."""
        extra = sorted(set(self.adapter.modules) - targets)
        missing = sorted(targets - set(self.adapter.modules))
        for name in extra:
            count = f"{len(extra)} such modules"
            self.ledger.refuse(name, TargetError(f"the file has tensors for {name!r} ({count}), which is not targeted"))
        if missing:
            count = f"{len(missing)} such modules"
            message = f"the configuration targets {missing[0]!r} ({count}), for which the file has no tensors"
            self.ledger.refuse(missing[0], TargetError(message))

    @contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        """What is wrong with one part does not keep the others from being judged."""
        try:
            yield
        except LoraError as error:
            self.ledger.refuse(name, error)

    def _take(self, key: str, shape: Iterable[int], outcome: Outcome, reason: str) -> Tensor:
        tensor = self.rest.pop(key, None)
        if tensor is None:
            raise TargetError(f"the adapter's file lacks {key!r}, which its configuration names")
        if list(tensor.shape) != list(shape):
            error = TargetError(f"{key!r}: the adapter holds {list(tensor.shape)}, not {list(shape)}")
            self.ledger.refuse(key, error)
            raise error
        self.ledger.note(key, ["full weight"], outcome, reason)
        return tensor

    def _layer_shape(self, name: str) -> tuple[int, int]:
        module = self.model.get_submodule(name)
        while isinstance(module, AdapterModule) and not isinstance(module, LoraLayer):
            module = module.get_base_layer()
        if isinstance(module, LoraLayer):
            return module.out_features, module.in_features
        return layer_kind(module).shape_of(module)

    def _folded(self, target: Target, bias: Tensor | None) -> Folded:
        name = target.name
        part, base = self.adapter.modules[name], base_of(self.model.get_submodule(name))
        if part.rank != target.r:
            raise TargetError(f"module {name!r}: the configuration says rank {target.r}, the tensors {part.rank}")
        check_shape(name, part, self._layer_shape(name))
        check_base_weight(name, self.adapter.base_weights.get(name), base)
        part, weight = part.map(Tensor.float), None
        if part.magnitude is not None:
            weight = linear_weight(base).detach()  # stays where it is
            weight = weight.T if isinstance(base, nn.Embedding) else weight
        out = fold(part, target.scaling, weight)
        scale = getattr(base, "embed_scale", None)
        b = out.b if scale is None else out.b * scale.float().cpu()
        own = out.bias if bias is None else bias if out.bias is None else out.bias + bias
        gain = "" if part.magnitude is None else ", and DoRA's gain magnitude / ‖W0 + s·B·A‖"
        self.ledger.note(name, FACTORS, "folded", f"into B·A times its scaling{gain}")
        self.ledger.note(name, ["lora_B.bias"], "folded", "into the bias, times the scaling")
        self.ledger.note(name, ["lora_magnitude_vector"], "folded", "into the gain of each output")
        self.ledger.note(name, ["base weight"], "used", "compared: it is the base model's own")
        return Folded(out.a.to(self.dtype, copy=True), b, out.gain, own).to(self.dtype)

    def _bias(self, name: str, parts: Parts) -> Tensor:
        """What the trained bias adds to the base's, [O]."""
        own = base_of(self.model.get_submodule(name)).get_parameter("bias").detach()
        has_lora = any(target.name == name for target in parts.modules)
        key = f"{name}.base_layer.bias" if has_lora else f"{name}.bias"
        saved = self._take(key, own.shape, "folded", "bias: into what it adds to the base model's")
        return (saved.float() - own.float().cpu()).to(self.dtype)

    def _experts(self, target: Target, prefix: str) -> ExpertFactors:
        name, r, part = target.name, target.r, self.adapter.modules[prefix]
        module_name, _, parameter = name.rpartition(".")
        layer = LoraParameter(base_of(self.model.get_submodule(module_name)), Router(), parameter)
        check_shape(name, part, (layer.out_features, layer.in_features))
        if part.rank != r * layer.num_experts:
            raise TargetError(f"{name!r}: the configuration says rank {r}, the tensors have {part.rank} rows")
        self.ledger.note(prefix, FACTORS, "used", "factors of a parameter, expert by expert")
        return ExpertFactors(part.map(lambda t: t.to(layer.parameter, copy=True)), target.scaling)

    def _copy(self, name: str) -> ModuleCopy:
        module = _blank_copy(name, base_of(self.model.get_submodule(name)))
        own = module.state_dict()
        reason = "whole module: the adapter's own copy"
        values = {key: self._take(f"{name}.{key}", value.shape, "used", reason) for key, value in own.items()}
        module.load_state_dict({key: value.to(own[key].dtype) for key, value in values.items()}, assign=False)
        return ModuleCopy(module.requires_grad_(False).eval())

    def _rows(self, name: str, indices: tuple[int, ...]) -> TokenRows:
        weight = cast(Tensor, base_of(self.model.get_submodule(name)).weight).detach()
        if max(indices) >= len(weight):
            raise TargetError(f"token {max(indices)} is outside of the vocabulary of {len(weight)} tokens")
        reason = "embedding rows: into what they add to the base model's"
        rows = self._take(name + ROWS_SUFFIX, (len(indices), weight.shape[1]), "folded", reason)
        own = weight.index_select(0, torch.tensor(indices).to(weight.device))
        return TokenRows(indices, rows.float().to(weight.device) - own.float())


def _nested(parts: Parts) -> dict[str, Target]:
    """Targeted parameters by the start of their keys on disk: the last one of a module is outermost."""
    groups: dict[str, list[Target]] = {}
    for target in parts.parameters:
        groups.setdefault(target.name.rpartition(".")[0], []).append(target)
    return {
        module + ".base_layer" * (len(group) - 1 - place): target
        for module, group in groups.items()
        for place, target in enumerate(group)
    }


def _blank_copy(name: str, base: nn.Module) -> nn.Module:
    """A module like `base` to be filled, without adapters in it; packed layers become plain ones again.

    Raises:
        UnsupportedError: a layer in it is not in floating point, or it attends, which takes all rows together.
    """
    if not isinstance(base, PackedLinear):
        return _copy_of_parts(name, base)
    if base.is_transposed or base.is_quantized:
        kind = "quantized" if base.is_quantized else "a Conv1D whose weight is packed"
        raise UnsupportedError(f"`modules_to_save`: {name!r} is {kind}")
    weight = base.weight
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device=weight.device)
    return linear.to(weight.dtype)


def _copy_of_parts(name: str, base: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for path, module in base.named_modules():
        if hasattr(module, "layer_idx"):
            raise UnsupportedError(f"`modules_to_save`: {name!r} attends; rows are served there by one module only")
        if isinstance(module, AdapterModule) and id(module) not in memo:
            memo[id(module)] = _blank_copy(f"{name}.{path}", base_of(module))
    return copy.deepcopy(base, memo)
