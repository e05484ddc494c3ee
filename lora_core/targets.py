"""Which modules of a base model an adapter targets, and with which rank and scaling.

The rules are PEFT's (`check_target_module_exists`): a list matches whole names or dotted suffixes, a string is a
regular expression over the whole name, "all-linear" is every linear layer but the output embedding.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.layer import LoraLinear, is_linear
from lora_core.patterns import MAX_CONFIG_S, Allowance, BoundedPattern

__all__ = ["DEFAULT_TARGETS", "Target", "match_targets", "output_embedding_name", "resolve_targets"]

ALL_LINEAR = "all-linear"
# The first layer index in a name, as PEFT finds it without `layers_pattern`: it needs a part before it.
LAYER_INDEX = re.compile(r"\.[^.]*\.(\d+)\.")

# PEFT's defaults for `target_modules=None`, by `config.model_type`, and two models more.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = (
    dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3"),
        ("q_proj", "v_proj"),
    )
    | dict.fromkeys(("bloom", "falcon", "gpt_neox"), ("query_key_value",))
    | {
        "gpt2": ("c_attn",),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "phi3": ("qkv_proj",),
        "starcoder2": ("q_proj", "v_proj"),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """One targeted module: its dotted name in the base model, its rank, and the factor of B·A."""

    name: str
    r: int
    scaling: float


def output_embedding_name(model: nn.Module) -> str | None:
    """Dotted name of the module that `model.get_output_embeddings()` returns, if there is one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def resolve_targets(config: LoraConfig, model: nn.Module) -> list[Target]:
    """The modules of `model` that `config` targets, in `named_modules` order.

    Raises:
        TargetError: nothing matches, or a match is no linear layer.
        ConfigError: a regular expression of the config is malformed or takes too long.
    """
    modules = dict(_own_modules(model))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head = output_embedding_name(model)
        names = [name for name, module in modules.items() if is_linear(module) and name != head]
        names = _excluded(config, names)
    else:
        names = _matching(_with_default(config, model), modules)
        wrong = next((name for name in names if not is_linear(modules[name])), None)
        if wrong is not None:
            raise TargetError(
                f"Target module {type(modules[wrong]).__name__} ({wrong!r}) is not supported: it is no linear layer."
            )
    if not names:
        raise TargetError(
            f"Target modules {config.target_modules} not found in the base model. "
            "Please check the target modules and try again."
        )
    return match_targets(config, names)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without what is inside wrapped layers."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            inside = f"{name}." if isinstance(module, LoraLinear) else None
            yield name, module


def match_targets(config: LoraConfig, names: Iterable[str]) -> list[Target]:
    """Rank and scaling of each named module: the first matching key of each pattern wins, else `r` and `lora_alpha`."""
    together = Allowance(MAX_CONFIG_S)
    ranks = [(BoundedPattern.of_suffix(key, together), r) for key, r in config.rank_pattern.items()]
    alphas = [(BoundedPattern.of_suffix(key, together), alpha) for key, alpha in config.alpha_pattern.items()]
    out = []
    for name in names:
        r = next((value for pattern, value in ranks if pattern.fullmatch(name)), config.r)
        alpha = next((value for pattern, value in alphas if pattern.fullmatch(name)), config.lora_alpha)
        out.append(Target(name, r, config.scaling(r, alpha)))
    return out


def _with_default(config: LoraConfig, model: nn.Module) -> LoraConfig:
    if config.target_modules is not None:
        return config
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise TargetError(f"Please specify `target_modules`: there is no default for model type {model_type!r}")
    return replace(config, target_modules=DEFAULT_TARGETS[model_type])


def _matching(config: LoraConfig, names: Iterable[str]) -> list[str]:
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
