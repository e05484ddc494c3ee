"""What of a base model an adapter touches: modules with LoRA, parameters, whole modules, embedding rows, biases.

The rules are PEFT's (`check_target_module_exists`): a list matches whole names or dotted suffixes, a string is a
regular expression over the whole name, "all-linear" is every linear layer but the output embedding. Names are those of
the model as it was before any adapter came.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lora_core.adapter_module import base_of
from lora_core.config import LoraConfig
from lora_core.conv import is_conv
from lora_core.errors import ConfigError, TargetError
from lora_core.layer import is_linear
from lora_core.megatron import is_parallel_linear
from lora_core.patterns import MAX_CONFIG_S, Allowance, BoundedPattern

__all__ = [
    "DEFAULT_TARGETS",
    "Parts",
    "Target",
    "match_names",
    "match_targets",
    "output_embedding_name",
    "resolve",
    "resolve_targets",
    "with_default_targets",
]

ALL_LINEAR = "all-linear"
# What PEFT writes for an adapter that has nothing but whole modules.
NO_TARGETS = ((), "dummy-target-modules")
# The first layer index in a name, as PEFT finds it without `layers_pattern`: it needs a part before it.
LAYER_INDEX = re.compile(r"\.[^.]*\.(\d+)\.")

# PEFT's defaults for `target_modules=None`, by targets; the keys of DEFAULT_TARGETS are `config.model_type`.
MODEL_TYPES: dict[tuple[str, ...] | str, str] = {
    ("q_proj", "v_proj"): "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
    "stablelm starcoder2",
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("q", "v"): "mt5 t5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("qkv_proj",): "codegen phi3",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
DEFAULT_TARGETS = {name: targets for targets, names in MODEL_TYPES.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Target:
    """One targeted module or parameter: its dotted name in the base model, its rank, its alpha, the factor of B·A."""

    name: str
    r: int
    scaling: float
    lora_alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an adapter touches.

    Attributes:
        modules: modules with LoRA, in `named_modules` order.
        parameters: parameters with LoRA, in the order in which their modules register them.
        whole: modules of which the adapter has its own copy.
        tokens: token ids whose rows it replaces, by module.
        biases: modules whose bias it trains.
    """

    modules: list[Target] = field(default_factory=list)
    parameters: list[Target] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)


def output_embedding_name(model: nn.Module) -> str | None:
    """Dotted name of the module that `model.get_output_embeddings()` returns, if there is one."""
    return _embedding_name(model, "get_output_embeddings")


def _embedding_name(model: nn.Module, getter: str) -> str | None:
    get = getattr(model, getter, None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # transformers' base class has the method, not every model an answer
        return None
    return None if found is None else next((name for name, module in _own_modules(model) if module is found), None)


def resolve(config: LoraConfig, model: nn.Module) -> Parts:
    """Everything of `model` that `config` touches.

    Raises:
        TargetError: a part is not there, or nothing is.
        ConfigError: a regular expression of the config is malformed or takes too long, or parts contradict each other.
    """
    modules = dict(_own_modules(model))
    whole = _whole(config, modules)
    tokens = _tokens(config, model, modules)
    parameters = _parameters(config, modules)
    has_more = bool(whole or tokens or parameters)
    targets = [] if config.target_modules in NO_TARGETS and has_more else resolve_targets(config, model)
    if not targets and not has_more:
        raise TargetError("No `target_modules` passed but also no `target_parameters` found. Please check the values.")
    names = {target.name for target in targets}
    twice = next((name for name in tokens if name in whole or name in names), None)
    if twice is not None:
        raise ConfigError(f"{twice!r} is trained in part by `trainable_token_indices` and in another way as well")
    return Parts(targets, parameters, whole, tokens, _biases(config, modules, names, whole))


def resolve_targets(config: LoraConfig, model: nn.Module) -> list[Target]:
    """The modules of `model` with LoRA, in `named_modules` order; errors as in `resolve`."""
    modules = dict(_own_modules(model))
    whole = _whole(config, modules)
    candidates = [name for name in modules if not any(name == w or name.startswith(f"{w}.") for w in whole)]
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head = output_embedding_name(model)
        names = _excluded(config, [name for name in candidates if is_linear(modules[name]) and name != head])
    else:
        config = with_default_targets(config, model)
        if config.target_modules is None and config.target_parameters:
            return []
        names = match_names(config, candidates)
        wrong = next((name for name in names if not _can_adapt(modules[name])), None)
        if wrong is not None:
            raise TargetError(
                f"Target module {type(base_of(modules[wrong])).__name__} ({wrong!r}) is not supported. Currently, "
                "only linear, embedding and convolution layers are."
            )
    if not names:
        raise TargetError(
            f"Target modules {config.target_modules} not found in the base model. "
            "Please check the target modules and try again."
        )
    return match_targets(config, names)


def _can_adapt(module: nn.Module) -> bool:
    base = base_of(module)
    return is_linear(module) or is_conv(base) or isinstance(base, nn.Embedding) or is_parallel_linear(base)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without what is inside wrapped modules, unless the base module has modules itself."""
    pending, seen = [("", model)], set()
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = list(base_of(module).named_children())
        pending += [(f"{name}.{child}" if name else child, part) for child, part in reversed(children)]


def _whole(config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """PEFT wraps whatever name ends so, without regard to dots."""
    if config.modules_to_save is None:
        return []
    found = [name for name in modules if name and name.endswith(config.modules_to_save)]
    missing = next((m for m in config.modules_to_save if not any(name.endswith(m) for name in found)), None)
    if missing is not None:
        raise TargetError(f"`modules_to_save`: there is no module {missing!r} in the base model")
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _tokens(config: LoraConfig, model: nn.Module, modules: Mapping[str, nn.Module]) -> Mapping[str, tuple[int, ...]]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        wanted = {_embedding_name(model, "get_input_embeddings") or "embed_tokens": wanted}
    out: dict[str, tuple[int, ...]] = {}
    for suffix, indices in wanted.items():
        names = [name for name in modules if _is_suffix(name, (suffix,))]
        if not names:
            raise TargetError(f"`trainable_token_indices`: there is no module {suffix!r} in the base model")
        out |= dict.fromkeys(names, indices)
    return out


def _parameters(config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[Target]:
    if not config.target_parameters:
        return []
    names = [
        f"{name}.{parameter}"
        for name, module in modules.items()
        for parameter, _ in base_of(module).named_parameters(recurse=False)
        if name
    ]
    found = [name for name in names if _is_suffix(name, config.target_parameters)]
    missing = next((t for t in config.target_parameters if not any(_is_suffix(name, (t,)) for name in found)), None)
    if missing is not None:
        raise TargetError(f"`target_parameters`: there is no parameter {missing!r} in the base model")
    return match_targets(config, found)


def _biases(config: LoraConfig, modules: Mapping[str, nn.Module], targets: set[str], whole: Iterable[str]) -> list[str]:
    if config.bias == "none":
        return []
    inside = tuple(f"{name}." for name in whole)
    return [
        name
        for name, module in modules.items()
        if isinstance(getattr(base_of(module), "bias", None), nn.Parameter)
        and (name in targets if config.bias == "lora_only" else name not in whole and not name.startswith(inside))
    ]


def match_targets(config: LoraConfig, names: Iterable[str]) -> list[Target]:
    """Rank and scaling of each named module: the first matching key of each pattern wins, else `r` and `lora_alpha`."""
    together = Allowance(MAX_CONFIG_S)
    ranks = [(BoundedPattern.of_suffix(key, together), r) for key, r in config.rank_pattern.items()]
    alphas = [(BoundedPattern.of_suffix(key, together), alpha) for key, alpha in config.alpha_pattern.items()]
    out = []
    for name in names:
        r = next((value for pattern, value in ranks if pattern.fullmatch(name)), config.r)
        alpha = next((value for pattern, value in alphas if pattern.fullmatch(name)), config.lora_alpha)
        out.append(Target(name, r, config.scaling(r, alpha), alpha))
    return out


def with_default_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with the targets that are usual for the model's architecture, if it names none.

    Raises:
        TargetError: there is no default, and nothing else to train.
    """
    if config.target_modules is not None:
        return config
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        if config.target_parameters:
            return config
        raise TargetError(
            "Please specify `target_modules` or `target_parameters` in the config: there is no default for model type "
            f"{model_type!r}"
        )
    return replace(config, target_modules=DEFAULT_TARGETS[model_type])


def match_names(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Those of the names that `target_modules`, a list or a regular expression, chooses, less the excluded ones."""
    targets = config.target_modules
    if isinstance(targets, str):
        pattern = BoundedPattern(targets)
        return _excluded(config, [name for name in names if pattern.fullmatch(name)])
    assert targets is not None
    return _excluded(config, [name for name in names if _matches_list(config, targets, name)])


def _excluded(config: LoraConfig, names: list[str]) -> list[str]:
    exclude = config.exclude_modules
    if exclude is None:
        return names
    if isinstance(exclude, str):
        pattern = BoundedPattern(exclude)
        return [name for name in names if not pattern.fullmatch(name)]
    return [name for name in names if not _is_suffix(name, exclude)]


def _is_suffix(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _matches_list(config: LoraConfig, targets: tuple[str, ...], name: str) -> bool:
    if name in targets:  # a full name bypasses layers_to_transform, as in PEFT
        return True
    if not _is_suffix(name, targets):
        return False
    return config.layers_to_transform is None or _layer_index(config, name) in config.layers_to_transform


def _layer_index(config: LoraConfig, name: str) -> int | None:
    if config.layers_pattern is None:
        found = LAYER_INDEX.search(name)
        return int(found.group(1)) if found else None
    for pattern in config.layers_pattern:
        found = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None
