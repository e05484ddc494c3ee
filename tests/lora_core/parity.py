"""Models and adapter settings for comparisons with PEFT, beyond the causal language models of tests.tiny_models."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as Seq2Seq

from lora_core import LoraConfig, LoraModel
from tests.tiny_models import VOCABULARY, tiny_model

Inputs = dict[str, Tensor]


class Mlp(nn.Module):
    """With what language models lack: biases, an odd width, layers that no adapter touches."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(10, 20), nn.LayerNorm(20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.norm(self.lin0(x))))


class Convolutions(nn.Module):
    """One, two and three dimensions, strides, padding and a 1 × 1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.conv2d = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1, bias=False)
        self.conv1d = nn.Conv1d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv3d(x))[:, :, 0]
        x = self.point(torch.relu(self.conv2d(x)))
        return self.conv1d(x.flatten(2))


class Embedding(nn.Module):
    """An embedding table and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin = nn.Embedding(17, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.table(x))


MOE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "head_dim": 8,
}  # fmt: skip


def _random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_model(name: str, seed: int) -> nn.Module:
    """A random float32 model in evaluation mode."""
    torch.manual_seed(seed)
    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": Mlp,
        "conv": Convolutions,
        "embedding": Embedding,
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
        ),
        "t5": lambda: Seq2Seq(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=1.5
            )
        ),
    }
    return _random(makers[name]()) if name in makers else tiny_model(name, seed)


def make_inputs(name: str, num_rows: int = 3) -> Inputs:
    """Random inputs of a model's forward, by argument."""
    if name == "mlp":
        return {"x": torch.randn(num_rows, 10)}
    if name == "conv":
        return {"x": torch.randn(num_rows, 2, 1, 8, 8)}
    if name == "embedding":
        return {"x": torch.randint(17, (num_rows, 5))}
    ids = torch.randint(3, VOCABULARY, (num_rows, 6))
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})


def run(model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
    """The model's output as one tensor."""
    out = model(**inputs, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


def by_peft(base: nn.Module, settings: dict[str, Any], name: str = "default") -> Any:
    """A copy of `base` with one randomised PEFT adapter, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings), name).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give everything that an adapter trains other values."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif "lora_" in name:
            parameter.normal_(std=0.2)
        elif parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def saved(model: Any, folder: Path, **kwargs: Any) -> Path:
    """The folder that PEFT writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **kwargs)
    return folder


def loaded(base: nn.Module, folder: Path) -> LoraModel:
    """Our model with the adapter of a folder, active."""
    model = LoraModel(copy.deepcopy(base)).eval()
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    return model


def ours(base: nn.Module, settings: dict[str, Any]) -> LoraModel:
    """Our model with a new adapter."""
    return LoraModel(copy.deepcopy(base), LoraConfig(**settings))
