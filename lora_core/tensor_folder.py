"""A model's safetensors on disk, read tensor by tensor."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.errors import CheckpointError, TargetError

__all__ = ["TensorFolder", "find_weight"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a folder by key; each is read when it is asked for, and nothing is kept.

    Args:
        path: a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards; or a file.

    Raises:
        CheckpointError: there are none, or the index or a shard is malformed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        folder = path.parent if path.suffix == ".safetensors" else path
        single = path if path.suffix == ".safetensors" else path / SINGLE_NAME
        if single.is_file():
            with _open(single) as file:
                self._files = dict.fromkeys(file.keys(), single)
        elif (folder / INDEX_NAME).is_file():
            self._files = _read_index(folder)
        else:
            raise CheckpointError(
                f"Could not find file for {single}, ensure that there is a (sharded) safetensors file of the model."
            )

    def __getitem__(self, key: str) -> Tensor:
        file = self._files[key]
        with _open(file) as opened:
            try:
                tensor: Tensor = opened.get_tensor(key)
            except SafetensorError as error:
                raise CheckpointError(f"{file.name} does not hold {key!r}, which the index promises: {error}") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def find_weight(
    tensors: Mapping[str, Tensor], module: str, *, prefix: str = "", renames: Mapping[str, str] | None = None
) -> Tensor:
    """The weight of a module, under its own name or as checkpoints of other wrappings of the model call it.

    Args:
        module: its dotted name in the model at hand.
        prefix: the model's `base_model_prefix`: a checkpoint may lack it where the model has it, and the reverse.
        renames: `_checkpoint_conversion_mapping` of a transformers model: regular expressions over checkpoint keys, and
            what they become in the model; the first that is found counts.

    Raises:
        TargetError: none of these names is there.
    """
    key = f"{module}.weight"
    names = [key]
    if prefix:
        names.append(key.removeprefix(f"{prefix}.") if key.startswith(f"{prefix}.") else f"{prefix}.{key}")
    names += [old for old in tensors if _renamed(old, renames or {}) == key]
    for name in names:
        if name in tensors:
            return tensors[name]
    raise TargetError(f"the base model's files have no weight of module {module!r}; looked for {names}")


def _renamed(key: str, renames: Mapping[str, str]) -> str:
    for pattern, replacement in renames.items():
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


def _read_index(folder: Path) -> dict[str, Path]:
    try:
        files = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        out = {str(key): folder / Path(name).name for key, name in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{INDEX_NAME} is malformed: {error!r}") from None
    missing = sorted({file.name for file in out.values() if not file.is_file()})
    if missing:
        raise CheckpointError(f"{INDEX_NAME} names files that are not there: {missing}")
    return out


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None
