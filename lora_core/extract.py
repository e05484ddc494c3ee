"""A LoRA out of a fully fine-tuned model: per module the best factors of what fine-tuning changed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.checkpoint import write_adapter
from lora_core.config import LoraConfig
from lora_core.convert import relative_error
from lora_core.errors import ConfigError, TargetError
from lora_core.mixing import svd_factors
from lora_core.patterns import pattern_fields
from lora_core.targets import match_names, match_targets
from lora_core.tensor_folder import TensorFolder, find_weight
from lora_core.weights import LoraTensors

__all__ = ["Extracted", "extract_adapter", "extract_lora", "extract_modules"]

NOT_EXTRACTED = (
    "bias", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip


class Extracted(NamedTuple):
    """An extracted adapter and what it leaves out.

    Attributes:
        config: rank and alpha are equal, so that the scaling is 1.
        modules: factors by module name.
        errors: by module, ‖ΔW - B·A‖ / ‖ΔW‖.
        left_out: keys of tensors that fine-tuning changed and that no module covers.
    """

    config: LoraConfig
    modules: dict[str, LoraTensors]
    errors: dict[str, float]
    left_out: list[str]


def extract_lora(base_weight: Tensor, tuned_weight: Tensor, rank: int) -> tuple[LoraTensors, float]:
    """The best B·A of rank `rank` for W' - W, [O, I] both, and its relative error; scaling 1.

    Raises:
        TargetError: the shapes differ.
    """
    if base_weight.shape != tuned_weight.shape:
        raise TargetError(f"the weights have shapes {list(base_weight.shape)} and {list(tuned_weight.shape)}")
    change = tuned_weight.float() - base_weight.float()
    part = svd_factors(change, min(rank, *change.shape))
    return part, relative_error(change, part)


def extract_modules(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], config: LoraConfig) -> Extracted:
    """Extract a LoRA from two models' tensors by key; one module's are in memory at a time.

    Args:
        config: `target_modules`, a list or a regular expression, chooses modules, `r` and `rank_pattern` their ranks;
            `fan_in_fan_out` says that weights are stored as [I, O] (GPT-2's Conv1D).

    Raises:
        ConfigError: `target_modules` is no list or regular expression of names, or more than A and B is asked for.
        TargetError: nothing matches, a match is no matrix, or a weight is not in the base or has another shape there.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        raise ConfigError("`target_modules` must name modules here: files do not say which of them are linear layers")
    for field in NOT_EXTRACTED:
        if getattr(config, field) != getattr(LoraConfig(), field):
            raise ConfigError(f"`{field}` is set: only A and B can be extracted")
    names = [key.removesuffix(".weight") for key in tuned if key.endswith(".weight")]
    chosen = match_targets(config, match_names(config, names))
    if not chosen:
        raise TargetError(f"Target modules {targets} not found in the fine-tuned model's files.")
    modules, errors = {}, {}
    for target in chosen:
        new = tuned[f"{target.name}.weight"]
        old = _find(base, target.name)
        if new.ndim != 2:
            raise TargetError(f"the weight of module {target.name!r} has shape {list(new.shape)}: it is no matrix")
        if config.fan_in_fan_out:
            new, old = new.T, old.T
        modules[target.name], errors[target.name] = extract_lora(old, new, target.r)
    sizes = {name: (part.rank, part.rank) for name, part in modules.items()}
    new_config = replace(config, init_lora_weights=True, **pattern_fields(sizes))
    covered = {f"{name}.weight" for name in modules}
    left_out = [key for key in tuned if key not in covered and not _is_same(base, key, tuned[key])]
    return Extracted(new_config, modules, errors, left_out)


def extract_adapter(
    base_folder: str | Path, tuned_folder: str | Path, out_folder: str | Path, config: LoraConfig
) -> Extracted:
    """`extract_modules` over the safetensors of two folders, written as a PEFT adapter folder."""
    found = extract_modules(TensorFolder(base_folder), TensorFolder(tuned_folder), config)
    tensors: dict[str, Tensor] = {}
    for name, part in found.modules.items():
        tensors |= {f"{name}.lora_A.weight": part.lora_A, f"{name}.lora_B.weight": part.lora_B}
    write_adapter(found.config, tensors, out_folder)
    return found


def _find(base: Mapping[str, Tensor], module: str) -> Tensor:
    return find_weight(base, module, prefix=module.partition(".")[0])


def _is_same(base: Mapping[str, Tensor], key: str, value: Tensor) -> bool:
    old = base.get(key)
    return old is not None and old.shape == value.shape and torch.equal(old.to(value), value)
