"""Adapters made by PEFT itself, with random weights, and PEFT's own answers with them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from tests.tiny_models import TARGETS

# Every variant that one file can hold; the values go to peft.LoraConfig.
VARIANTS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "lora_alpha": 8},
    "rank8": {"r": 8, "lora_alpha": 4},
    "rank16": {"r": 16, "lora_alpha": 32},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"v_proj": 2, "c_proj": 6, "down_proj": 6, "fc2": 6},
        "alpha_pattern": {"q_proj": 16},
    },
    "dora": {"r": 4, "use_dora": True},
    "dora16": {"r": 16, "lora_alpha": 32, "use_dora": True},
}

# Adapters with more than LoRA on linear layers; "{embedding}" and "{norm}" stand for the architecture's names.
FULL_WEIGHTS: dict[str, dict[str, Any]] = {
    "embedding": {"r": 4, "target_modules": ["{embedding}"]},
    "whole": {"r": 4, "modules_to_save": ["{norm}", "lm_head"]},
    "tokens": {"r": 4, "trainable_token_indices": [5, 9, 17]},
    "biases": {"r": 4, "bias": "all"},
}
NAMES = {
    "gpt2": {"embedding": "wte", "norm": "ln_f"},
    "opt": {"embedding": "embed_tokens", "norm": "decoder.final_layer_norm"},
}


def variants(architecture: str) -> dict[str, dict[str, Any]]:
    """All variants that exist for an architecture."""
    names = NAMES.get(architecture, {"embedding": "embed_tokens", "norm": "model.norm"})

    def fill(value: Any) -> Any:
        return (
            [item.format(**names) if isinstance(item, str) else item for item in value]
            if isinstance(value, list)
            else value
        )

    full = {name: {key: fill(value) for key, value in config.items()} for name, config in FULL_WEIGHTS.items()}
    if architecture not in ("gpt2", "opt", "qwen2"):
        del full["biases"]
    return VARIANTS | full


def peft_model(
    base: PreTrainedModel, architecture: str, seed: int, *, std: float = 0.2, **config: Any
) -> peft.PeftModel:
    """A copy of `base` under PEFT with one randomised adapter, in evaluation mode."""
    torch.manual_seed(seed)
    config = {"target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of rank patterns that match nothing, and of fan_in_fan_out
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=std)
            elif parameter.requires_grad:  # whole modules, rows, biases
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def save(model: peft.PeftModel, folder: Path) -> Path:
    """The adapter's folder, as PEFT writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def greedy(model: Any, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """`num_tokens` greedy tokens by transformers' generate, and the logits [num_tokens, V] that they come from."""
    ids = torch.tensor([prompt_ids], device=model.device)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(prompt_ids) :].tolist(), torch.cat(out.logits)


def merged_delta(base: PreTrainedModel, model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT's merge changes in each weight, by parameter name."""
    merged = copy.deepcopy(model).merge_and_unload()
    old = dict(base.named_parameters())
    return {name: new - old[name] for name, new in merged.named_parameters() if not torch.equal(new, old[name])}


def with_deltas(base: PreTrainedModel, deltas: list[tuple[float, dict[str, torch.Tensor]]]) -> PreTrainedModel:
    """A copy of `base` plus the weighted sum of weight changes: what a mix means."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight, changes in deltas:
            for name, change in changes.items():
                parameters[name] += weight * change
    return model
