"""`add_weighted_adapter`: several adapters of a LoraModel combined into a new one.

PEFT's options and results, but for these:

- The result's scaling is 1 in every module. PEFT lets it inherit `use_rslora`, which makes it √r times too large, so
  that one rsLoRA adapter mixed with weight 1 does not return itself.
- The base weights never change. PEFT runs the first source's initialisation again, and PiSSA and OLoRA change them.
- DoRA is mixed as what it is, a change of the whole weight, by the "svd" family; the other types work on factors and
  refuse it. One DoRA adapter with weight 1 returns itself. PEFT gives the result the magnitude of random factors.
- Where modules differ in rank the config says so, and the saved result can be loaded.
- `lora_B.bias` is combined as the plain weighted sum; PEFT leaves it at zero.
- A taken name is an error, and after any error the model is as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lora_core.config import LoraConfig
from lora_core.embedding import LoraEmbedding
from lora_core.errors import AdapterNotFoundError, ConfigError, TargetError, UnsupportedError
from lora_core.layer import LoraLayer, is_conv1d
from lora_core.mixing import NEEDS_EQUAL_RANKS, MixOptions, MixPart, mix_module
from lora_core.patterns import pattern_fields
from lora_core.targets import resolve_targets
from lora_core.weights import LoraTensors

if TYPE_CHECKING:
    from lora_core.model import LoraModel

__all__ = ["add_weighted_adapter"]

# What the result takes from the first source.
KEPT_FIELDS = (
    "lora_dropout", "fan_in_fan_out", "layer_replication", "task_type", "base_model_name_or_path", "revision",
    "auto_mapping",
)  # fmt: skip
SELECTORS = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Parts of an adapter that are no factors.
FULL_WEIGHTS = ("modules_to_save", "trainable_token_indices", "target_parameters")


def add_weighted_adapter(
    model: "LoraModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Add an adapter that combines others; it is inactive. Options are those of `MixOptions`.

    Args:
        adapters: names of the sources. A single one is always combined as "linear", as in PEFT, which returns its
            change times the weight.
        weights: one for each, of any sign.
        svd_rank: rank of the "svd" family's result, at most that of a module; the largest source rank by default.
        report: called after each layer with the number of those that are done, and of all.

    Raises:
        AdapterNotFoundError: a source does not exist.
        ConfigError: the name is taken, an option is wrong, or ranks differ where the type needs equal ones.
        UnsupportedError: a source has full weights, trained biases, or DoRA with a type that works on factors.
    """
    configs = _checked_configs(model, adapters, weights, adapter_name)
    keeps_dora = len(adapters) == 1 and configs[0].use_dora and weights[0] == 1
    if len(adapters) == 1 and (keeps_dora or not configs[0].use_dora):
        combination_type = "linear"
    options = MixOptions(
        combination_type=combination_type,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        svd_full_matrices=svd_full_matrices,
        svd_driver=svd_driver,
        density=density,
        majority_sign_method=majority_sign_method,
    )
    mix = _Mix(list(zip(adapters, map(float, weights), strict=True)), options, configs, keeps_dora)
    layers = _layers(model, adapters)
    ranks = {name: mix.rank(name, layer) for name, layer in layers.items()}
    model.add_adapter(adapter_name, _config(model, configs, ranks, options, keeps_dora))
    try:
        with torch.no_grad():
            for i, (name, layer) in enumerate(layers.items(), 1):
                own = layer.tensors(adapter_name)
                for value, new in zip(own.tensors(), mix.tensors(layer, ranks[name], own).tensors(), strict=True):
                    value.copy_(new)
                if report is not None:
                    report(i, len(layers))
    except BaseException:
        model.delete_adapter(adapter_name)
        raise


def _checked_configs(
    model: "LoraModel", adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> list[LoraConfig]:
    if adapter_name in model.peft_config:
        raise ConfigError(f"Adapter with name '{adapter_name}' already exists.")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights: there must be as many, and one at least"
        )
    for name in adapters:
        config = model.peft_config.get(name)
        if config is None:
            raise AdapterNotFoundError(f"Adapter {name} does not exist")
        for field in FULL_WEIGHTS:
            if getattr(config, field):
                raise UnsupportedError(f"adapter {name} has `{field}`, which has no factors to combine")
        if config.bias != "none":
            raise UnsupportedError(f"adapter {name} trains biases (`bias`), which cannot be combined")
    return [model.peft_config[name] for name in adapters]


def _layers(model: "LoraModel", adapters: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers that any of the adapters touches, in the model's order, which is that of random draws."""
    place = {id(module): i for i, module in enumerate(model.model.modules())}
    layers = {
        name: layer for name, layer in model.layers.items() if any(layer.has_factors(adapter) for adapter in adapters)
    }
    return dict(sorted(layers.items(), key=lambda item: place[id(item[1])]))


class _Mix:
    """One combination, to be applied to each layer."""

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        options: MixOptions,
        configs: Sequence[LoraConfig],
        keeps_dora: bool,
    ) -> None:
        self.sources = sources
        self.options = options
        self.keeps_dora = keeps_dora
        self.svd_rank = options.svd_rank or max(max(config.r, *config.rank_pattern.values(), 0) for config in configs)

    def rank(self, name: str, layer: LoraLayer) -> int:
        """Rank of the result in a layer, after all checks."""
        parts = [layer.tensors(adapter) for adapter, _ in self.sources if layer.has_factors(adapter)]
        if getattr(layer.base_layer, "groups", 1) > 1:
            raise UnsupportedError(f"module {name!r} is a convolution with groups: its adapters cannot be combined")
        kind = self.options.combination_type
        if self.options.is_svd:
            return min(self.svd_rank, parts[0].lora_B.shape[0], parts[0].lora_A.shape[1])
        if any(part.magnitude is not None for part in parts) and not self.keeps_dora:
            raise UnsupportedError(
                f'combination_type "{kind}" works on factors, and what a DoRA adapter changes is no product of its '
                'factors: use "svd" or another type that ends in it'
            )
        ranks = [part.rank for part in parts]
        if kind in NEEDS_EQUAL_RANKS and len(set(ranks)) > 1:
            raise ConfigError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                f"dare_linear; in module {name!r} they are {ranks}"
            )
        return sum(ranks) if kind == "cat" else ranks[0]

    def tensors(self, layer: LoraLayer, rank: int, like: LoraTensors) -> LoraTensors:
        """The result's tensors in a layer, for a scaling of 1; those that `like` has."""
        sources = [(adapter, weight) for adapter, weight in self.sources if layer.has_factors(adapter)]
        parts = []
        for adapter, weight in sources:
            part = layer.tensors(adapter)
            # Factors say it all but for DoRA.
            delta = layer.delta_matrix(adapter) if part.magnitude is not None and self.options.is_svd else None
            parts.append(MixPart(part, layer.scaling[adapter], weight, delta))
        is_transposed = isinstance(layer, LoraEmbedding) or is_conv1d(layer.base_layer)
        mixed = mix_module(parts, self.options, rank, transposed=is_transposed)
        bias, magnitude = None, None
        if like.bias is not None:
            biases = [p.weight * p.scaling * p.tensors.bias for p in parts if p.tensors.bias is not None]
            bias = sum(biases, start=torch.zeros_like(like.bias))
        if like.magnitude is not None:
            magnitude = parts[0].tensors.magnitude
        return LoraTensors(mixed.lora_A, mixed.lora_B, bias, magnitude)


def _config(
    model: "LoraModel",
    configs: Sequence[LoraConfig],
    ranks: Mapping[str, int],
    options: MixOptions,
    use_dora: bool,
) -> LoraConfig:
    first = configs[0]
    largest = max(ranks.values())
    if options.combination_type in NEEDS_EQUAL_RANKS:
        largest = max(largest, *(config.r for config in configs))
    init = first.init_lora_weights
    values: dict[str, Any] = {name: getattr(first, name) for name in KEPT_FIELDS}
    values |= pattern_fields({name: (rank, rank) for name, rank in ranks.items()}, (largest, largest))
    values |= {
        "use_dora": use_dora,
        "lora_bias": any(config.lora_bias for config in configs),
        # Its values are overwritten, but it makes PEFT's number of random draws.
        "init_lora_weights": init if isinstance(init, bool) or init.lower() == "gaussian" else True,
    }
    together = _common_selection(configs)
    if together is not None:
        config = LoraConfig(**values, **together)
        if _selects(model, config, ranks):
            return config
    return LoraConfig(**values, target_modules=tuple(ranks))


def _common_selection(configs: Sequence[LoraConfig]) -> dict[str, Any] | None:
    """PEFT's union of what the sources target, if one config can say it."""
    if len({tuple(getattr(config, name) for name in SELECTORS) for config in configs}) > 1:
        return None
    targets = [config.target_modules for config in configs]
    out: dict[str, Any] = {name: getattr(configs[0], name) for name in SELECTORS}
    if len(set(targets)) == 1:
        return out | {"target_modules": targets[0]}
    if any(target is None or isinstance(target, str) for target in targets):
        return None
    return out | {"target_modules": tuple(sorted({name for target in targets for name in target or ()}))}


def _selects(model: "LoraModel", config: LoraConfig, names: Mapping[str, Any]) -> bool:
    try:
        return {target.name for target in resolve_targets(config, model.model)} == set(names)
    except TargetError:
        return False
