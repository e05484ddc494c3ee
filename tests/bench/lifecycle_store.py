"""Stores of random adapters for the demo model, made without a server and kept from run to run."""

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save
from transformers import AutoConfig

from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.demo.model import ensure_demo_model
from tests.bench.material import TARGETS

__all__ = ["fill"]


def fill(root: Path, prefix: str, number: int, *, rank: int, targets: Sequence[str] = tuple(TARGETS)) -> None:
    """Publish adapters `<prefix>0`, `<prefix>1`, ... straight into a store, without fsync, unless they are there."""
    shapes = _shapes(targets)
    store = AdapterStore(root)
    store.open()
    with mock.patch("os.fsync"):
        for i in range(number):
            if not store.has_history(f"{prefix}{i}"):
                config, weights, num_bytes = _files(1000 * rank + i, rank, targets, shapes)
                with store.staging_folder() as folder:
                    (folder / CONFIG_NAME).write_bytes(config)
                    (folder / WEIGHTS_NAME).write_bytes(weights)
                    store.publish(f"{prefix}{i}", folder, {"type": "lora", "rank": rank, "folded_bytes": num_bytes})
    store.close()


def _shapes(targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Input and output widths of the demo model's layers, by name."""
    config = AutoConfig.from_pretrained(ensure_demo_model(report=print))
    hidden, inner = config.hidden_size, config.intermediate_size
    small = config.num_key_value_heads * (hidden // config.num_attention_heads)
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, small),
        "self_attn.v_proj": (hidden, small),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    chosen = {name: widths[name] for name in widths if name.rpartition(".")[2] in targets}
    return {f"layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in chosen.items()}


def _files(
    seed: int, rank: int, targets: Sequence[str], shapes: dict[str, tuple[int, int]]
) -> tuple[bytes, bytes, int]:
    """A random LoRA in PEFT's format: its two files, and its size in memory."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (width_in, width_out) in shapes.items():
        for end, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
            value = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.model.{name}.lora_{end}.weight"] = value.to(torch.bfloat16)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return json.dumps(settings | {"task_type": "CAUSAL_LM"}).encode(), save(tensors), num_bytes
