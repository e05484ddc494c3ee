"""LoftQ: the quantizers are bitsandbytes', the factors PEFT's, and every residual shrinks."""

import inspect
import json
from pathlib import Path
from typing import Any

import peft.utils.loftq_utils
import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core import AdapterNotFoundError, CheckpointError, ConfigError, LoraConfig, LoraModel, TargetError
from lora_core.loftq import fake_quantize, loftq, low_rank
from lora_core.loftq_replace import replace_lora_weights_loftq
from lora_core.quant import dequantized_weight
from lora_core.tensor_folder import TensorFolder, find_weight
from tests.quantized import quantized_model
from tests.tiny_models import tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj", "gate_proj"]


def peft_on_cpu(name: str) -> Any:
    """One of PEFT's LoftQ functions, computing on the CPU: it insists on a literal "cuda"."""
    namespace = dict(vars(peft.utils.loftq_utils))
    source = inspect.getsource(namespace[name]).replace('"cuda"', '"cpu"')
    exec(source, namespace)
    return namespace[name]


@pytest.mark.parametrize("shape", [(48, 128), (17, 33)], ids=str)
def test_the_quantizers_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    assert torch.equal(fake_quantize(weight, 4), bnb.dequantize_4bit(packed, state))
    rows, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    torch.testing.assert_close(
        fake_quantize(weight, 8), bnb.int8_vectorwise_dequant(rows, scales), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    assert torch.equal(fake_quantize(torch.zeros(3, 70), bits), torch.zeros(3, 70))


def size(tensor: Tensor) -> float:
    return tensor.norm().item()


def test_two_bits_have_four_levels_a_block() -> None:
    weight = torch.randn(8, 64)
    quantized = fake_quantize(weight, 2)
    for row, block in zip(quantized, weight, strict=True):
        levels = row.unique() / block.abs().max()
        assert len(levels) <= 4
        assert levels.abs().max() <= 1
        assert 0 in levels
    errors = [size(weight - fake_quantize(weight, bits)) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("num_iterations", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_starting_values_equal_peft(bits: int, num_iterations: int) -> None:
    weight = torch.randn(64, 128)
    quantized, lora_a, lora_b = peft_on_cpu("loftq_init")(weight, bits, 6, num_iterations)
    found = loftq(weight, bits, 6, 1.0, num_iterations)
    residual = weight - quantized - lora_b @ lora_a
    own = weight - found.quantized - found.lora_B @ found.lora_A
    assert size(own) == pytest.approx(size(residual), rel=1e-3)
    if num_iterations == 1:  # later a value at a border may round the other way
        torch.testing.assert_close(found.quantized, quantized, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.lora_B @ found.lora_A, lora_b @ lora_a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scaling", [2.0, 0.5, -1.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scaled_factors_give_back_the_most_of_what_was_lost(bits: int, scaling: float) -> None:
    weight = torch.randn(48, 128)
    plain = size(weight - fake_quantize(weight, bits))
    for num_iterations in (1, 3, 5):
        out = loftq(weight, bits, 16, scaling, num_iterations)
        left = size(weight - out.quantized - scaling * out.lora_B @ out.lora_A)
        assert left < plain
        best = size(torch.linalg.svdvals(weight - out.quantized)[16:])
        assert left == pytest.approx(best, rel=1e-4)


def test_a_rank_above_the_weight_s_own_is_filled_up() -> None:
    residual = torch.randn(3, 5)
    lora_a, lora_b = low_rank(residual, 8, 2.0)
    assert (lora_a.shape, lora_b.shape) == ((8, 5), (3, 8))
    torch.testing.assert_close(2.0 * lora_b @ lora_a, residual)


def test_wrong_numbers_are_named() -> None:
    for bits in (3, 16):
        with pytest.raises(ConfigError, match=f"not {bits}"):
            loftq(torch.randn(4, 4), bits, 2, 1.0)
    with pytest.raises(ConfigError, match="greater than 0"):
        loftq(torch.randn(4, 4), 4, 2, 1.0, 0)


# Replacing the weights of adapters on a quantized model.


def save_model(model: Any, folder: Path, rename: Any = lambda key: key, num_shards: int = 1) -> Path:
    folder.mkdir()
    tensors = {rename(key): value.contiguous() for key, value in model.state_dict().items()}
    keys = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(num_shards):
        name = f"model-{i}.safetensors"
        save_file({key: tensors[key] for key in keys[i::num_shards]}, folder / name)
        index |= dict.fromkeys(keys[i::num_shards], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def on_quantized(base: Any, kind: str = "nf4", **config: Any) -> LoraModel:
    config = {"r": 6, "lora_alpha": 15, "target_modules": TARGETS} | config
    return LoraModel(quantized_model(base, kind), LoraConfig(**config)).eval()


def residuals(model: LoraModel, base: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every module: what quantizing took, and what is still missing with the adapter."""
    out = {}
    for name, layer in model.layers.items():
        lost = base.get_submodule(name).weight.detach() - dequantized_weight(layer.base_layer)
        out[name] = (lost, lost - layer.delta_matrix("default").detach())
    return out


@pytest.mark.parametrize(
    "variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 3}}], ids=str
)
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_replaced_weights_shrink_every_residual(kind: str, variant: dict[str, Any], seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    model = on_quantized(base, kind, **variant)
    replace_lora_weights_loftq(model, save_model(base, tmp_path / "base"))
    for name, (lost, left) in residuals(model, base).items():
        rank = model.layers[name].tensors("default").rank
        assert size(left) == pytest.approx(size(torch.linalg.svdvals(lost)[rank:]), rel=1e-3), name
        assert size(left) < 0.95 * size(lost)


def test_factors_equal_peft_where_alpha_is_r(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    model = on_quantized(base, lora_alpha=6)
    replace_lora_weights_loftq(model, save_model(base, tmp_path / "base"))
    for name, layer in model.layers.items():
        weight = base.get_submodule(name).weight.detach()
        lora_a, lora_b = peft_on_cpu("_loftq_init_new")(layer.base_layer.weight, weight, num_bits=4, reduced_rank=6)
        part = layer.tensors("default")
        torch.testing.assert_close(part.lora_B @ part.lora_A, lora_b @ lora_a, rtol=1e-3, atol=1e-4)


def test_a_simulated_two_bit_base(seed: int) -> None:
    base = tiny_model("llama", seed)
    for bits in (2, 4):
        for module in base.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach()
                out = loftq(weight, bits, 8, 0.5, 5)
                left = weight - out.quantized - 0.5 * out.lora_B @ out.lora_A
                assert size(left) < 0.9 * size(weight - fake_quantize(weight, bits))


LAYOUTS: dict[str, Any] = {
    "same": lambda key: key,
    "without the prefix": lambda key: key.removeprefix("model."),
    "old names": lambda key: key.replace("model.layers", "model.language_model.layers"),
}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_files_is_found(layout: str, num_shards: int, seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    wanted, found = on_quantized(base), on_quantized(base)
    replace_lora_weights_loftq(wanted, save_model(base, tmp_path / "plain"))
    found.model._checkpoint_conversion_mapping = {r"^model\.language_model": "model"} if layout == "old names" else {}
    replace_lora_weights_loftq(found, save_model(base, tmp_path / "other", LAYOUTS[layout], num_shards))
    for name, layer in found.layers.items():
        for one, other in zip(
            layer.tensors("default").tensors(), wanted.layers[name].tensors("default").tensors(), strict=True
        ):
            assert torch.equal(one, other)


def test_a_model_without_the_prefix_reads_a_checkpoint_with_it(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    inner = LoraModel(quantized_model(base.model, "nf4"), LoraConfig(r=4, target_modules=TARGETS))
    replace_lora_weights_loftq(inner, save_model(base, tmp_path / "base") / "model.safetensors")
    lost = base.model.layers[0].self_attn.q_proj.weight - dequantized_weight(
        inner.layers["layers.0.self_attn.q_proj"].base_layer
    )
    left = lost - inner.layers["layers.0.self_attn.q_proj"].delta_matrix("default")
    assert size(left) < 0.95 * size(lost)


def test_where_the_model_came_from_is_the_default(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    model = on_quantized(base)
    with pytest.raises(CheckpointError, match="model_path"):
        replace_lora_weights_loftq(model)
    model.model.config._name_or_path = str(save_model(base, tmp_path / "base"))
    replace_lora_weights_loftq(model)
    assert all(size(left) < size(lost) for lost, left in residuals(model, base).values())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_refused_module_comes_back_bit_for_bit(use_dora: bool, seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    folder = save_model(base, tmp_path / "base")
    model = on_quantized(base, use_dora=use_dora)
    before, seen = state(model), []

    def refuse(given: Any, name: str) -> bool:
        assert given is model
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if f"{name}.lora_" in n)
        seen.append(name)
        return False

    replace_lora_weights_loftq(model, folder, callback=refuse)
    assert seen == list(model.layers)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())

    replace_lora_weights_loftq(model, folder, callback=lambda _, name: "q_proj" in name)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".q_proj." in name for name in changed)


def test_any_error_puts_every_module_back(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    model = on_quantized(base)
    before, seen = state(model), []

    def interrupt(_: Any, name: str) -> bool:
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        replace_lora_weights_loftq(model, save_model(base, tmp_path / "base"), callback=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.q" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(TargetError, match=r"layers.1.self_attn.q_proj"):  # found missing after others were replaced
        replace_lora_weights_loftq(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_what_is_missing_is_named(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    model = on_quantized(base)
    with pytest.raises(AdapterNotFoundError, match="zz"):
        replace_lora_weights_loftq(model, tmp_path, "zz")
    with pytest.raises(CheckpointError, match="Could not find file"):
        replace_lora_weights_loftq(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        replace_lora_weights_loftq(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for index, match in (("{", "malformed"), ('{"weight_map": {"a": "b.safetensors"}}', "not there")):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=match):
            replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(TargetError, match="No bnb LoRA module"):
        replace_lora_weights_loftq(LoraModel(base, LoraConfig(target_modules=TARGETS)), tmp_path)


def test_only_the_tensors_that_are_asked_for_are_read(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2), "b.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    tensors = TensorFolder(tmp_path)
    assert set(tensors) == {"a.weight", "b.weight"}
    assert len(tensors) == 2
    assert torch.equal(find_weight(tensors, "a"), torch.ones(2))
    with pytest.raises(TargetError, match=r"no weight of module 'c'; looked for \['c.weight', 'model.c.weight'\]"):
        find_weight(tensors, "c", prefix="model")


def test_half_precision_is_factored_in_float32() -> None:
    out = loftq(torch.randn(64, 64).bfloat16(), 4, 4, 1.0)
    assert (out.quantized.dtype, out.lora_A.dtype) == (torch.bfloat16, torch.float32)
