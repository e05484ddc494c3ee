"""Targets, ranks and scalings are those that PEFT itself gives the same model; hostile expressions are stopped."""

import copy
import re
import time
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_core import ConfigError, LoraConfig, LoraModel, Router, TargetError, resolve_targets, wrap_linears
from lora_core.patterns import BoundedPattern
from lora_core.targets import DEFAULT_TARGETS, Target, match_targets, output_embedding_name
from tests.tiny_models import CONFIGS

LAYERS = 12  # with layers 1 and 11


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Models without memory: only their names matter."""
    out = {}
    for architecture in ("llama", "gpt2", "opt", "phi3"):
        config = CONFIGS[architecture]()
        config.num_hidden_layers = LAYERS
        with torch.device("meta"):
            out[architecture] = AutoModelForCausalLM.from_config(config)
    return out


def by_peft(model: nn.Module, config: dict[str, Any]) -> list[Target]:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that match nothing, and of Conv1D
        peft.inject_adapter_in_model(peft.LoraConfig(**config), model)
    return [
        Target(name, module.r["default"], module.scaling["default"], module.lora_alpha["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


Q, QV = ["q_proj"], ["q_proj", "v_proj"]
LLAMA: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    {"target_modules": ["model.layers.3.mlp.up_proj", "layers.11.self_attn.o_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": r".*\.(1|11)\.self_attn\.[qk]_proj"},
    {"target_modules": r"model\.layers\.\d\.mlp\..*_proj|lm_head"},
    {"target_modules": r"(?!.*self_attn).*_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-linear"},
    {},
    {"target_modules": QV, "exclude_modules": ["v_proj"]},
    {"target_modules": QV, "exclude_modules": ["1.self_attn.q_proj", "model.layers.2.self_attn.v_proj", "proj"]},
    {"target_modules": QV, "exclude_modules": r".*\.1\..*"},
    {"target_modules": QV, "exclude_modules": "v_proj"},
    {"target_modules": QV, "exclude_modules": ""},
    {"target_modules": QV, "exclude_modules": []},
    {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "self_attn"]},
    {"target_modules": "all-linear", "exclude_modules": r"model\.layers\.[^1].*"},
    {"target_modules": r".*q_proj", "exclude_modules": ["11.self_attn.q_proj"]},
    {"target_modules": QV, "layers_to_transform": 0},
    {"target_modules": QV, "layers_to_transform": 1},
    {"target_modules": QV, "layers_to_transform": [11, 1, 99]},
    {"target_modules": QV, "layers_to_transform": []},
    {"target_modules": [*QV, "model.layers.5.mlp.up_proj"], "layers_to_transform": [1]},
    {"target_modules": [*Q, "lm_head"], "layers_to_transform": [1]},
    {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
    {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": "model.layers"},
    {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": []},
    {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": ""},
]
# Patterns of rank and alpha: what of them matches, and which of two wins.
PATTERNS: list[dict[str, float]] = [
    {"q_proj": 2},
    {"proj": 2},
    {"1.self_attn.q_proj": 2},
    {"layers.1.self_attn": 2},
    {"model.layers.1.self_attn.q_proj": 2},
    {"base_model.model.model.layers.1.self_attn.q_proj": 2},
    {r"^model\.layers\.1\.self_attn\.q_proj": 2},
    {r"^layers\.1\.self_attn\.q_proj": 2},
    {r"layers\.(1|3)\..*": 2},
    {r".*\.(1|3)\.self_attn\.v_proj$": 2},
    {r"q_proj|self_attn\.v_proj": 2},
    {r".*proj": 2, "q_proj": 3},
    {"q_proj": 2, "1.self_attn.q_proj": 3},
    {"1.self_attn.q_proj": 3, "q_proj": 2},
    {r"(?:q|v)_proj": 3, "nothing": 5},
    {r"[^.]+": 7},
    {"": 5, "v_proj": 9},
]
CASES = [
    *(("llama", config) for config in LLAMA),
    *(("llama", {"target_modules": QV, "rank_pattern": pattern}) for pattern in PATTERNS),
    *(("llama", {"target_modules": QV, "alpha_pattern": pattern, "use_rslora": True}) for pattern in PATTERNS),
    ("llama", {"target_modules": QV, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.self_attn.q_proj": 5}}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_proj", "c_attn"], "rank_pattern": {"attn.c_proj": 2}}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "layers_to_transform": [1]}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": [1, 11], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": r"transformer\.h\.\d\..*c_fc", "exclude_modules": ["h.1.mlp.c_fc"]}),
    ("opt", {}),
    ("opt", {"target_modules": "all-linear", "exclude_modules": ["out_proj"]}),
    ("opt", {"target_modules": ["fc1", "out_proj"], "layers_to_transform": 11, "layers_pattern": "layers"}),
    ("opt", {"target_modules": ["fc1"], "rank_pattern": {"layers.1.fc1": 3, "1.fc1": 4}}),
    ("phi3", {"target_modules": "all-linear"}),
    ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "alpha_pattern": {"mlp.*": 3}}),
]


@pytest.mark.parametrize(("architecture", "config"), CASES, ids=str)
def test_targets_are_those_of_peft(
    architecture: str, config: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    config = {"r": 4, "lora_alpha": 6} | config
    wanted = by_peft(models[architecture], config)
    assert wanted
    assert resolve_targets(LoraConfig(**config), models[architecture]) == wanted


@pytest.mark.parametrize(("architecture", "config"), CASES[::6], ids=str)
def test_a_wrapped_model_resolves_alike(
    architecture: str, config: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    wanted = resolve_targets(LoraConfig(**config), models[architecture])
    wrapped = copy.deepcopy(models[architecture])
    wrap_linears(wrapped, Router())
    assert resolve_targets(LoraConfig(**config), wrapped) == wanted
    with_parameters = LoraModel(copy.deepcopy(models[architecture]), LoraConfig(**config)).model
    assert resolve_targets(LoraConfig(**config), with_parameters) == wanted


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["proj"]},
        {"target_modules": ["nothing", "lora_A"]},
        {"target_modules": []},
        {"target_modules": "q_proj"},
        {"target_modules": QV, "exclude_modules": r".*"},
        {"target_modules": QV, "exclude_modules": QV},
        {"target_modules": QV, "layers_to_transform": [12]},
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "ayers"},
    ],
    ids=str,
)
def test_no_match(config: dict[str, Any], models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=r"[Tt]arget"):
        by_peft(models["llama"], config)
    with pytest.raises(TargetError, match=r"not found in the base model\. Please check the target modules") as caught:
        resolve_targets(LoraConfig(**config), models["llama"])
    assert caught.value.code == "adapter_mismatch"


@pytest.mark.parametrize("targets", [["self_attn"], [*QV, "norm"], r".*norm", ".*"], ids=str)
def test_a_match_that_is_no_linear_layer(targets: Any, models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(TargetError, match=r"is not supported\. Currently, only"):
        resolve_targets(LoraConfig(target_modules=targets), models["llama"])


def test_default_targets_are_those_of_peft() -> None:
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert set(DEFAULT_TARGETS) - set(theirs) == {"phi3", "starcoder2"}
    for model_type, targets in theirs.items():
        found = DEFAULT_TARGETS[model_type]
        assert (found if isinstance(found, str) else list(found)) == targets, model_type


def test_no_default_for_an_unknown_model() -> None:
    with pytest.raises(TargetError, match="Please specify `target_modules`"):
        resolve_targets(LoraConfig(), nn.Sequential(nn.Linear(2, 2)))


def test_a_model_without_output_embedding() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert output_embedding_name(model) is None
    assert [t.name for t in resolve_targets(LoraConfig(target_modules="all-linear"), model)] == ["0", "2"]


# Exponential in the length of the name, and not seen through by the library.
SLOW = r"(?:.|.)*[^\w.]"
SLOW_CONFIGS: list[dict[str, Any]] = [
    {"target_modules": SLOW},
    {"target_modules": QV, "exclude_modules": SLOW},
    {"target_modules": QV, "rank_pattern": {SLOW: 2}},
    {"target_modules": QV, "alpha_pattern": {SLOW: 2}},
    # Each a little slow, or none of them, but thousands.
    {"target_modules": QV, "rank_pattern": {rf"(?:.|.){{1,17}}[^\w.]|x{i}": 2 for i in range(3_000)}},
    {"target_modules": QV, "rank_pattern": {f"x{i}": 2 for i in range(30_000)}},
]


@pytest.mark.parametrize("config", SLOW_CONFIGS, ids=lambda config: str(config)[:100])
def test_slow_expressions_are_stopped(
    config: dict[str, Any], models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.targets.MAX_CONFIG_S", 0.5)  # of 2: enough to show that there is an end
    start = time.thread_time()
    with pytest.raises(ConfigError, match="takes too long"):
        resolve_targets(LoraConfig(**config), models["llama"])
    assert time.thread_time() - start < 1.5


def test_as_many_patterns_as_modules_are_fast_enough() -> None:
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(40) for part in "qkvo"]
    config = LoraConfig(rank_pattern={name: i + 1 for i, name in enumerate(names)})
    assert [t.r for t in match_targets(config, names)] == list(range(1, len(names) + 1))


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a" * 4_001,
        "(?:" * 1_300 + ")" * 1_300,
        "a{99999999999999999999}",
        # Written out, a gigabyte and more; the last ones hide it from a naive count.
        "(a{1000}){1000}",
        "((a{1000}){1000}){1000}",
        "(?x)((a{1 000}){1 000}){1 000}",
        "(?x)((a{1#}\n000}){1#}\n000}){1#}\n000}",
        # Not known to `re`: recursion without end, and fuzzy matches.
        "(?R)",
        "(?0)",
        "(a)(?1)",
        "(?&a)(?<a>b)",
        "(?P<a>b)(?P>a)",
        "(?V1)[[a-z]--[b]]",
        r"\L<a>",
        "q_proj{e<=3}",
        "(?:" * 9 + "x{9,99}" + "){9,9}" * 9,
    ],
    ids=lambda pattern: ascii(pattern[:40]),
)
def test_expressions_that_cannot_be_compiled(pattern: str) -> None:
    for make in (BoundedPattern, BoundedPattern.of_suffix):
        with pytest.raises(ConfigError) as caught:
            make(pattern)
        assert len(str(caught.value)) < 500


PIECES = r"( ) [ ] { } * + ? | ^ $ . \ a 1 , - && (? <a> : (?P<a> (?P=a) \1 (?i) (?V1) \p{ \L<a> {1} {e} = ! # \w _"


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(PIECES.split()), max_size=9).map("".join) | st.text(max_size=9),
    st.text("a1._A", max_size=4),
)
def test_expressions_mean_what_they_mean_to_peft(pattern: str, name: str) -> None:
    try:
        found = BoundedPattern(pattern).fullmatch(name)
    except ConfigError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sets within sets
        try:
            assert found == (re.fullmatch(pattern, name) is not None)
        except re.error:
            return  # PEFT would have failed
