"""A quantized copy of a model as a Hugging Face folder, which loads without being quantized again."""

import shutil
from pathlib import Path
from typing import Any

import torch

from server.allocator import return_freed
from server.engine.model import read_model
from server.engine.quantization import Quantization
from server.errors import ConflictError

__all__ = ["save_quantized"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def save_quantized(
    source: Path, out: Path, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> int:
    """Write `source` quantized to the new folder `out`, tokenizer and all; returns the weights' size in bytes.

    The folder appears when it is complete.

    Raises:
        ConflictError: `out` exists.
        InvalidRequestError: as `load_model`.
    """
    if out.exists():
        raise ConflictError(f"{out} exists already")
    return_freed()
    model: Any = read_model(source, dtype=dtype, device=device, quantization=quantization)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES) and not (partial / path.name).exists():
                shutil.copyfile(path, partial / path.name)
        num_bytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_bytes
