"""Adapter folders: from PEFT to this package and back nothing changes, and a file that does not add up is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from lora_core import (
    CheckpointError,
    LoraConfig,
    LoraError,
    TargetError,
    UnsupportedError,
    load_adapter,
    parse_adapter,
    save_adapter,
)
from lora_core.checkpoint import WEIGHTS_NAME, check_tensors, non_finite_tensor
from lora_core.safetensors_header import read_header
from tests import peft_adapters
from tests.tiny_models import VOCABULARY, tiny_model

VARIANTS = peft_adapters.VARIANTS | {"lora_bias": {"r": 4, "lora_bias": True}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_peft_and_back(variant: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model("opt", seed)  # its layers have biases, which PEFT wants for lora_bias
    theirs = peft_adapters.peft_model(base, "opt", seed, **VARIANTS[variant])
    before = peft_adapters.save(theirs, tmp_path / "before")
    adapter = load_adapter(before)
    assert adapter.num_bytes == sum(t.numel() * 4 for t in load_file(before / WEIGHTS_NAME).values())
    save_adapter(adapter, tmp_path / "new" / "after")
    after = tmp_path / "new" / "after"

    assert (after / WEIGHTS_NAME).read_bytes() == (before / WEIGHTS_NAME).read_bytes()
    assert load_adapter(after).config == adapter.config
    assert peft.LoraConfig.from_pretrained(str(after)) == peft.LoraConfig.from_pretrained(str(before))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny_model("opt", seed), str(after)).eval()
    ids = torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        assert not torch.allclose(theirs(ids).logits, base(ids).logits, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: value.to(dtype) for key, value in lora_file().items()}
    adapter = parse_adapter(config_json(), save(tensors))
    save_adapter(adapter, tmp_path)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert saved.keys() == tensors.keys()
    assert all(saved[key].dtype == dtype and torch.equal(saved[key], tensors[key]) for key in tensors)


PREFIX = "base_model.model.layers.0."
CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q", "v"]}
DORA, BIAS = {"use_dora": True}, {"lora_bias": True}


def config_json(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


def lora_file(**changes: Any) -> dict[str, Tensor]:
    """The tensors of a good file for q [6, 5] and v [3, 5], by what the configuration says."""
    config = CONFIG | changes
    tensors = {}
    for name, out_features in (("q", 6), ("v", 3)):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(config["r"], 5)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out_features, config["r"])
        if config.get("lora_bias"):
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.randn(out_features)
        if config.get("use_dora"):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(out_features)
    return tensors


Change = Callable[[dict[str, Tensor]], Any]


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{PREFIX}q.{part}")


def add(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({key: torch.zeros(*shape, dtype=dtype)})


def replace(part: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return add(f"{PREFIX}q.{part}", *shape, dtype=dtype)


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({k.replace(old, new): tensors.pop(k) for k in list(tensors)})


BROKEN: list[tuple[dict[str, Any], Change, type[LoraError], str]] = [
    ({}, drop("lora_A.weight"), CheckpointError, "'layers.0.q' lacks lora_A"),
    ({}, drop("lora_B.weight"), CheckpointError, "'layers.0.q' lacks lora_B"),
    (DORA, drop("lora_magnitude_vector"), CheckpointError, "its magnitude is missing"),
    ({}, replace("lora_magnitude_vector", 6), CheckpointError, "its magnitude is there"),
    (BIAS, drop("lora_B.bias"), CheckpointError, "its bias is missing"),
    ({}, replace("lora_B.bias", 6), CheckpointError, "its bias is there"),
    ({}, replace("lora_A.bias", 4), UnsupportedError, r"lora_A\.bias' belongs to a feature"),
    ({}, replace("lora_A.weight", 3, 5), TargetError, "says rank 4"),
    ({}, replace("lora_B.weight", 6, 3), TargetError, "says rank 4"),
    ({}, replace("lora_B.weight", 4, 6), TargetError, "says rank 4"),
    ({}, replace("lora_A.weight", 20), CheckpointError, "must be matrices"),
    ({}, replace("lora_B.weight", 6, 4, 1), CheckpointError, "must be matrices"),
    (DORA, replace("lora_magnitude_vector", 5), CheckpointError, r"magnitude has shape \[5\], not \[6\]"),
    (DORA, replace("lora_magnitude_vector", 1, 6), CheckpointError, r"magnitude has shape \[1, 6\]"),
    (BIAS, replace("lora_B.bias", 1), CheckpointError, r"bias has shape \[1\]"),
    (DORA, replace("lora_magnitude_vector.weight", 6), CheckpointError, "has its magnitude twice"),
    ({}, replace("lora_A.weight", 4, 5, dtype=torch.int32), CheckpointError, "has dtype I32"),
    ({}, replace("lora_A.weight", 4, 5, dtype=torch.float8_e4m3fn), CheckpointError, "has dtype F8_E4M3"),
    ({}, replace("lora_A.weight", 4, 5, dtype=torch.complex64), CheckpointError, "unknown dtype"),
    ({}, rename("base_model.model.", ""), CheckpointError, r"does not start with 'base_model\.model\.'"),
    ({}, rename("base_model.model.", "model."), CheckpointError, r"does not start with 'base_model\.model\.'"),
    ({}, rename("lora_A", "lora_A.default"), UnsupportedError, r"lora_A\.default\.weight' belongs to a feature"),
    ({}, add("base_model.model.lora_A.weight", 4, 5), UnsupportedError, "belongs to a feature"),
    ({}, add("base_model.model..lora_A.weight", 4, 5), UnsupportedError, "belongs to a feature"),
    ({}, add("base_model.model.embed.lora_embedding_A", 4, 9), CheckpointError, "lacks lora_B"),
    ({}, add("base_model.model.lm_head.weight", 9, 5), UnsupportedError, r"lm_head\.weight"),
    ({}, add(f"{PREFIX}q.base_layer.bias", 6), UnsupportedError, r"base_layer\.bias"),
    ({}, add("x" * 1_000_000, 1), CheckpointError, "does not start with"),
]


@pytest.mark.parametrize(("settings", "change", "error", "text"), BROKEN)
def test_files_that_do_not_add_up(settings: dict[str, Any], change: Change, error: type[LoraError], text: str) -> None:
    tensors = lora_file(**settings)
    parse_adapter(config_json(**settings), save(tensors))
    change(tensors)
    with pytest.raises(error, match=text) as caught:
        parse_adapter(config_json(**settings), save(tensors))
    assert caught.value.code == error.code
    assert len(str(caught.value)) < 500


def test_every_module_has_its_own_rank() -> None:
    settings = {"rank_pattern": {"q": 2}, "r": 4}
    tensors = lora_file(**settings)
    config = LoraConfig.from_json(config_json(**settings))

    def header() -> Any:
        data = save(tensors)
        return read_header(data, len(data))

    with pytest.raises(TargetError, match=r"'layers\.0\.q': the configuration says rank 2"):
        check_tensors(config, header())
    tensors[f"{PREFIX}q.lora_A.weight"] = torch.zeros(2, 5)
    tensors[f"{PREFIX}q.lora_B.weight"] = torch.zeros(6, 2)
    assert check_tensors(config, header()) == {"layers.0.q": 2, "layers.0.v": 4}


def test_magnitudes_of_older_peft() -> None:
    tensors = lora_file(**DORA)
    wanted = {name: tensors[f"{PREFIX}{name}.lora_magnitude_vector"] for name in "qv"}
    for name in "qv":
        tensors[f"{PREFIX}{name}.lora_magnitude_vector.weight"] = tensors.pop(f"{PREFIX}{name}.lora_magnitude_vector")
    adapter = parse_adapter(config_json(**DORA), save(tensors))
    for name in "qv":
        magnitude = adapter.modules[f"layers.0.{name}"].magnitude
        assert magnitude is not None
        assert torch.equal(magnitude, wanted[name])


def test_a_truncated_file() -> None:
    data = save(lora_file())
    for length in (0, 7, 8, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(CheckpointError):
            parse_adapter(config_json(), data[:length])


@pytest.mark.parametrize("padding", range(9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_the_librarys_wherever_the_header_ends(padding: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    data = save({key: value.to(dtype) for key, value in lora_file().items()})
    length = int.from_bytes(data[:8], "little")
    data = (length + padding).to_bytes(8, "little") + data[8 : 8 + length] + b" " * padding + data[8 + length :]
    wanted, memory = load(data), bytearray(data)
    for weights in (data, memoryview(memory)):
        for name, part in parse_adapter(config_json(), weights).modules.items():
            assert torch.equal(part.lora_A, wanted[f"base_model.model.{name}.lora_A.weight"])
            assert torch.equal(part.lora_B, wanted[f"base_model.model.{name}.lora_B.weight"])
    assert data == memory, "reading changes nothing"


@pytest.mark.parametrize(
    ("names", "error", "code"),
    [
        ([], CheckpointError, "adapter_file_invalid"),
        ([WEIGHTS_NAME], CheckpointError, "adapter_file_invalid"),
        (["adapter_config.json"], CheckpointError, "adapter_file_invalid"),
        (["adapter_config.json", "adapter_model.bin"], UnsupportedError, "adapter_pickle"),
    ],
    ids=str,
)
def test_folders_without_the_two_files(names: list[str], error: type[LoraError], code: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(config_json())
    with pytest.raises(error) as caught:
        load_adapter(tmp_path)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("settings", "embeddings"),
    [
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, "auto"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "final_layer_norm"]}, False),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, False),
        ({"target_modules": ["q_proj"], "bias": "all"}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}, False),
    ],
    ids=str,
)
def test_more_than_lora_and_back(settings: dict[str, Any], embeddings: bool | str, seed: int, tmp_path: Path) -> None:
    model = peft_adapters.peft_model(tiny_model("opt", seed), "opt", seed, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    adapter = load_adapter(tmp_path)
    save_adapter(adapter, tmp_path / "after")
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path, tmp_path / "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert adapter.num_bytes == sum(value.numel() * value.element_size() for value in before.values())


@pytest.mark.parametrize(("settings", "embeddings"), [({"target_modules": ["q_proj"]}, True)], ids=str)
def test_a_base_embedding_that_is_not_targeted_is_refused(
    settings: dict[str, Any], embeddings: bool | str, seed: int, tmp_path: Path
) -> None:
    model = peft_adapters.peft_model(tiny_model("opt", seed), "opt", seed, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    with pytest.raises(UnsupportedError):
        load_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("settings", "part"),
    [({}, "lora_A.weight"), ({}, "lora_B.weight"), (BIAS, "lora_B.bias"), (DORA, "lora_magnitude_vector")],
)
def test_values_that_are_not_finite(settings: dict[str, Any], part: str, value: float) -> None:
    tensors = lora_file(**settings)
    assert non_finite_tensor(parse_adapter(config_json(**settings), save(tensors))) is None
    tensors[f"{PREFIX}v.{part}"].view(-1)[-1] = value
    assert non_finite_tensor(parse_adapter(config_json(**settings), save(tensors))) == "layers.0.v"
