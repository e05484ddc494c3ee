"""Putting an adapter's parts into a model, in place, and taking the wrappers out again."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter_module import AdapterModule, base_of
from lora_core.config import LoraConfig
from lora_core.conv import LoraConv, is_conv
from lora_core.embedding import LoraEmbedding
from lora_core.errors import ConfigError, TargetError, UnsupportedError
from lora_core.init import gaussian, initialise, kaiming
from lora_core.layer import LoraLayer, LoraLinear, is_linear
from lora_core.megatron import LoraParallelLinear, check_megatron, is_parallel_linear
from lora_core.ops import apply_rows
from lora_core.parameter import LoraParameter
from lora_core.quant import is_quantized
from lora_core.routing import Route, Router
from lora_core.targets import Parts, Target, output_embedding_name, resolve
from lora_core.whole import ModulesToSave, TrainableTokens

__all__ = [
    "LoraBias",
    "inject",
    "layer_kind",
    "lora_layer",
    "parameter_layer",
    "replicate_layers",
    "token_layer",
    "unwrap",
    "whole_module",
]


class LoraBias(LoraLayer):
    """A normalisation layer of which adapters train the bias, and nothing else (`bias="all"`)."""

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        size = module.get_parameter("bias").numel()
        return size, size

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:  # noqa: ARG002 - a bias does not look at x
        rows = y.reshape(-1, self.out_features)
        return apply_rows(rows, rows, self.source(), route, None).view(y.shape)


def inject(
    model: nn.Module, router: Router, config: LoraConfig, name: str, *, starting_values: bool = True
) -> dict[str, AdapterModule]:
    """Add an adapter to every part of `model` that its configuration names.

    Args:
        starting_values: False leaves the parameters as PyTorch makes them, for a caller who overwrites them all.

    Returns:
        The adapter's modules by the start of their keys on disk.

    Raises:
        TargetError, ConfigError, UnsupportedError: as `lora_core.targets.resolve`; the model is as it was then.
    """
    parts = resolve(config, model)
    _check(config, parts, model)
    head = output_embedding_name(model)
    out: dict[str, AdapterModule] = {}
    for target in parts.modules:
        out[target.name] = layer = lora_layer(model, router, target.name, is_head=target.name == head)
        if isinstance(layer, LoraParallelLinear):
            layer.megatron_config = config.megatron_config
        layer.add_adapter(
            name,
            target.r,
            target.lora_alpha,
            target.scaling,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            dropout=config.lora_dropout,
        )
        if starting_values:
            initialise(layer, name, config)
    out |= _inject_parameters(model, router, config, name, parts.parameters, starting_values)
    for module_name in parts.biases:
        layer = lora_layer(model, router, module_name, is_head=module_name == head)
        layer.add_bias(name)
        out[module_name] = layer
    for module_name in parts.whole:
        whole = whole_module(model, router, module_name, is_head=module_name == head)
        whole.add_adapter(name)
        out[module_name] = whole
    return out | _inject_tokens(model, router, name, parts, head)


def lora_layer(model: nn.Module, router: Router, name: str, *, is_head: bool = False) -> LoraLayer:
    """The LoraLayer at `name`, put there if need be: innermost, right around the base module."""
    outer: AdapterModule | None = None
    module = model.get_submodule(name)
    while isinstance(module, AdapterModule):
        if isinstance(module, LoraLayer):
            return module
        outer, module = module, module.get_base_layer()
    layer = layer_kind(module)(module, router, is_head=is_head)
    if outer is None:
        _put(model, name, layer)
    else:
        setattr(outer, "original_module" if isinstance(outer, ModulesToSave) else "base_layer", layer)
    return layer


def unwrap(model: nn.Module, *, only_empty: bool = False) -> None:
    """Put base modules back in their places; with `only_empty` those around which no adapter is left."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, AdapterModule) or name.endswith((".base_layer", ".original_module")):
            continue
        if not only_empty or not any(part.adapter_names for part in _chain(module)):
            _put(model, name, base_of(module))


def _chain(module: nn.Module) -> Iterator[AdapterModule]:
    while isinstance(module, AdapterModule):
        yield module
        module = module.get_base_layer()


def replicate_layers(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> None:
    """Stack a model's decoder layers anew from half-open ranges of them; copies share their weights (PEFT).

    Raises:
        UnsupportedError: the layers are in none of the places where Llama, BERT and Falcon have them.
        ConfigError: a range goes beyond them.
    """
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    owner = inner.encoder if hasattr(inner, "encoder") else inner
    attribute = next((a for a in ("layers", "layer", "h") if isinstance(getattr(owner, a, None), nn.ModuleList)), None)
    if attribute is None:
        raise UnsupportedError("Could not locate the layers attribute in the model: layer_replication needs it")
    layers = getattr(owner, attribute)
    if any(end > len(layers) for _, end in ranges):
        raise ConfigError(f"`layer_replication` goes beyond the model's {len(layers)} layers")
    stack = nn.ModuleList()
    for start, end in ranges:
        for layer in layers[start:end]:
            shared = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
            twin = copy.deepcopy(layer, shared)
            for module in twin.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = len(stack)
            stack.append(twin)
    setattr(owner, attribute, stack)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(stack)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = [kinds[i] for start, end in ranges for i in range(start, end)]


def _check(config: LoraConfig, parts: Parts, model: nn.Module) -> None:
    """What would otherwise be found out halfway."""
    check_megatron(config, {target.name: base_of(model.get_submodule(target.name)) for target in parts.modules})
    for target in parts.modules:
        base = base_of(model.get_submodule(target.name))
        if is_conv(base):
            if _is_special(config):
                init = config.init_lora_weights
                raise ConfigError(f"Unknown initialization init_lora_weights={init!r} for a convolution")
            if target.r % base.groups:  # type: ignore[operator]
                raise ConfigError(
                    f"Targeting a {type(base).__name__} with groups={base.groups} and rank {target.r}. "
                    "Currently, support is limited to conv layers where the rank is divisible by groups."
                )
        if config.lora_bias and isinstance(base, nn.Embedding):
            raise ConfigError("lora_bias=True is not supported for Embedding.")
    _check_parameters(config, parts, model)
    for name in parts.biases:
        layer_kind(base_of(model.get_submodule(name)))
    for name in parts.whole:
        if any(is_quantized(module) for module in model.get_submodule(name).modules()):
            raise UnsupportedError(
                f"{name!r} is quantized: an adapter has no copy of the whole module (modules_to_save)"
            )


def _check_parameters(config: LoraConfig, parts: Parts, model: nn.Module) -> None:
    if parts.parameters:
        wrong = next(
            (f for f in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora") if getattr(config, f)), None
        )
        if wrong is not None or _is_special(config):
            raise ConfigError(f"lora.ParamWrapper does not work with {wrong or 'this init_lora_weights'}.")
    for target in parts.parameters:
        module = base_of(model.get_submodule(target.name.rpartition(".")[0]))
        if module in {base_of(model.get_submodule(t.name)) for t in parts.modules}:
            raise TargetError(f"{target.name!r} is targeted as a parameter, and its module as well")


def _is_special(config: LoraConfig) -> bool:
    """The starting values are neither PEFT's plain ones nor Gaussian."""
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower() != "gaussian"


def layer_kind(base: nn.Module) -> type[LoraLayer]:
    """The class that wraps such a module.

    Raises:
        UnsupportedError: none does.
    """
    if is_linear(base):
        return LoraLinear
    if isinstance(base, nn.Embedding):
        return LoraEmbedding
    if is_conv(base):
        return LoraConv
    if is_parallel_linear(base):
        return LoraParallelLinear
    if type(base).__name__.endswith("Norm") and not isinstance(base, nn.GroupNorm):
        return LoraBias
    raise UnsupportedError(f"the bias of a {type(base).__name__} cannot be trained")


def _inject_parameters(
    model: nn.Module,
    router: Router,
    config: LoraConfig,
    name: str,
    targets: Sequence[Target],
    starting_values: bool,
) -> dict[str, AdapterModule]:
    out: dict[str, AdapterModule] = {}
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.name.rpartition(".")[0], []).append(target)
    for module_name, group in by_module.items():
        for place, target in enumerate(group):
            layer = parameter_layer(model, router, module_name, target.name.rpartition(".")[2])
            layer.add_adapter(name, target.r, target.lora_alpha, target.scaling)
            if starting_values:
                _start_parameter(layer, name, config.init_lora_weights)
            # On disk the parameters of a module are nested in PEFT's order: the last one is outermost.
            out[module_name + ".base_layer" * (len(group) - 1 - place)] = layer
    return out


def _start_parameter(layer: LoraParameter, name: str, init: bool | str) -> None:
    if init is not False:
        part = layer.tensors(name)
        with torch.no_grad():
            if isinstance(init, str):
                gaussian(part.lora_A, part.lora_B, layer.r[name])
            else:
                kaiming(part.lora_A, part.lora_B)


def parameter_layer(model: nn.Module, router: Router, module_name: str, parameter: str) -> LoraParameter:
    """The LoraParameter of a module's parameter, put there if need be, outermost."""
    module = model.get_submodule(module_name)
    outer = module
    while isinstance(module, AdapterModule):
        if isinstance(module, LoraParameter) and module.parameter_name == parameter:
            return module
        module = module.get_base_layer()
    layer = LoraParameter(outer, router, parameter)
    _put(model, module_name, layer)
    return layer


def _inject_tokens(
    model: nn.Module, router: Router, name: str, parts: Parts, head: str | None
) -> dict[str, AdapterModule]:
    out: dict[str, AdapterModule] = {}
    for module_name, indices in parts.tokens.items():
        layer = token_layer(model, router, module_name, head=None if head in parts.tokens else head)
        layer.is_head = module_name == head
        layer.add_adapter(name, indices)
        out[module_name] = layer
    return out


def token_layer(model: nn.Module, router: Router, name: str, *, head: str | None) -> TrainableTokens:
    """The TrainableTokens at `name`, put there if need be; and at `head`, if its weight is the same one."""
    found = _outermost(model, name, TrainableTokens)
    if found is not None:
        return found
    found = TrainableTokens(model.get_submodule(name), router, is_head=name == head)
    _put(model, name, found)
    if head not in (None, name) and _outermost(model, head, TrainableTokens) is None:
        output = model.get_submodule(head)
        if _is_tied(model, base_of(output), found.weight):
            _put(model, head, TrainableTokens(output, router, is_head=True, tied_to=found))
    return found


def _is_tied(model: nn.Module, head: nn.Module, weight: Tensor) -> bool:
    """The output embedding has the input's weight; of a packed one, which is a copy, the model tells."""
    if "weight" in dict(head.named_parameters(recurse=False)):
        return getattr(head, "weight", None) is weight
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def whole_module(model: nn.Module, router: Router, name: str, *, is_head: bool) -> ModulesToSave:
    """The ModulesToSave at `name`, put there if need be."""
    found = _outermost(model, name, ModulesToSave)
    if found is None:
        found = ModulesToSave(model.get_submodule(name), router, is_head=is_head)
        _put(model, name, found)
    return found


def _outermost(model: nn.Module, name: str, kind: type[Any]) -> Any:
    """The wrapper of that kind around a module, or None."""
    module = model.get_submodule(name)
    while isinstance(module, AdapterModule):
        if isinstance(module, kind):
            return module
        module = module.get_base_layer()
    return None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base_of(model.get_submodule(parent)) if parent else model, child, module)
