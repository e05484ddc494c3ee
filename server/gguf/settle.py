"""The configuration that a GGUF file describes, also where transformers does not take it from there."""

import math
from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequestError
from server.gguf.source import ROPE_FREQS, GgufFacts

__all__ = ["ARCHITECTURES", "check_complete", "end_tokens", "settle_config"]

# Those whose models are compared with the ones that they were made of (tests/gguf).
ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"})
GEMMA = frozenset({"gemma2", "gemma3"})
WITH_WINDOW = GEMMA | {"phi3"}
# Keys below the architecture's name, and transformers' name for the same.
ATTRIBUTES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Read where rotary embeddings and heads are settled.
OTHER_KEYS = frozenset({
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
})  # fmt: skip
WITHOUT_MEANING = frozenset({"rope.scaling.finetuned"})
DEFAULT_BASE = 10_000.0  # of rotary embeddings, in llama.cpp; that of Gemma 3's windows too
# The one form of Llama 3.1's frequencies that was published, in several factors; files hold what comes of it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp knows the largest of Gemma's models, which scale queries in another way, by their number of layers.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
END_TOKENS = ("eos", "eot", "eom")


def settle_config(config: Any, facts: GgufFacts) -> None:
    """Give transformers' configuration, in place, what the file says.

    Raises:
        InvalidRequestError: code `model_unsupported`, the architecture or something of it is not served.
    """
    if facts.architecture not in ARCHITECTURES:
        raise _refused(f"of architecture {facts.architecture!r} (but of {', '.join(sorted(ARCHITECTURES))})")
    own = {key: value for key, value in facts.own.items() if not (key.startswith("expert_") and not value)}
    unknown = sorted(own.keys() - ATTRIBUTES.keys() - OTHER_KEYS - WITHOUT_MEANING)
    unknown += [key for key, value in own.items() if isinstance(value, list)]
    if unknown:
        raise _refused("with " + ", ".join(f"`{facts.architecture}.{key}`" for key in unknown))
    if ("attention.sliding_window" in own) != (facts.architecture in WITH_WINDOW) and facts.architecture != "phi3":
        raise _refused("whose attention windows are not told as its architecture's usually are")
    for key, name in ATTRIBUTES.items():
        if key in own and not _equal(getattr(config, name, None), own[key]):
            setattr(config, name, own[key])
    if facts.architecture not in WITH_WINDOW and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # a default of transformers'
    head_dim = _settle_heads(config, own)
    if facts.architecture in GEMMA:
        is_largest = config.num_hidden_layers == LAYERS_OF_27B[facts.architecture]
        scale = config.hidden_size // config.num_attention_heads if is_largest else head_dim
        config.query_pre_attn_scalar = scale
    _settle_rope(config, own, facts, head_dim)


def check_complete(facts: GgufFacts, model: Any) -> None:
    """Refuse a file of which transformers has not taken all numbers: it passes over tensors that it does not know.

    Raises:
        InvalidRequestError: code `model_unsupported`.
    """
    num_read = sum(parameter.numel() for parameter in model.parameters())
    if num_read != facts.num_parameters:
        raise _refused(
            f"with {facts.num_parameters} weights, of which transformers' {type(model).__name__} has {num_read}"
        )


def end_tokens(facts: GgufFacts) -> list[int]:
    """Tokens that end an answer: the model's, and those that end a turn or a message."""
    found = [facts.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_TOKENS]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _settle_heads(config: Any, own: Mapping[str, Any]) -> int:
    """Set the width of a head, which is returned; keys' and values' are one here, as are rotated ones."""
    head_dim = int(own.get("attention.key_length", config.hidden_size // config.num_attention_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise _refused(f"with `{key}` {own[key]}, where keys have {head_dim}")
    if getattr(config, "head_dim", None) is not None or hasattr(type(config), "head_dim"):
        config.head_dim = head_dim
    elif config.hidden_size // config.num_attention_heads != head_dim:
        raise _refused(f"with heads of {head_dim}")
    return head_dim


def _settle_rope(config: Any, own: Mapping[str, Any], facts: GgufFacts, head_dim: int) -> None:
    base = float(own.get("rope.freq_base", DEFAULT_BASE))
    rope = {"rope_type": "default", "rope_theta": base} | _scaling(own)
    if facts.rope_freqs is not None:
        if rope["rope_type"] != "default" or facts.architecture in GEMMA:
            raise _refused(f"with `{ROPE_FREQS}` and another scaling of rotary embeddings")
        rope |= _llama3_scaling(facts.rope_freqs, base, head_dim)
    if facts.architecture == "gemma3":
        local = float(own.get("rope.freq_base_swa", DEFAULT_BASE))
        config.rope_parameters = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        return
    if own.get("rope.freq_base_swa", base) != base:
        raise _refused("with two bases of rotary embeddings")
    if facts.architecture in GEMMA and rope["rope_type"] != "default":
        raise _refused("with scaled rotary embeddings")
    kept = getattr(config, "rope_parameters", None) or {}
    config.rope_parameters = {"partial_rotary_factor": 1.0} | rope if "partial_rotary_factor" in kept else rope


def _scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' parameters for scaled rotary embeddings; none where they are not."""
    kind = own.get("rope.scaling.type", "none")
    factor = float(own.get("rope.scaling.factor", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = own.get("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    raise _refused(f"with rotary embeddings scaled by {kind!r}")


def _llama3_scaling(freqs: tuple[float, ...], base: float, head_dim: int) -> dict[str, Any]:
    """The parameters of which these divisors of frequencies came."""
    low, high, original = LLAMA3.values()
    factor = float(round(max(freqs)))
    wanted = []
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * base ** (i / head_dim))  # within the original length
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        wanted.append(1 / ((1 - smooth) / factor + smooth))
    if len(freqs) != len(wanted) or not all(map(_equal, freqs, wanted)):
        raise _refused(f"whose `{ROPE_FREQS}` is not that of Llama 3")
    return {"rope_type": "llama3", "factor": factor} | LLAMA3


def _equal(ours: Any, theirs: Any) -> bool:
    """As far as 32 bits tell them apart."""
    if isinstance(ours, float | int) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-5)
    return bool(ours == theirs)


def _refused(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"GGUF files {what} are not served: take the model's Hugging Face folder", code="model_unsupported"
    )
