"""PEFT adapter folders: `adapter_config.json` beside `adapter_model.safetensors`.

Keys on disk are `base_model.model.<module>.<part>`; the adapter's name is not in them. Every tensor of a file is
used or the file is refused: nothing is skipped.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_core.config import CONFIG_NAME, LoraConfig
from lora_core.errors import CheckpointError, LoraError, TargetError, UnsupportedError
from lora_core.maths import is_finite
from lora_core.safetensors_header import TensorInfo, read_header
from lora_core.targets import match_targets
from lora_core.weights import AdapterWeights, LoraTensors

__all__ = [
    "WEIGHTS_NAME",
    "check_base_weight",
    "check_shape",
    "check_tensors",
    "load_adapter",
    "non_finite_tensor",
    "parse_adapter",
    "read_adapter",
    "read_files",
    "save_adapter",
    "split_key",
    "tensor_faults",
    "write_adapter",
]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# How the end of a key names a part of LoraTensors. PEFT before 0.12 wrote the magnitude with `.weight`.
PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
}
EMBEDDING_A = ".lora_embedding_A"
BASE_PART = "base weight"
FULL_WEIGHT = "full weight"
# PEFT adds it where an embedding is targeted (`save_embedding_layers="auto"`): the base model's, not the adapter's.
BASE_WEIGHT = ".base_layer.weight"
# They change the model itself, which all adapters in slots share.
UNSERVED = ("layer_replication", "megatron_config")
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
OLD_MAGNITUDE = ".lora_magnitude_vector.weight"


def load_adapter(folder: str | Path) -> AdapterWeights:
    """Read a PEFT adapter folder.

    Raises:
        CheckpointError: a file is missing or malformed, or tensors and configuration disagree.
        ConfigError, UnsupportedError: from the configuration; a pickle file is refused too.
    """
    return parse_adapter(*read_files(folder))


def read_files(folder: str | Path) -> tuple[bytes, bytes]:
    """The contents of an adapter folder's two files.

    Raises:
        CheckpointError: one is missing.
        UnsupportedError: the weights are a pickle file.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{folder}'")
    if not (folder / WEIGHTS_NAME).is_file():
        if (folder / PICKLE_NAME).exists():
            raise UnsupportedError(
                f"'{PICKLE_NAME}' is a pickle file, which can run code; save the adapter with "
                "`safe_serialization=True` to get a safetensors file",
                code="adapter_pickle",
            )
        raise CheckpointError(f"Can't find weights for '{folder}': there is no {WEIGHTS_NAME}")
    return (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()


def parse_adapter(config_json: bytes, weights: bytes | memoryview) -> AdapterWeights:
    """Build an adapter from the contents of its two files; errors as in `load_adapter`.

    Args:
        weights: a memoryview, which must allow writing, is not copied, but becomes the tensors' memory.
    """
    config = LoraConfig.from_json(config_json)
    config.require_plain()
    for field in UNSERVED:
        if getattr(config, field) is not None:
            raise UnsupportedError(f"`{field}` is set in {CONFIG_NAME} and is not supported")
    header = read_header(weights, len(weights))
    check_tensors(config, header)
    modules: dict[str, dict[str, Tensor]] = {}
    full, embeddings = {}, set()
    tensors = _load(weights, header)
    for key in header:
        module, part = split_key(config, key)
        if part == FULL_WEIGHT:
            full[module] = tensors[key]
        else:
            modules.setdefault(module, {})[part] = tensors[key]
        if key.endswith(EMBEDDING_A):
            embeddings.add(module)
    base_weights = {name: parts.pop(BASE_PART) for name, parts in modules.items() if BASE_PART in parts}
    loras = {name: LoraTensors(**parts) for name, parts in modules.items()}
    return AdapterWeights(config, loras, base_weights, full, frozenset(embeddings))


def _load(weights: bytes | memoryview, header: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors by key, in one piece of memory: that of a memoryview."""
    memory = weights if isinstance(weights, memoryview) else memoryview(bytearray(weights))
    first = len(memory) - max(info.end for info in header.values())
    out = {}
    for name, info in header.items():
        if info.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name!r} has dtype {info.dtype}; adapters hold floats")
        start, dtype = first + info.start, FLOATS[info.dtype]
        if info.start == info.end:
            tensor = torch.empty(0, dtype=dtype)
        elif start % dtype.itemsize:
            tensor = torch.frombuffer(bytearray(memory[start : first + info.end]), dtype=dtype)
        else:
            count = (info.end - info.start) // dtype.itemsize
            tensor = torch.frombuffer(memory, dtype=dtype, offset=start, count=count)
        out[name] = tensor.view(info.shape)
    return out


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A PEFT adapter folder as its configuration and its tensors by key, without the prefix.

    Raises: as `load_adapter`, but tensors are not compared with the configuration.
    """
    config_json, weights = read_files(folder)
    config = LoraConfig.from_json(config_json)
    tensors = {}
    for key, tensor in _load(weights, read_header(weights, len(weights))).items():
        if not key.startswith(KEY_PREFIX):
            raise CheckpointError(f"tensor {key[:200]!a} does not start with '{KEY_PREFIX}': not saved by PEFT")
        name = key.removeprefix(KEY_PREFIX)
        tensors[name.removesuffix(".weight") if name.endswith(OLD_MAGNITUDE) else name] = tensor
    return config, tensors


def write_adapter(
    config: LoraConfig, tensors: Mapping[str, Tensor], folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a PEFT adapter folder, creating it.

    Args:
        tensors: by key, without the prefix.
        dtype: to save the tensors in; their own by default.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {KEY_PREFIX + key: t.detach().to("cpu", dtype or t.dtype).contiguous() for key, t in tensors.items()}
    (folder / WEIGHTS_NAME).write_bytes(save(data, metadata={"format": "pt"}))
    config.save(folder)


def check_shape(name: str, part: LoraTensors, wanted: tuple[int, int]) -> None:
    """Compare a module's factors with its layer's (out_features, in_features).

    Raises:
        TargetError: they differ.
    """
    shape = (part.lora_B.shape[0], part.lora_A.shape[1])
    if shape != wanted:
        raise TargetError(
            f"module {name!r}: the adapter is for a layer {list(shape)}, the base model's is {list(wanted)}"
        )


def check_base_weight(name: str, saved: Tensor | None, layer: nn.Module) -> None:
    """The copy of a base weight in an adapter's file must be the base model's own, rounded to the model's dtype.

    Raises:
        TargetError: it is another one.
    """
    if saved is None:  # reading the layer's own would unpack it
        return
    own = cast(Tensor, layer.weight)
    if saved.shape != own.shape or not torch.equal(saved.to(own), own):
        raise TargetError(
            f"module {name!r}: the adapter's file holds a base weight that is not this base model's; "
            "it was trained on another model, or on one with a resized vocabulary"
        )


def save_adapter(adapter: AdapterWeights, folder: str | Path) -> None:
    """Write a PEFT adapter folder, creating it; tensors keep their dtype."""
    tensors = dict(adapter.full)
    for name, part in adapter.modules.items():
        is_embedding = name in adapter.embeddings
        for suffix, attribute in PARTS.items():
            is_own = suffix != OLD_MAGNITUDE and (attribute == "magnitude" or ("embedding" in suffix) == is_embedding)
            tensor = getattr(part, attribute)
            if tensor is not None and is_own:
                tensors[name + suffix] = tensor
    tensors |= {name + BASE_WEIGHT: weight for name, weight in adapter.base_weights.items()}
    write_adapter(adapter.config, tensors, folder)


def check_tensors(config: LoraConfig, header: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Check the names, shapes and dtypes of a file's tensors against its own configuration.

    Returns:
        The rank of every module, by its dotted name in the base model.

    Raises:
        CheckpointError: a part is missing, or has the wrong dtype or shape.
        UnsupportedError: a tensor belongs to a feature that is not supported.
        TargetError: a module's rank is not that of the configuration.
    """
    ranks, faults = _examine(config, header)
    if faults:
        raise next(iter(faults.values()))
    return ranks


def tensor_faults(config: LoraConfig, header: Mapping[str, TensorInfo]) -> dict[str, LoraError]:
    """All that `check_tensors` finds wrong, by the tensors' keys: the first fault of each."""
    return _examine(config, header)[1]


def _examine(config: LoraConfig, header: Mapping[str, TensorInfo]) -> tuple[dict[str, int], dict[str, LoraError]]:
    modules: dict[str, dict[str, TensorInfo]] = {}
    faults: dict[str, LoraError] = {}
    for info in header.values():
        try:
            module, part = split_key(config, info.name)
            if info.dtype not in FLOATS:
                raise CheckpointError(f"tensor {info.name!r} has dtype {info.dtype}; adapters hold floats")
            if part != FULL_WEIGHT and part in modules.setdefault(module, {}):
                raise CheckpointError(f"module {module!r} has its {part} twice")
        except LoraError as error:
            faults[info.name] = error
            continue
        if part != FULL_WEIGHT:
            modules[module][part] = info
    targets = match_targets(config, modules)
    for target in targets:
        try:
            _check_module(config, target.name, target.r, modules[target.name])
        except LoraError as error:
            for info in modules[target.name].values():
                faults.setdefault(info.name, error)
    return {target.name: target.r for target in targets}, faults


def split_key(config: LoraConfig, key: str) -> tuple[str, str]:
    """A key's module and which part of it the tensor is; of a full weight, the whole key without the prefix.

    Raises:
        CheckpointError: PEFT does not save such a key.
        UnsupportedError: it belongs to a feature that is not supported.
    """
    if not key.startswith(KEY_PREFIX):
        raise CheckpointError(f"tensor {key[:200]!a} does not start with '{KEY_PREFIX}': not saved by PEFT")
    for suffix, part in (*PARTS.items(), (BASE_WEIGHT, BASE_PART)):
        if key.endswith(suffix) and len(key) > len(KEY_PREFIX) + len(suffix):
            return key[len(KEY_PREFIX) : -len(suffix)], part
    name = key.removeprefix(KEY_PREFIX)
    owners = [name[: match.start()] for match in re.finditer(r"\.", name)]
    is_whole = config.modules_to_save is not None and any(owner.endswith(config.modules_to_save) for owner in owners)
    is_bias = config.bias != "none" and name.endswith(".bias")
    if is_whole or is_bias or (config.trainable_token_indices is not None and name.endswith(ROWS_SUFFIX)):
        return name, FULL_WEIGHT
    raise UnsupportedError(f"tensor {key[:200]!a} belongs to a feature that is not supported")


def _check_module(config: LoraConfig, name: str, r: int, parts: Mapping[str, TensorInfo]) -> None:
    missing = {"lora_A", "lora_B"} - set(parts)
    if missing:
        raise CheckpointError(f"module {name!r} lacks {' and '.join(sorted(missing))}")
    for part, wanted, field in (
        ("magnitude", config.use_dora, "use_dora"),
        ("bias", config.lora_bias, "lora_bias"),
    ):
        if (part in parts) != wanted:
            raise CheckpointError(
                f"module {name!r}: `{field}` is {wanted}, but its {part} is {'there' if part in parts else 'missing'}"
            )
    if any(len(parts[part].shape) != 2 for part in ("lora_A", "lora_B")):
        raise CheckpointError(f"module {name!r}: lora_A and lora_B must be matrices")
    a, b = parts["lora_A"].shape, parts["lora_B"].shape
    # A parameter's factors are stacked by experts; its name, and so its rank, is not in the file: folding checks it.
    is_parameter = config.target_parameters is not None and a[0] == b[1]
    if (a[0] != r or b[1] != r) and not is_parameter:
        raise TargetError(f"module {name!r}: the configuration says rank {r}, the tensors are {list(a)} and {list(b)}")
    base_shape = (a[1], b[0]) if parts["lora_A"].name.endswith(EMBEDDING_A) else (b[0], a[1])
    for part, wanted_shape in (("bias", (b[0],)), ("magnitude", (b[0],)), (BASE_PART, base_shape)):
        if part in parts and parts[part].shape != wanted_shape:
            raise CheckpointError(
                f"module {name!r}: its {part} has shape {list(parts[part].shape)}, not {list(wanted_shape)}"
            )


def non_finite_tensor(adapter: AdapterWeights) -> str | None:
    """Name of the first module with a NaN or infinite value in it, or None."""
    return next((name for name, tensor in adapter.tensors() if not is_finite(tensor)), None)
