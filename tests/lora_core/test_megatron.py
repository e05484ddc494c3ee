"""Megatron's parallel linear layers: a stand-in with their signatures, and PEFT's own wrapper around it."""

import copy
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.tp_layer import LoraParallelLinear as PeftParallelLinear
from torch import Tensor, nn

from lora_core import ConfigError, LoraConfig, LoraModel, UnsupportedError
from lora_core.megatron import is_parallel_linear


@dataclass
class TransformerConfig:
    """What the layers read of Megatron's settings."""

    params_dtype: torch.dtype = torch.float32
    init_method: Any = nn.init.xavier_normal_
    sequence_parallel: bool = False


class _Parallel(nn.Module):
    """One of `WORLD` ranks; communication is left out, which is right for one."""

    def __init__(self, input_size: int, output_size: int, parts: tuple[int, int], config: Any, bias: bool) -> None:
        super().__init__()
        self.input_size, self.output_size, self.config = input_size, output_size, config
        self.weight = nn.Parameter(
            torch.empty(output_size // parts[0], input_size // parts[1], dtype=config.params_dtype)
        )
        config.init_method(self.weight)
        self.bias = nn.Parameter(torch.randn(output_size // parts[0])) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = x @ self.weight.T
        skips = getattr(self, "skip_bias_add", False)
        return (y if skips or self.bias is None else y + self.bias), (self.bias if skips else None)


WORLD = 1


class ColumnParallelLinear(_Parallel):
    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool = True,
        gather_output: bool = False, skip_bias_add: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(input_size, output_size, (WORLD, 1), config, bias)
        self.gather_output, self.skip_bias_add, self.init_method = gather_output, skip_bias_add, init_method


class RowParallelLinear(_Parallel):
    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool,
        input_is_parallel: bool, skip_bias_add: bool,
    ) -> None:  # fmt: skip
        super().__init__(input_size, output_size, (1, WORLD), config, bias)
        self.input_is_parallel, self.skip_bias_add, self.init_method = input_is_parallel, skip_bias_add, init_method


for kind in (ColumnParallelLinear, RowParallelLinear):
    kind.__module__ = "megatron.core.tensor_parallel.layers"


class Mlp(nn.Module):
    """As Megatron's, with a plain norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = TransformerConfig(params_dtype=dtype)
        self.fc1 = ColumnParallelLinear(8, 12, config=config, init_method=config.init_method, skip_bias_add=True)
        self.fc2 = RowParallelLinear(
            12, 6, config=config, init_method=config.init_method, bias=True, input_is_parallel=True, skip_bias_add=False
        )

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.fc1(x)
        y, none = self.fc2(torch.tanh(y + bias))
        assert none is None
        return y


class PlainMlp(nn.Module):
    """The same map with nn.Linear."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 6)
        self.load_state_dict(mlp.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


TARGETS = ["fc1", "fc2"]


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_dropout": 0.3}], ids=str)
def test_a_parallel_model_is_the_plain_model(config: dict[str, Any], tmp_path: Path) -> None:
    mlp = Mlp()
    plain = LoraModel(PlainMlp(mlp), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **config)).eval()
    randomise(plain)
    plain.save_pretrained(tmp_path)
    parallel = LoraModel(copy.deepcopy(mlp)).eval()
    parallel.load_adapter(tmp_path, "default")
    parallel.set_adapter("default")
    x = torch.randn(5, 3, 8)
    wanted = plain(x)
    torch.testing.assert_close(parallel(x), wanted)
    assert not torch.allclose(mlp(x), wanted, atol=1e-2)
    for model in (plain, parallel):
        model(x).square().sum().backward()
    for one, other in zip(parallel.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    parallel.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    parallel.merge_adapter()
    torch.testing.assert_close(parallel(x), wanted)
    parallel.unmerge_adapter()
    with parallel.disable_adapter():
        assert torch.equal(parallel(x), mlp(x))
    merged = parallel.merge_and_unload()
    assert type(merged.fc1) is ColumnParallelLinear
    torch.testing.assert_close(merged(x), wanted)


def test_factors_are_split_as_in_peft() -> None:
    mlp, settings = Mlp(), {"megatron_config": {"sequence_parallel": True}}
    model = LoraModel(copy.deepcopy(mlp), LoraConfig(r=4, target_modules=TARGETS, **settings))
    backend = types.SimpleNamespace(ColumnParallelLinear=ColumnParallelLinear, RowParallelLinear=RowParallelLinear)
    for name in TARGETS:
        ours = model.layers[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftParallelLinear(
                mlp.get_submodule(name),
                "default",
                peft.LoraConfig(r=4, init_lora_weights=False),
                backend,
                r=4,
                lora_alpha=8,
                megatron_config=TransformerConfig(),
            )
        for part in ("lora_A", "lora_B"):
            own, other = getattr(ours, part)["default"], getattr(theirs, part)["default"]
            assert type(own) is type(other)
            assert own.weight.shape == other.weight.shape
            if is_parallel_linear(own):
                assert own.config.sequence_parallel
                attributes = ("gather_output",) if part == "lora_B" else ("input_is_parallel", "skip_bias_add")
                assert [getattr(own, a) for a in attributes] == [getattr(other, a) for a in attributes]
        randomise(theirs)
        with torch.no_grad():
            ours.tensors("default").lora_A.copy_(theirs.lora_A["default"].weight)
            ours.tensors("default").lora_B.copy_(theirs.lora_B["default"].weight)
        theirs.scaling["default"] = ours.scaling["default"]
        torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    assert not mlp.fc2.config.sequence_parallel
    assert "megatron.core" not in sys.modules


def test_every_rank_changes_its_own_part_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WORLD", 2)
    model = LoraModel(Mlp(), LoraConfig(r=4, target_modules=TARGETS))
    for name, a, b, delta in (("fc1", (4, 8), (6, 4), (6, 8)), ("fc2", (4, 6), (6, 4), (6, 6))):
        part = model.layers[name].tensors("default")
        assert (part.lora_A.shape, part.lora_B.shape) == (a, b)
        assert model.layers[name].get_delta_weight("default").shape == delta == model.layers[name].weight.shape
    model.merge_adapter()
    assert torch.isfinite(model.layers["fc1"].weight).all()


def test_half_precision_layers_have_float32_factors() -> None:
    mlp = Mlp(torch.bfloat16)
    mlp.fc1.bias.data, mlp.fc2.bias.data = mlp.fc1.bias.data.bfloat16(), mlp.fc2.bias.data.bfloat16()
    model = LoraModel(mlp, LoraConfig(r=4, target_modules=TARGETS))
    randomise(model)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert mlp.fc1.base_layer.config.params_dtype == torch.bfloat16
    assert model(torch.randn(2, 3, 8).bfloat16()).dtype == torch.bfloat16


def test_several_adapters_mix_for_a_whole_batch_only() -> None:
    config = LoraConfig(r=4, target_modules=TARGETS)
    model = LoraModel(Mlp(), {"a": config, "b": config}).eval()
    randomise(model)
    x = torch.randn(4, 2, 8)
    model.set_adapter(["a", "b"])
    wanted = model(x)
    torch.testing.assert_close(model(x, adapter_names=[["a", "b"]] * 4), wanted)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(UnsupportedError, match="rows of one batch"):
        model(x, adapter_names=["a", "b", "a", "b"])


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        (Mlp, {"use_dora": True}, "use_dora"),
        (Mlp, {"lora_bias": True}, "lora_bias"),
        (lambda: PlainMlp(Mlp()), {"megatron_config": {}}, r"megatron\.core"),
    ],
)
def test_what_is_missing_is_named(model: Any, changes: dict[str, Any], match: str) -> None:
    base = model()
    before = base.state_dict().keys()
    with pytest.raises(UnsupportedError, match=match):
        LoraModel(base, LoraConfig(r=4, target_modules=TARGETS, **changes))
    assert base.state_dict().keys() == before


def test_only_names_under_megatron_are_accepted() -> None:
    with pytest.raises(ConfigError, match="megatron"):
        LoraConfig(target_modules=TARGETS, megatron_config={}, megatron_core="os.path")
