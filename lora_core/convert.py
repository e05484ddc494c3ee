"""Adapters turned into plain LoRA: from changed bases (PiSSA, OLoRA, …), from rsLoRA, from DoRA.

Functions over state dicts have keys without PEFT's `base_model.model.` prefix, as `checkpoint.read_adapter` gives them;
those over folders read and write whole adapters. A *base* is the unquantized model's tensors by key, as a
`TensorFolder` or a state dict.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.checkpoint import read_adapter, write_adapter
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError, ConfigError, UnsupportedError
from lora_core.init import olora, pissa
from lora_core.maths import weight_change
from lora_core.mixing import svd_factors
from lora_core.patterns import pattern_fields
from lora_core.targets import match_targets
from lora_core.tensor_folder import TensorFolder, find_weight
from lora_core.weights import LoraTensors

__all__ = [
    "Conversion",
    "convert_to_lora",
    "initial_factors",
    "plain_lora",
    "relative_error",
    "simplify_adapter",
    "subtract_mutated_init",
    "subtracted_config",
]

TensorMap = Mapping[str, Tensor]
# The ends of keys of A and B: of linear layers and convolutions, and of embeddings.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
MAGNITUDE = ".lora_magnitude_vector"
# Initialisations that can be computed again from the base weight alone, to the same numbers.
REPEATABLE = ("pissa", "olora")
# Training turns an adapter away from its starting values, but not this far: that of another base is at 0.
MIN_SIMILARITY = 0.5


class _Module(NamedTuple):
    """One module of an adapter's state dict: its name and its keys."""

    name: str
    key_a: str
    key_b: str

    @property
    def is_embedding(self) -> bool:
        return self.key_a.endswith("embedding_A")


class Conversion(NamedTuple):
    """How an adapter was made a plain one of the original base.

    Attributes:
        init: its `init_lora_weights`, in lower case.
        is_computed: its starting values were computed again from the base; else they were given.
        similarity: ⟨B·A, B0·A0⟩ / (‖B·A‖·‖B0·A0‖) over all modules, 1 before training.
    """

    init: str
    is_computed: bool
    similarity: float


def _modules(tensors: TensorMap) -> Iterator[_Module]:
    for key in tensors:
        for end_a, end_b in FACTORS:
            if key.endswith(end_a):
                name = key.removesuffix(end_a)
                if name + end_b not in tensors:
                    raise CheckpointError(f"module {name!r} lacks its B")
                yield _Module(name, key, name + end_b)


# From a changed base to the original one.


def convert_to_lora(
    adapter_folder: str | Path,
    initial_folder: str | Path | None,
    out_folder: str | Path,
    *,
    base_folder: str | Path | None = None,
) -> Conversion:
    """Convert an adapter that was trained on a base changed by its initialisation into a plain one of the original.

    Everything in the file but A and B stays as it is: DoRA magnitudes, biases, whole modules (PEFT drops them).

    Args:
        initial_folder: the adapter as it was before training; exact for PiSSA, OLoRA, CorDA and LoRA-GA. For LoftQ it
            leaves the part of the quantization error that the starting values did not make up for. PEFT has its
            configuration say `init_lora_weights=True`; here it does not matter.
        base_folder: without an initial adapter, the original model's safetensors, from which the starting values of
            "pissa" and "olora" are computed again.

    Raises:
        ConfigError: the adapter is plain already, or neither of the two folders is given.
        CheckpointError: a folder is malformed, or the initial adapter is not one of this adapter.
        UnsupportedError: the starting values cannot be computed again (random, or from data), belong to parameters, or
            those that are computed are not near the adapter's: it was trained on another base, or made in another way.
    """
    config, tensors = read_adapter(adapter_folder)
    if initial_folder is not None:
        initial_config, initial = read_adapter(initial_folder)
        for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            if getattr(initial_config, field) != getattr(config, field):
                raise CheckpointError(f"the initial adapter's `{field}` is not that of the adapter")
    elif base_folder is not None:
        initial = initial_factors(config, tensors, TensorFolder(base_folder))
    else:
        raise ConfigError("give the initial adapter's folder, or that of the base model")
    new = subtract_mutated_init(tensors, initial)
    found = Conversion(str(config.init_lora_weights).lower(), initial_folder is None, _similarity(tensors, initial))
    if found.is_computed and not found.similarity > MIN_SIMILARITY:
        raise UnsupportedError(
            f"the starting values of init_lora_weights={config.init_lora_weights!r}, computed from this base, are not "
            f"those of the adapter (their cosine is {found.similarity:.2f}): it was trained on another base; the "
            "adapter as it was before training is needed",
            code="adapter_needs_conversion",
        )
    write_adapter(subtracted_config(config), new, out_folder)
    return found


def _similarity(tensors: TensorMap, initial: TensorMap) -> float:
    """From the factors' Gram matrices, so that no [O, I] is ever made."""
    product = size = initial_size = 0.0
    for module in _modules(tensors):
        a, a0 = (values[module.key_a].double().flatten(1) for values in (tensors, initial))
        b, b0 = (values[module.key_b].double().flatten(1) for values in (tensors, initial))
        product += _inner(a, b, a0, b0)
        size += _inner(a, b, a, b)
        initial_size += _inner(a0, b0, a0, b0)
    return product / math.sqrt(size * initial_size) if size * initial_size > 0 else 0.0


def _inner(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> float:
    """⟨b·a, b0·a0⟩ of embeddings and linear layers alike: whatever stands between, factors meet at the rank."""
    return ((b.T @ b0) * (a @ a0.T)).sum().item()


def subtract_mutated_init(tensors: TensorMap, initial: TensorMap) -> dict[str, Tensor]:
    """Trained minus initial: A' = [A; A0], B' = [B, -B0], so that s·B'·A' = s·(B·A - B0·A0); the rest is kept.

    Raises:
        CheckpointError: the initial tensors are not those of the same modules.
    """
    out = dict(tensors)
    modules = list(_modules(tensors))
    if {m.key_a for m in modules} != {m.key_a for m in _modules(initial)}:
        raise CheckpointError("the initial adapter has other modules than the adapter")
    for module in modules:
        a, b = tensors[module.key_a], tensors[module.key_b]
        a0, b0 = initial[module.key_a], initial[module.key_b]
        if a0.shape != a.shape or b0.shape != b.shape:
            raise CheckpointError(f"module {module.name!r}: the initial adapter's tensors have other shapes")
        out[module.key_a] = torch.cat([a, a0.to(a)])
        out[module.key_b] = torch.cat([b, -b0.to(b)], dim=1)
    return out


def subtracted_config(config: LoraConfig) -> LoraConfig:
    """The configuration that goes with `subtract_mutated_init`: twice the rank, the same scaling.

    PEFT refuses rsLoRA with patterns, as it doubles their alphas; √2 is right for those too.

    Raises:
        UnsupportedError: the adapter adapts parameters, whose factors are laid out by experts.
    """
    if config.target_parameters:
        raise UnsupportedError("`target_parameters`: adapters of parameters cannot be converted")
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        init_lora_weights=True,
        loftq_config=None,
        r=config.r * 2,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={key: r * 2 for key, r in config.rank_pattern.items()},
        alpha_pattern={key: alpha * factor for key, alpha in config.alpha_pattern.items()},
    )


def initial_factors(config: LoraConfig, tensors: TensorMap, base: TensorMap) -> dict[str, Tensor]:
    """The starting values of an adapter, computed again from the base weights, by the adapter's keys of A and B.

    The product B0·A0 is unique unless singular values at the rank's border are equal.

    Raises:
        ConfigError: the adapter was initialised without changing the base.
        UnsupportedError: the initialisation is random or computed from data.
        TargetError: the base has no weight for a module.
    """
    if not config.changes_base:
        raise ConfigError(
            f"`init_lora_weights` is {config.init_lora_weights!r}: the adapter is a plain one of its base already"
        )
    init = str(config.init_lora_weights).lower()
    if init not in REPEATABLE:
        raise UnsupportedError(
            f"the starting values of init_lora_weights={config.init_lora_weights!r} cannot be computed again: the "
            "adapter as it was before training is needed",
            code="adapter_needs_conversion",
        )
    out = {}
    modules = list(_modules(tensors))
    for module, target in zip(modules, match_targets(config, [m.name for m in modules]), strict=True):
        a, b = tensors[module.key_a], tensors[module.key_b]
        lora_a, lora_b = torch.zeros_like(a), torch.zeros_like(b)
        if not module.is_embedding:  # their A begins as zero
            weight = _base_weight(module, config, a, b, base)
            start = (pissa if init == "pissa" else olora)(weight, target.r, target.scaling)
            lora_a[: len(start.lora_A)], lora_b[:, : len(start.lora_A)] = start.lora_A, start.lora_B
        out[module.key_a], out[module.key_b] = lora_a, lora_b
    return out


def _base_weight(module: _Module, config: LoraConfig, a: Tensor, b: Tensor, base: TensorMap) -> Tensor:
    """[O, I] in float32. A prefix that the base's files lack, or have in addition, is the name's first part."""
    weight = find_weight(base, module.name, prefix=module.name.partition(".")[0]).float().flatten(1)
    shape = (b.shape[0], a[0].numel())
    is_square = shape[0] == shape[1]
    if module.is_embedding or (config.fan_in_fan_out if is_square else weight.shape == shape[::-1]):
        weight = weight.T
    if weight.shape != shape:
        raise CheckpointError(
            f"module {module.name!r}: the adapter is for a weight of shape {list(shape)}, the base's has "
            f"{list(weight.shape)}"
        )
    return weight


# From rsLoRA and DoRA to what every tool reads.


def simplify_adapter(
    adapter_folder: str | Path,
    out_folder: str | Path,
    *,
    base_folder: str | Path | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Write an adapter without rsLoRA and without DoRA that changes the model as it does, as far as that goes.

    Returns:
        What `plain_lora` returns as errors.

    Raises:
        ConfigError, CheckpointError, TargetError, UnsupportedError: as `read_adapter` and `plain_lora`.
    """
    config, tensors = read_adapter(adapter_folder)
    config.require_plain()
    base = None if base_folder is None else TensorFolder(base_folder)
    new_config, new_tensors, errors = plain_lora(config, tensors, base, rank)
    write_adapter(new_config, new_tensors, out_folder)
    return errors


def plain_lora(
    config: LoraConfig, tensors: TensorMap, base: TensorMap | None = None, rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, float]]:
    """An adapter without rsLoRA, which is exact, and without DoRA, which takes the SVD of its whole change.

    Args:
        base: needed for DoRA.
        rank: of DoRA's replacement; twice the module's own by default. A change by a gain has full rank.

    Returns:
        Configuration, tensors, and by module the relative error ‖ΔW - s·B·A‖ / ‖ΔW‖.

    Raises:
        ConfigError: DoRA and no base, or a rank below 1.
        UnsupportedError: the adapter adapts parameters.
        TargetError: the base has no weight for a module.
    """
    if config.use_dora and base is None:
        raise ConfigError("what DoRA changes depends on the base weights: give the base model's folder")
    if config.target_parameters:
        raise UnsupportedError("`target_parameters`: adapters of parameters cannot be simplified")
    if rank is not None and rank < 1:
        raise ConfigError(f"`rank` must be at least 1, not {rank}")
    out, errors, sizes = dict(tensors), {}, {}
    modules = list(_modules(tensors))
    for module, target in zip(modules, match_targets(config, [m.name for m in modules]), strict=True):
        errors[module.name], size = 0.0, target.r
        magnitude = out.pop(module.name + MAGNITUDE, None)
        scaling = target.scaling
        if magnitude is not None and base is not None:
            a, b = tensors[module.key_a], tensors[module.key_b]
            part = LoraTensors(a.flatten(1), b.flatten(1), None, magnitude.flatten()).map(Tensor.float)
            change = weight_change(part, scaling, _base_weight(module, config, a, b, base))
            size, scaling = min(rank or 2 * target.r, *change.shape), 1.0
            new = svd_factors(change, size)
            errors[module.name] = relative_error(change, new)
            out[module.key_a] = new.lora_A.to(a.dtype).view(size, *a.shape[1:])
            out[module.key_b] = new.lora_B.to(b.dtype).view(b.shape[0], size, *b.shape[2:])
        alpha = scaling * size
        sizes[module.name] = (size, int(alpha) if alpha == int(alpha) else alpha)
    return replace(config, use_rslora=False, use_dora=False, **pattern_fields(sizes)), out, errors


def relative_error(change: Tensor, part: LoraTensors) -> float:
    """‖ΔW - B·A‖ / ‖ΔW‖, 0 where nothing changes."""
    size = change.norm().item()
    return (change - part.lora_B @ part.lora_A).norm().item() / size if size else 0.0
