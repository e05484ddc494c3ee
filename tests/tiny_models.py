"""Tiny random models of every architecture that the engine is proven on."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough for logits that differ clearly from token to token.
    "initializer_range": 0.2,
}
GATED = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GATED),
    "qwen2": lambda: Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=16),
    "mistral": lambda: MistralConfig(**GATED, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**GATED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": lambda: GPT2Config(**COMMON, n_inner=48),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
    "phi3": lambda: Phi3Config(**GATED),
}
ARCHITECTURES = sorted(CONFIGS)

# Linear layers of each architecture's attention and MLP, by the names PEFT targets.
TARGETS: dict[str, list[str]] = {name: ["q_proj", "v_proj", "down_proj"] for name in CONFIGS} | {
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "phi3": ["qkv_proj", "down_proj"],
}


def tiny_model(architecture: str, seed: int, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    """A random float32 model in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.vocab_size = vocab_size
    # Transformers 5.17 would take SDPA all the same, which leaves the cap out.
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if is_capped else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    with torch.no_grad():  # biases and norms are constant after initialisation: make them matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
