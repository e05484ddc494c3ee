"""Adapters merged into the base: a model folder that needs no adapters, written tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core import LoraError, LoraModel
from lora_core.adapter_module import AdapterModule
from lora_core.layer import LoraLayer
from lora_core.quant_files import DequantizedTensors
from server.gguf import MARK
from server.jobs.tasks.base_model import read_base

__all__ = ["run"]

SHARD_BYTES = 1 << 30
HEADER_BYTES = 512  # at most, of each tensor in a shard's header beside its name
# Names of dtypes in safetensors files.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")
Changed = dict[str, tuple[AdapterModule, str]]


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Write the base plus `weights` times the adapters of `task["adapters"]` to `task["out"]`, in the base's dtype.

    Of a base whose own files are quantized, the weights are what these say they are; the result is not quantized. One
    module's weight and change are in memory at a time.

    Raises:
        LoraError: the adapters do not fit, or, with `safe_merge`, a merged value is NaN or infinite.
    """
    base, out = Path(task["base"]), Path(task["out"])
    report("reading the base", 0.0)
    bare, tensors, keys = read_base(base)
    head_name = _tied_head(bare)
    model = LoraModel(bare)
    names = [f"source{i}" for i in range(len(task["adapters"]))]
    for name, folder in zip(names, task["adapters"], strict=True):
        model.load_adapter(folder, name)
    weights = dict(zip(names, task["weights"], strict=True))
    changed, unties = _changed(model, names, keys, head_name)
    out.mkdir()
    _copy_rest(base, out, unties=unties)

    order = list(tensors) + [key for key in changed if key not in tensors]
    if unties and head_name is not None and head_name not in order:
        order.append(head_name)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for i, key in enumerate(order):
            report("merging", i / len(order))
            if key in changed:
                module, attribute = changed[key]
                value = _merged(tensors, key, module, attribute, {n: weights[n] for n in names if module.has(n)})
                if task["safe_merge"] and not value.isfinite().all():
                    raise LoraError(f"NaNs detected in the merged weights of {key!r}")
                yield key, value
            else:
                yield key, tensors[key] if key in tensors else _input_embedding(tensors, keys, bare)

    num_shards = _write_shards(merged(), out, order)
    return {
        "num_tensors_changed": len(changed),
        "num_shards": num_shards,
        "unties_embeddings": unties,
        "base_quantized": isinstance(tensors, DequantizedTensors) or (base / MARK).is_file(),
    }


def _merged(
    tensors: Mapping[str, Tensor], key: str, module: AdapterModule, attribute: str, weights: Mapping[str, float]
) -> Tensor:
    """A tensor with so much of each adapter, as the files of an unquantized model hold it."""
    if isinstance(tensors, DequantizedTensors) and tensors.is_quantized(key):
        assert isinstance(module, LoraLayer)  # a copy of the whole is not injected where the layer is quantized
        matrix = module.merged_matrix(weights)
        assert matrix is not None
        return tensors.as_stored(key, matrix)
    return module.merged_parameters(weights)[attribute]


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


def _input_embedding(tensors: Mapping[str, Tensor], keys: Mapping[str, str], bare: Any) -> Tensor:
    """The original weight that a head was tied to."""
    table = bare.get_input_embeddings()
    name = next(name for name, module in bare.named_modules() if module is table)
    return tensors[keys[f"{name}.weight".replace(".base_layer", "")]].clone()


def _copy_rest(base: Path, out: Path, *, unties: bool) -> None:
    """Configuration, tokenizer and whatever else is in the folder but weights; the result is not quantized."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name != MARK and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, out / path.name)
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    if unties:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2))


class _Shard:
    """A safetensors file that is written tensor by tensor, which no library does: its header fills room that was left.

    Args:
        names: of all tensors that may come.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._file = path.open("wb")
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # The format lets spaces fill the header up; tensors begin at a multiple of 8.
        room = HEADER_BYTES * (len(names) + 1) + sum(len(json.dumps(name)) for name in names)
        self._header_bytes = -(-room // 8) * 8
        self._file.seek(8 + self._header_bytes)
        self.num_bytes = 0
        self.keys: list[str] = []

    def add(self, key: str, value: Tensor) -> None:
        data = value.contiguous().view(-1).view(torch.uint8)
        self._header[key] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [self.num_bytes, self.num_bytes + len(data)],
        }
        self._file.write(data.numpy().data)
        self.num_bytes += len(data)
        self.keys.append(key)

    def close(self) -> None:
        header = json.dumps(self._header).encode()
        with self._file:
            self._file.seek(0)
            self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))


def _write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path, names: Sequence[str]) -> int:
    """Write shards of about SHARD_BYTES, and their index if there are several; returns their number."""
    shards: list[_Shard] = []
    with ExitStack() as files:
        for key, value in tensors:
            if not shards or shards[-1].num_bytes >= SHARD_BYTES:
                shards.append(files.enter_context(closing(_Shard(out / f"shard{len(shards)}", names))))
            shards[-1].add(key, value)
    if len(shards) == 1:
        (out / "shard0").rename(out / "model.safetensors")
        return 1
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (out / f"shard{i}").rename(out / file_name)
        weight_map |= dict.fromkeys(shard.keys, file_name)
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(shards)
