"""Loading a Hugging Face causal language model, and finding out what the engine must know about it."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lora_core.quant import keep_layout, settle_layout
from server.engine.attention import ATTENTION_NAME, AttentionCall, AttentionProbe, register, use_step
from server.engine.kv_cache import LayerShape
from server.engine.quantization import Quantization, loading_options, round_weights, settle_layers
from server.errors import InvalidRequestError

__all__ = ["ModelFacts", "inspect_model", "load_model", "read_model", "run_probe"]

# Rotary scalings that change for every token once one sequence grows long: right only below that length.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

NO_LIMIT = 1 << 20
UNCHANGED = Quantization()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know about a model.

    Attributes:
        layers: what each attention layer stores per token.
        max_positions: longest sequence that the model is right for, in tokens.
        eos_token_ids: tokens that end a sequence.
    """

    layers: list[LayerShape]
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]


def load_model(
    path: str | Path, *, dtype: torch.dtype, device: torch.device, quantization: Quantization = UNCHANGED
) -> nn.Module:
    """Load a local Hugging Face folder for inference; code in the folder is never run.

    Raises:
        InvalidRequestError: code `model_unsupported` if it is no causal language model that transformers knows, or not
            all of one; `quantization_*` as `server.engine.quantization`.
    """
    model = read_model(path, dtype=dtype, device=device, quantization=quantization)
    for module in model.modules():
        settle_layout(module, dtype)
    return model


def read_model(path: str | Path, *, dtype: torch.dtype, device: torch.device, quantization: Quantization) -> nn.Module:
    """As `load_model`, with weights that stay in the form in which files hold them."""
    transformers_logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        if getattr(config, "is_encoder_decoder", False):
            raise InvalidRequestError("encoder-decoder models are not supported", code="model_unsupported")
        options = loading_options(config, quantization, dtype=dtype, device=device)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **options, **local
        )
    except InvalidRequestError:
        raise
    except ImportError as error:
        raise InvalidRequestError(
            f"the model's quantized form needs a package: {error}", code="quantization_missing"
        ) from error
    except Exception as error:  # a folder can be wrong in any way
        raise InvalidRequestError(f"the model cannot be loaded: {error}", code="model_unsupported") from error
    if found["missing_keys"]:  # transformers would serve random numbers in their place
        raise InvalidRequestError(
            f"the model cannot be loaded: its files lack {len(found['missing_keys'])} tensors, "
            f"{min(found['missing_keys'])} among them",
            code="model_unsupported",
        )
    settle_layers(model)
    for module in model.modules():
        keep_layout(module)
    if quantization.kind == "int4":
        round_weights(model)
    return (model if options else model.to(device)).eval()


def inspect_model(model: nn.Module) -> ModelFacts:
    """Run a model once under a probe.

    Raises:
        InvalidRequestError: code `model_unsupported`, with what the engine lacks for this architecture.
    """
    register()
    _set_attention(model)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InvalidRequestError(
            f"{type(model).__name__} cannot compute the logits of chosen tokens only", code="model_unsupported"
        )
    config: Any = model.config
    probe = run_probe(model)
    layers = probe.layer_shapes()
    text_config = config.get_text_config()
    if len(layers) != text_config.num_hidden_layers:
        raise InvalidRequestError(
            f"{len(layers)} of {text_config.num_hidden_layers} layers use transformers' attention interface; "
            "the others keep a state of their own, which is not supported",
            code="model_unsupported",
        )
    max_positions = min(_max_positions(text_config), _smallest_unseen_window(text_config, probe.calls))
    return ModelFacts(layers, max_positions, text_config.vocab_size, _eos_token_ids(model))


def run_probe(model: nn.Module) -> AttentionProbe:
    """Run a model once on two tokens that attend to nothing."""
    probe = AttentionProbe()
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(
            input_ids=torch.zeros(1, 2, dtype=torch.long, device=device),
            position_ids=torch.arange(2, device=device)[None],
            use_cache=False,
            **use_step(probe),
        )
    return probe


def _set_attention(model: nn.Module) -> None:
    set_attention: Any = getattr(model, "set_attn_implementation", None)
    if set_attention is not None:
        set_attention(ATTENTION_NAME)
    if getattr(model.config, "_attn_implementation", None) != ATTENTION_NAME:
        raise InvalidRequestError(
            f"{type(model).__name__} does not use transformers' attention interface", code="model_unsupported"
        )


def _eos_token_ids(model: nn.Module) -> frozenset[int]:
    """From the generation config, else the model's; one id, a list, or none."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, list | tuple) else [eos])
    return frozenset()


def _max_positions(config: Any) -> int:
    limit = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    for rope in _rope_parameters(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            fallback = getattr(config, "original_max_position_embeddings", None) or limit
            limit = min(limit, int(rope.get("original_max_position_embeddings") or fallback))
    return limit


def _smallest_unseen_window(config: Any, calls: Sequence[AttentionCall]) -> int:
    """The length up to which no mask of transformers' would differ from a causal one.

    Some models tell a window to their masks only, which are not built here, and not to their attention layers.
    """
    kinds = getattr(config, "layer_types", None) or {}
    limit = NO_LIMIT
    for call in calls:
        kind = kinds[call.layer] if kinds else None
        if call.window is None and kind != "full_attention":
            for name in ("sliding_window", "attention_chunk_size"):
                limit = min(limit, int(getattr(config, name, None) or limit))
    return limit


def _rope_parameters(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries with a rope type: there may be one for each kind of layer."""
    if isinstance(value, dict):
        if "rope_type" in value:
            yield value
        for nested in value.values():
            yield from _rope_parameters(nested)
