"""Adapters as state dicts with PEFT's keys, and PEFT's functions over plain models."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_core.errors import AdapterNotFoundError, TargetError
from lora_core.layer import LoraLayer

if TYPE_CHECKING:
    from lora_core.model import LoraModel

__all__ = [
    "INJECTED",
    "KEY_PREFIX",
    "LoadResult",
    "adapter_state",
    "base_embeddings",
    "get_peft_model_state_dict",
    "lora_model_of",
    "set_peft_model_state_dict",
]

KEY_PREFIX = "base_model.model."
# The attribute under which a plain model knows its LoraModel; not a submodule, which would be a cycle.
INJECTED = "lora_core_model"
# Where one of these is targeted by name, PEFT adds the base model's own weight to the file.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class LoadResult(NamedTuple):
    """Keys that the state dict lacked, and keys that the adapter has no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state(model: "LoraModel", name: str, *, with_base: bool = True) -> dict[str, Tensor]:
    """An adapter's parameters by key, without the prefix; `with_base` adds what `base_embeddings` gives."""
    out: dict[str, Tensor] = {}
    for prefix, module in model.parts[name].items():
        out |= {f"{prefix}.{suffix}": parameter for suffix, parameter in module.state(name).items()}
    if with_base:
        out |= {f"{module}.base_layer.weight": weight for module, weight in base_embeddings(model, name).items()}
    return out


def base_embeddings(model: "LoraModel", name: str) -> dict[str, Tensor]:
    """Base weights that PEFT saves with the adapter: of the input and output embedding that it targets by name."""
    config = model.peft_config[name]
    targets = config.target_modules
    if config.trainable_token_indices is not None or targets is None:
        return {}
    if isinstance(targets, str):
        keys = [k for k in model.parts[name] if k.rpartition(".")[2] in EMBEDDING_NAMES and re.fullmatch(targets, k)]
        if not keys:
            return {}
    elif not set(targets) & set(EMBEDDING_NAMES):
        return {}
    out = {}
    for key, layer in model.parts[name].items():
        if isinstance(layer, LoraLayer) and layer.has_factors(name) and _is_embedding(model.model, layer):
            out[key] = cast(Tensor, layer.weight)
    return out


def _is_embedding(model: Any, layer: nn.Module) -> bool:
    found = [getattr(model, getter, None) for getter in ("get_input_embeddings", "get_output_embeddings")]
    return any(get() is layer for get in found if callable(get))


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's keys; those of a LoraModel have the prefix that files have, as in PEFT.

    Args:
        model: a LoraModel, or a model that `inject_adapter_in_model` changed.

    Raises:
        AdapterNotFoundError: the adapter does not exist, or the model has none.
    """
    lora = lora_model_of(model, adapter_name)
    prefix = KEY_PREFIX if lora is model else ""
    return {prefix + key: value.detach() for key, value in adapter_state(lora, adapter_name).items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default"
) -> LoadResult:
    """Set an adapter's parameters.

    Args:
        model: as in `get_peft_model_state_dict`.
        tensors: by key, with or without the prefix.

    Returns:
        The keys that did not meet.

    Raises:
        AdapterNotFoundError: the adapter does not exist.
        TargetError: a tensor has the wrong shape; nothing was set then.
    """
    lora = lora_model_of(model, adapter_name)
    given = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
    own = adapter_state(lora, adapter_name, with_base=False)
    base = {f"{module}.base_layer.weight" for module in base_embeddings(lora, adapter_name)}
    for key in own.keys() & given.keys():
        if own[key].shape != given[key].shape:
            raise TargetError(f"size mismatch for {key}: {list(given[key].shape)}, not {list(own[key].shape)}")
    for key in own.keys() & given.keys():
        own[key].copy_(given[key])
    return LoadResult(sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys() - base))


def lora_model_of(model: Any, adapter_name: str) -> "LoraModel":
    """The LoraModel that a model is, or that was injected into it."""
    lora = model if hasattr(model, "parts") else vars(model).get(INJECTED)
    if lora is None or adapter_name not in lora.peft_config:
        raise AdapterNotFoundError(f"Adapter {adapter_name} does not exist")
    return cast("LoraModel", lora)
