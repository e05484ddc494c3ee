"""Adapters of every kind that PEFT saves for a causal language model, made by PEFT, and what PEFT answers with them."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_core.loftq import loftq
from tests import peft_adapters
from tests.tiny_folder import VOCABULARY, tiny_tokenizer
from tests.tiny_models import tiny_model

__all__ = ["BASES", "VARIANTS", "Made", "Variant", "make", "make_base"]

CONFIG = "adapter_config.json"
TARGETS = ["q_proj", "v_proj"]
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@dataclass(frozen=True)
class Made:
    """An adapter's folder, with `initial/` in it if that is sent along, and the model that it stands for."""

    folder: Path
    reference: Any


Maker = Callable[[PreTrainedModel, "Variant", int, Path], Made]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        settings: of peft.LoraConfig.
        sends_initial: the adapter before its training goes along.
        code: with which it is refused; "" if it is served.
    """

    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    make: Maker | None = None
    sends_initial: bool = False
    code: str = ""


def _config(variant: Variant, **changes: Any) -> peft.LoraConfig:
    default: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**default | variant.settings | changes)


def _plain(base: PreTrainedModel, variant: Variant, seed: int, folder: Path) -> Made:
    model = peft_adapters.peft_model(base, "llama", seed, **{"r": 4, "target_modules": TARGETS} | variant.settings)
    return Made(peft_adapters.save(model, folder), model)


def _pickled(base: PreTrainedModel, variant: Variant, seed: int, folder: Path) -> Made:
    model = peft_adapters.peft_model(base, "llama", seed, target_modules=TARGETS)
    model.save_pretrained(folder, safe_serialization=False)
    return Made(folder, model)


def _changed_base(base: PreTrainedModel, variant: Variant, seed: int, folder: Path) -> Made:
    """Initialised by changing the base, saved as it is then, and moved on as training would."""
    model: Any = copy.deepcopy(base)
    torch.manual_seed(seed)
    config = _config(variant)
    if config.init_lora_weights == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        ids = torch.randint(3, VOCABULARY, (1, 200))
        preprocess_corda(model, config, run_model=lambda: model(input_ids=ids))
    model = peft.get_peft_model(model, config).eval()
    if variant.sends_initial:
        _save_as_plain(model, folder / "initial")
    _train(model)
    model.save_pretrained(folder)
    return Made(folder, model)


def _loftq(base: PreTrainedModel, variant: Variant, seed: int, folder: Path) -> Made:
    """PEFT's own LoftQ asks for CUDA, so A and B are set. Reference: on the base, what training added."""
    model: Any = peft.get_peft_model(copy.deepcopy(base), _config(variant, init_lora_weights=True)).eval()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            found = loftq(module.base_layer.weight.data, 4, 4, module.scaling["default"])
            module.lora_A["default"].weight.data.copy_(found.lora_A)
            module.lora_B["default"].weight.data.copy_(found.lora_B)
    before = peft_adapters.merged_delta(base, model)
    peft_adapters.save(model, folder / "initial")
    torch.manual_seed(seed)
    _train(model)
    after = peft_adapters.merged_delta(base, model)
    peft_adapters.save(model, folder)
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(
        json.dumps(written | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})
    )
    return Made(folder, peft_adapters.with_deltas(base, [(1.0, after), (-1.0, before)]))


@torch.no_grad()
def _train(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _save_as_plain(model: Any, folder: Path) -> None:
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(folder)
    config.init_lora_weights = init


VARIANTS: dict[str, Variant] = {
    "LoRA": Variant("llama"),
    "`use_rslora`": Variant("llama", {"use_rslora": True}),
    "`use_dora`": Variant("llama", {"use_dora": True}),
    "`rank_pattern`, `alpha_pattern`": Variant(
        "llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*": 9}}
    ),
    "`target_modules=all-linear`": Variant("llama", {"target_modules": "all-linear"}),
    "`layers_to_transform`": Variant("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "`exclude_modules`": Variant("llama", {"exclude_modules": ["0.self_attn.q_proj"]}),
    "`lora_bias`": Variant("llama", {"lora_bias": True}),
    "`bias=all`": Variant("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "`bias=lora_only`": Variant("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "`fan_in_fan_out`": Variant("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "`fan_in_fan_out`, `use_dora`": Variant(
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "`modules_to_save`: norm": Variant("llama", {"modules_to_save": ["model.norm"]}),
    "`modules_to_save`: head": Variant("llama", {"modules_to_save": ["lm_head"]}),
    "`modules_to_save`: embeddings": Variant("llama", {"modules_to_save": ["embed_tokens"]}),
    "`modules_to_save`: MLPs": Variant("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "`modules_to_save`: attention": Variant(
        "llama", {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]}, code="adapter_unsupported"
    ),
    "embedding as target": Variant("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "`trainable_token_indices`": Variant("llama", {"trainable_token_indices": [5, 9, 300]}),
    "`target_parameters`": Variant("qwen3_moe", EXPERTS),
    "`init_lora_weights=gaussian`": Variant("llama", {"init_lora_weights": "gaussian"}),
    "`init_lora_weights=pissa`": Variant("llama", {"init_lora_weights": "pissa"}, _changed_base),
    "`init_lora_weights=olora`": Variant("llama", {"init_lora_weights": "olora"}, _changed_base),
    "`init_lora_weights=pissa_niter_4`": Variant(
        "llama", {"init_lora_weights": "pissa_niter_4"}, _changed_base, code="adapter_needs_conversion"
    ),
    "`init_lora_weights=pissa_niter_4`, initial adapter": Variant(
        "llama", {"init_lora_weights": "pissa_niter_4"}, _changed_base, sends_initial=True
    ),
    "`init_lora_weights=corda`": Variant(
        "llama", {"init_lora_weights": "corda"}, _changed_base, code="adapter_needs_conversion"
    ),
    "`init_lora_weights=corda`, initial adapter": Variant(
        "llama", {"init_lora_weights": "corda"}, _changed_base, sends_initial=True
    ),
    "`init_lora_weights=loftq`, initial adapter": Variant("llama", {}, _loftq, sends_initial=True),
    "`layer_replication`": Variant("llama", {"layer_replication": [[0, 2], [0, 1]]}, code="adapter_unsupported"),
    "`alora_invocation_tokens`": Variant("llama", {"alora_invocation_tokens": [5, 9]}, code="adapter_unsupported"),
    "`adapter_model.bin`": Variant("llama", {}, _pickled, code="adapter_pickle"),
}


def make(variant: Variant, base: PreTrainedModel, seed: int, folder: Path) -> Made:
    """The adapter of a variant, in a new folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        return (variant.make or _plain)(base, variant, seed, folder)


def _qwen3_moe(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


BASES = ("llama", "gpt2", "qwen3_moe")


def make_base(name: str, seed: int, folder: Path) -> PreTrainedModel:
    """A random model with its tokenizer in a folder."""
    model = _qwen3_moe(seed) if name == "qwen3_moe" else tiny_model(name, seed, VOCABULARY)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
