"""A model of transformers' as the GGUF file that llama.cpp's converter makes of it, by the `gguf` package's writer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from transformers import PreTrainedTokenizerFast

from tests.tiny_folder import VOCABULARY, tiny_tokenizer

Types = gguf.GGMLQuantizationType
# Where blocks have scales of scales in 16 bits, and values for which the numbers are small.
SCALES_AT = {Types.Q4_K: {0: 1e-3, 2: 7e-3}, Types.Q6_K: {208: 1e-4}}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def write_gguf(
    file: Path,
    model: Any,
    architecture: str,
    *,
    kind: Any = Types.Q8_0,
    own: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `model` and `tiny_tokenizer()`; the model's matrices are rounded in place to what the file then holds.

    Args:
        kind: of matrices with whole blocks, at random in K-quants; all else is in 32 bits.
        own: further keys below the architecture's name; None takes one out.
        tokenizer: ditto, below `tokenizer.`.
        extra: further tensors.
    """
    writer = gguf.GGUFWriter(file, architecture)
    fields = {f"{architecture}.{key}": value for key, value in (_own(model.config) | dict(own or {})).items()}
    fields |= {f"tokenizer.{key}": value for key, value in (_tokenizer() | dict(tokenizer or {})).items()}
    for key, value in fields.items():
        _add(writer, key, value)
    arch = next(one for one, title in gguf.MODEL_ARCH_NAMES.items() if title == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        module, _, suffix = key.rpartition(".")
        values = parameter.detach().numpy()
        if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            blocks = _random_blocks(values, kind) if kind in SCALES_AT else quantize(values, kind)
            parameter.data = torch.from_numpy(np.array(dequantize(blocks, kind)))
            writer.add_tensor(
                f"{names.get_name(module)}.{suffix}", _as_llama_cpp(key, blocks, model, architecture), raw_dtype=kind
            )
        else:
            writer.add_tensor(f"{names.get_name(module)}.{suffix}", _as_llama_cpp(key, values, model, architecture))
    for key, values in (extra or {}).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(values: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks of a type that the package reads and does not write: any bits are numbers, but for the scales."""
    in_block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.randint(0, 256, (*values.shape[:-1], values.shape[-1] // in_block, num_bytes), dtype=np.uint8)
    for place, scale in SCALES_AT[kind].items():
        blocks[..., place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def as_spm() -> dict[str, Any]:
    """Fields of a tokenizer as SentencePiece's: bytes, letters and a few longer pieces in their order."""
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    letters = ["\u2581", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    pieces = ["th", "\u2581th", "\u2581the", "in", "er", "an", "ou", "do", "og", "dog"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *byte_pieces, *letters, *pieces]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    kinds = [CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256 + [NORMAL] * (VOCABULARY - 260)
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [float(-i) for i in range(VOCABULARY)],
        "ggml.token_type": kinds,
        "ggml.merges": None,
        "ggml.unknown_token_id": 3,
        "ggml.add_bos_token": True,
    }


def _as_llama_cpp(key: str, rows: np.ndarray, model: Any, name: str) -> np.ndarray:
    """What its converter does to rows: halves of rotated heads interleave in Llama, Gemma's norms have their one."""
    if name == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
        config = model.config
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
    return rows + np.float32(1) if name.startswith("gemma") and "norm" in key else rows


def _own(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    out = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if config.model_type.startswith("gemma"):
        out["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        out["attn_logit_softcapping"] = config.attn_logit_softcapping
        out["final_logit_softcapping"] = config.final_logit_softcapping
    return out


def _tokenizer() -> dict[str, Any]:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "ggml.bos_token_id": tokenizer.bos_token_id,
        "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.padding_token_id": tokenizer.pad_token_id,
        "ggml.add_bos_token": False,
        "chat_template": tokenizer.chat_template,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
