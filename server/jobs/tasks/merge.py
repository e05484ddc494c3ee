"""Adapters merged into the base: a model folder that needs no adapters, written tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_core import LoraError, LoraModel
from lora_core.adapter_module import AdapterModule
from lora_core.tensor_folder import TensorFolder
from server.jobs.tasks.base_model import file_keys, open_base

__all__ = ["run"]

SHARD_BYTES = 1 << 30
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")
Changed = dict[str, tuple[AdapterModule, str]]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Write the base plus `weights` times the adapters of `task["adapters"]` to `task["out"]`, in the base's dtype.

    One shard is in memory at a time, and one module's change.

    Raises:
        LoraError: the adapters do not fit, or, with `safe_merge`, a merged value is NaN or infinite.
    """
    base, out = Path(task["base"]), Path(task["out"])
    report("reading the base", 0.0)
    bare = open_base(base)
    tensors = TensorFolder(base)
    keys = file_keys(bare, tensors)
    head_name = _tied_head(bare)
    model = LoraModel(bare)
    names = [f"source{i}" for i in range(len(task["adapters"]))]
    for name, folder in zip(names, task["adapters"], strict=True):
        model.load_adapter(folder, name)
    weights = dict(zip(names, task["weights"], strict=True))
    changed, unties = _changed(model, names, keys, head_name)
    out.mkdir()
    _copy_rest(base, out, unties=unties)

    def merged() -> Iterator[tuple[str, Tensor]]:
        order = list(tensors) + [key for key in changed if key not in tensors]
        if unties and head_name is not None and head_name not in order:
            order.append(head_name)
        for i, key in enumerate(order):
            report("merging", i / len(order))
            if key in changed:
                module, attribute = changed[key]
                value = module.merged_parameters({n: weights[n] for n in names if module.has(n)})[attribute]
                if task["safe_merge"] and not value.isfinite().all():
                    raise LoraError(f"NaNs detected in the merged weights of {key!r}")
                yield key, value.contiguous()
            else:
                yield key, tensors[key] if key in tensors else _input_embedding(tensors, keys, bare)

    num_shards = _write_shards(merged(), out)
    return {"num_tensors_changed": len(changed), "num_shards": num_shards, "unties_embeddings": unties}


def _tied_head(model: Any) -> str | None:
    """The output embedding's parameter, if it is that of the input embedding."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _changed(
    model: LoraModel, names: list[str], keys: Mapping[str, str], head_name: str | None
) -> tuple[Changed, bool]:
    """Who makes which of the files' tensors anew, and whether tied embeddings part."""
    changed: Changed = {}
    unties = False
    base: Any = model.model
    table = base.get_input_embeddings()
    for name in names:
        for module_name, module in model.parts[name].items():
            own = {n for n in names if module.has(n)}
            for attribute in module.merged_parameters(dict.fromkeys(own, 1.0)):
                parameter = f"{module_name}.{attribute}"
                changed[keys.get(parameter, parameter)] = (module, attribute)
                unties |= head_name is not None and (parameter == head_name or module is table)
    return changed, unties


def _input_embedding(tensors: TensorFolder, keys: Mapping[str, str], bare: Any) -> Tensor:
    """The original weight that a head was tied to."""
    table = bare.get_input_embeddings()
    name = next(name for name, module in bare.named_modules() if module is table)
    return tensors[keys[f"{name}.weight".replace(".base_layer", "")]].clone()


def _copy_rest(base: Path, out: Path, *, unties: bool) -> None:
    """Configuration, tokenizer and whatever else is in the folder but weights."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, out / path.name)
    if unties:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=2))


def _write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path) -> int:
    """Write shards of about SHARD_BYTES, and their index if there are several; returns their number."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    num_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, num_bytes
        save_file(pending, out / f"shard{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, num_bytes = {}, 0

    for key, value in tensors:
        pending[key] = value
        num_bytes += value.nbytes
        total_bytes += value.nbytes
        if num_bytes >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    if len(shards) == 1:
        (out / "shard0").rename(out / "model.safetensors")
        return 1
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (out / f"shard{i}").rename(out / file_name)
        weight_map |= dict.fromkeys(keys, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(shards)
