"""LoraConfig reads what PEFT writes, means the same by it, and refuses by name what it does not honour."""

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from lora_core import CheckpointError, ConfigError, LoraConfig, UnsupportedError
from lora_core.config import INERT_FIELDS
from lora_core.targets import match_targets

OWN = {field.name for field in dataclasses.fields(LoraConfig)}
PEFT_FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}

# Arguments of peft.LoraConfig.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    {"lora_alpha": 2.5, "use_rslora": True, "target_modules": r".*\.[qv]_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "fc1"], "use_dora": True},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*", "lora_bias": True, "init_lora_weights": False},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 3], "layers_pattern": ["layers", "h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [], "fan_in_fan_out": True},
    {"rank_pattern": {"q_proj": 2, r"^model\.1": 9}, "alpha_pattern": {"v_proj": 1.5}},
    {"task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "revision": "main", "inference_mode": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "olora", "bias": "lora_only", "ensure_weight_tying": True},
    {"bias": "all", "modules_to_save": ["norm", "lm_head"], "task_type": "CAUSAL_LM"},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 2], "layer_replication": [(0, 2), (1, 3)]},
    {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [0]}},
    {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []},
    {"megatron_config": {"hidden_size": 8}, "megatron_core": "megatron.core"},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    # Settings of an initialisation stay behind when PEFT converts the adapter to a plain LoRA.
    {"init_lora_weights": True, "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"scale": "unit"}},
]


def by_peft(settings: dict[str, Any]) -> peft.LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are ignored
        return peft.LoraConfig(**settings)


def written_by_peft(settings: dict[str, Any], folder: Path) -> bytes:
    by_peft(settings).save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes()


def plain(value: Any) -> Any:
    """For comparisons: PEFT has sets and lists where this package has tuples; "no item" is None."""
    if isinstance(value, list | set | tuple):
        return frozenset(map(plain, value)) or None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()} or None
    return plain(dataclasses.asdict(value)) if dataclasses.is_dataclass(value) else value


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_reads_what_peft_writes_and_writes_what_peft_reads(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = by_peft(settings)
    config = LoraConfig.from_json(written_by_peft(settings, tmp_path))
    for name in OWN:
        assert plain(getattr(config, name)) == plain(getattr(theirs, name)), name

    config.save(tmp_path)
    assert LoraConfig.from_json((tmp_path / "adapter_config.json").read_bytes()) == dataclasses.replace(
        config, inference_mode=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.LoraConfig.from_pretrained(str(tmp_path))
    for name in PEFT_FIELDS - INERT_FIELDS - {"inference_mode"}:
        assert plain(getattr(back, name)) == plain(getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("written", "meaning"), [(3, (3,)), (0, (0,)), ([2, 1], (2, 1)), ([], None), (None, None)], ids=str
)
def test_layers_to_transform(written: Any, meaning: tuple[int, ...] | None, tmp_path: Path) -> None:
    raw = written_by_peft({"target_modules": ["q_proj"], "layers_to_transform": written}, tmp_path)
    assert LoraConfig.from_json(raw).layers_to_transform == meaning


def test_defaults_are_those_of_peft() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    assert {name: plain(getattr(ours, name)) for name in OWN} == {name: plain(getattr(theirs, name)) for name in OWN}
    assert LoraConfig.from_dict({"peft_type": "LORA"}) == ours


@pytest.mark.parametrize("name", sorted(OWN))
def test_null_means_not_set(name: str) -> None:
    assert LoraConfig.from_dict({"peft_type": "LORA", name: None}) == LoraConfig()


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "x", [0], {"a": None}], ids=repr)
@pytest.mark.parametrize("name", [*sorted(PEFT_FIELDS - OWN - INERT_FIELDS), "field_of_tomorrow"])
def test_a_set_field_that_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"`{name}` is set") as caught:
        LoraConfig.from_dict({"peft_type": "LORA", name: value})
    assert caught.value.code == "adapter_unsupported"


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
@pytest.mark.parametrize("name", [*sorted(PEFT_FIELDS - OWN - {"peft_type"}), "field_of_tomorrow"])
def test_an_empty_field_is_accepted_whatever_its_name(name: str, value: Any) -> None:
    assert LoraConfig.from_dict({"peft_type": "LORA", name: value}) == LoraConfig()


@pytest.mark.parametrize("name", sorted(INERT_FIELDS - {"peft_type"}))
def test_fields_without_mathematics_are_never_executed(name: str) -> None:
    assert LoraConfig.from_dict({"peft_type": "LORA", name: {"parent_library": "os", "x": [1]}}) == LoraConfig()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
    ],
    ids=str,
)
def test_what_peft_writes_for_an_unsupported_feature_is_refused(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=f"`{name}` is set"):
        LoraConfig.from_json(written_by_peft(settings | {"task_type": "CAUSAL_LM"}, tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    ],
    ids=lambda settings: settings["init_lora_weights"],
)
def test_an_adapter_of_a_changed_base_needs_conversion(settings: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT wants scipy for LoftQ's settings to be accepted; the file is the same without it.
        peft.LoraConfig(**settings | {"init_lora_weights": True}).save_pretrained(str(tmp_path))
    raw = json.loads((tmp_path / "adapter_config.json").read_bytes()) | settings
    config = LoraConfig.from_dict(raw)
    with pytest.raises(UnsupportedError, match="path_initial_model_for_weight_conversion") as caught:
        config.require_plain()
    assert caught.value.code == "adapter_needs_conversion"


HUGE = 10**400  # no float holds it
BAD_NUMBERS = [True, "8", [8], {}, HUGE, -HUGE, float("nan"), float("inf"), float("-inf")]
BAD_SEQUENCES = [5, 1.5, True, {"a": 1}, [5], [None], [["x"]], [{}]]
BAD_FLAGS = [1, 0, "true", [], {}]
BAD_TEXTS = [5, True, ["x"], {}]
BAD_VALUES: dict[str, list[Any]] = {
    "r": [*BAD_NUMBERS, 0, -1, 8.0, 1.5],
    "lora_alpha": BAD_NUMBERS,
    "lora_dropout": [*BAD_NUMBERS, -0.1, 1, 1.5],
    "target_modules": [*BAD_SEQUENCES, [""]],
    "exclude_modules": [*BAD_SEQUENCES, [""]],
    "layers_to_transform": [-1, 1.5, True, "1", {}, {"a": 1}, [True], [-1], [1.0], ["1"], [None], [[1]]],
    "layers_pattern": [5, 1.5, True, {}, {"a": 1}, [5], [None], [["x"]]],
    "rank_pattern": [5, "x", [1], *({"a": value} for value in [*BAD_NUMBERS, 0, -1, 1.5, None])],
    "alpha_pattern": [5, "x", [1], *({"a": value} for value in [*BAD_NUMBERS, None])],
    "init_lora_weights": [1, 0.5, [True], {}, "", "zeros", "x" * 100_000],
    "use_rslora": BAD_FLAGS,
    "use_dora": BAD_FLAGS,
    "lora_bias": BAD_FLAGS,
    "fan_in_fan_out": BAD_FLAGS,
    "inference_mode": BAD_FLAGS,
    "task_type": BAD_TEXTS,
    "base_model_name_or_path": BAD_TEXTS,
    "revision": BAD_TEXTS,
    "bias": [5, True, "some", ["all"], {}],
    "modules_to_save": [5, 1.5, True, "lm_head", {"a": 1}, [5], [None], [""]],
    "target_parameters": [5, 1.5, True, "experts.w", {"a": 1}, [5], [None], [""]],
    "trainable_token_indices": [5, "1", True, [-1], [1.0], ["1"], [True], [1, 1], {"a": 1}, {"a": [1.5]}],
    "layer_replication": [
        5,
        "x",
        True,
        {},
        [1, 2],
        [[1]],
        [[0, 1, 2]],
        [[1, 1]],
        [[-1, 1]],
        [[0, 10**6]],
        [["0", "1"]],
    ],
    "loftq_config": [{"loftq_bits": 3}, {"loftq_iter": 0}, {"loftq_iter": 1.5}, {"loftq_bits": "4"}, {"x": 1}, 5, [1]],
    "megatron_config": [5, "x", [1], True],
    "auto_mapping": [5, "x", [1], True],
}
BAD_VALUES["megatron_core"] = []  # has a meaning with megatron_config only: below


@pytest.mark.parametrize("name", sorted(BAD_VALUES))
def test_bad_types_and_ranges(name: str) -> None:
    assert BAD_VALUES.keys() == OWN
    for value in BAD_VALUES[name]:
        with pytest.raises(ConfigError, match=rf"`r`|{name}|LoftQ|loftq|layer_replication|bias") as caught:
            LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], name: value})
        assert len(str(caught.value)) < 500, value


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "lora_bias": True},
        {"init_lora_weights": "loftq"},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"megatron_config": {"a": 1}, "use_dora": True},
        {"target_modules": ".*q", "layers_to_transform": [1]},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": ".*q", "layers_pattern": "layers"},
        {"target_modules": ["q"], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_contradictions_are_refused_as_by_peft(settings: dict[str, Any]) -> None:
    if settings.get("megatron_core") != "os":  # PEFT refuses this one when it is about to import it
        with pytest.raises((ValueError, ImportError), match=r"lora_bias|layers_|loftq|megatron|scipy"):
            peft.LoraConfig(**settings)
    with pytest.raises(ConfigError, match=r"lora_bias|layers_|loftq_config|megatron_core"):
        LoraConfig(**settings)


@pytest.mark.parametrize("peft_type", [None, "", "lora", "IA3", "LOHA", 5, ["LORA"], {"x": "y" * 100_000}], ids=ascii)
def test_other_kinds_of_adapters_are_refused(peft_type: Any) -> None:
    with pytest.raises(UnsupportedError, match="`peft_type` is") as caught:
        LoraConfig.from_dict({"peft_type": peft_type})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"LORA"',
        b"\xff\xfe{}",
        b'{"peft_type": "LORA",}',
        b'{"peft_type": "LORA", "lora_alpha": NaN}',
        b'{"peft_type": "LORA", "lora_alpha": Infinity}',
        b'{"peft_type": "LORA", "x": [-Infinity]}',
        b'{"peft_type": "LORA", "r": ' + b"1" * 5_000 + b"}",
        b'{"peft_type": "LORA", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"peft_type": "LORA", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_a_file_that_is_no_json_object(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json") as caught:
        LoraConfig.from_json(text)
    assert caught.value.code == "adapter_file_invalid"


def test_a_number_beyond_every_float_is_no_number() -> None:
    with pytest.raises(ConfigError, match="`lora_alpha` must be a finite number"):
        LoraConfig.from_json('{"peft_type": "LORA", "lora_alpha": 1e999}')


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_equals_peft(use_rslora: bool) -> None:
    settings = {
        "r": random.randint(1, 64),
        "lora_alpha": random.choice([random.randint(1, 64), random.uniform(0.1, 64)]),
        "use_rslora": use_rslora,
        "rank_pattern": {"b": random.randint(1, 64), "d": random.randint(1, 64)},
        "alpha_pattern": {"c": random.randint(1, 64), "d": random.uniform(0.1, 64)},
        "target_modules": list("abcd"),
    }
    net = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), net)
    targets = match_targets(LoraConfig(**settings), "abcd")
    assert [(t.name, t.scaling) for t in targets] == [(name, net[name].scaling["default"]) for name in "abcd"]
    config = LoraConfig(**settings)
    assert config.scaling(config.r, config.lora_alpha) == net["a"].scaling["default"]
