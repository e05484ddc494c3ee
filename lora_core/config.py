"""LoraConfig: what `adapter_config.json` says, read strictly.

Field names, defaults and meaning are PEFT's. A field that this package knows is either honoured or refused by
name when it is set; a field that nobody here knows is refused too unless it is empty, because a setting that
changes the adapter's output and is silently dropped gives wrong text with no error.
"""

import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from lora_core.errors import CheckpointError, ConfigError, UnsupportedError

__all__ = ["CONFIG_NAME", "LoftQConfig", "LoraConfig"]

CONFIG_NAME = "adapter_config.json"
MAX_LAYERS = 1_024  # of a replicated stack: more is a mistake, or an attack

# Initialisations that leave the base model as it was: the file's A and B are a plain adapter of the base.
PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
# Initialisations that train against a *changed* base: on the original base the file gives other numbers.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Fields that change nothing here: read, never executed. The `*_config` belong to an initialisation: they stay in the
# file afterwards, and `init_lora_weights` tells what to do. Tying is a matter of training: the file holds the tensors
# of both tied modules.
INERT_FIELDS = frozenset(
    {
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "lora_ga_config",
        "peft_type",
        "peft_version",
        "runtime_config",
    }
)
# Values that PEFT writes for a feature that is off.
OFF_VALUES: dict[str, Any] = {"qalora_group_size": 16}
MEGATRON_PREFIX = "megatron."


@dataclass(frozen=True, kw_only=True)
class LoftQConfig:
    """How `init_lora_weights="loftq"` quantizes (Li et al. 2023).

    Attributes:
        loftq_bits: 2, 4 (NF4) or 8.
        loftq_iter: alternations of quantizing and factoring, 1 or more.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (2, 4, 8):
            raise ConfigError(f"LoftQ quantizes to 2, 4 or 8 bits, not {reprlib.repr(self.loftq_bits)}")
        if type(self.loftq_iter) is not int or self.loftq_iter < 1:
            raise ConfigError("`loftq_iter` must be a positive integer")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of one LoRA or DoRA adapter.

    Attributes:
        r: rank of the update, 1 or more.
        lora_alpha: the update is scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
        target_modules: names matched whole or as a dotted suffix, or one regular expression that must match
            the whole name, or "all-linear", or None for the architecture's usual targets.
        exclude_modules: same forms; wins over `target_modules`.
        layers_to_transform, layers_pattern: limit suffix targets to these layer indices.
        rank_pattern, alpha_pattern: per-module `r` and `lora_alpha`; keys are regular expressions bound to
            the end of the name at a dot.
        target_parameters: parameters (not modules) by name or dotted suffix, as the 3-D weights of MoE experts.
        modules_to_save: modules, by the end of their names, that the adapter trains as a whole copy of its own.
        trainable_token_indices: token ids whose embedding rows are trained, or such lists by module name.
        bias: "none", or which biases the adapter trains: those of its own layers ("lora_only") or "all".
        layer_replication: the decoder layers are stacked anew from these half-open ranges of the original ones.
        use_dora: weight-decomposed update with a magnitude vector per output (Liu et al. 2024).
        lora_bias: the B matrices carry a bias.
        lora_dropout: probability of zeroing an input of A, in training only.
        fan_in_fan_out: kept for the file; the layer's own type decides how its weight is stored.
        init_lora_weights: starting values; see `lora_core.init`.
        loftq_config: for `init_lora_weights="loftq"`.
        megatron_config, megatron_core: for Megatron's parallel layers; the module's name must begin with "megatron.".
        auto_mapping: read and written back, never executed.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    target_parameters: tuple[str, ...] | None = None
    layer_replication: tuple[tuple[int, int], ...] | None = None
    init_lora_weights: bool | str = True
    loftq_config: LoftQConfig | None = None
    megatron_config: Mapping[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    inference_mode: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _normalise_sequences(self)
        _normalise_full_weights(self)
        for name in ("r", "lora_alpha", "lora_dropout"):
            _check_number(name, getattr(self, name))
        if not isinstance(self.r, int) or self.r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"`lora_dropout` must be in [0, 1), not {self.lora_dropout}")
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` must be true or false, not {reprlib.repr(getattr(self, name))}")
        for name in ("task_type", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"`{name}` must be a string or null")
        if self.use_dora and self.lora_bias:
            raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        _check_patterns(self)
        _check_init(self)
        _check_megatron(self)

    @property
    def changes_base(self) -> bool:
        """The adapter was initialised by taking something out of the base weights, and is right on that base only."""
        init = self.init_lora_weights
        return isinstance(init, str) and init.lower().startswith(MUTATING_INITS)

    def require_plain(self) -> None:
        """Refuse an adapter that is wrong on the original base.

        Raises:
            UnsupportedError: code `adapter_needs_conversion`.
        """
        if self.changes_base:
            raise UnsupportedError(
                f"`init_lora_weights` is {self.init_lora_weights!r}: this adapter was trained on a changed base model "
                "and gives other results on the original one. Convert it to a plain LoRA first, with "
                "`lora_core.convert_to_lora` or PEFT's "
                "`save_pretrained(folder, path_initial_model_for_weight_conversion=initial_adapter_folder)`",
                code="adapter_needs_conversion",
            )

    def scaling(self, r: int, alpha: float) -> float:
        """Factor of B·A for a module of rank `r`: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from the contents of an `adapter_config.json`.

        Raises:
            ConfigError: a value has the wrong type or range.
            UnsupportedError: the adapter needs something that is not supported, named in the message.
        """
        peft_type = raw.get("peft_type")
        if peft_type != "LORA":
            raise UnsupportedError(
                f"`peft_type` is {reprlib.repr(peft_type)}; only LORA adapters (DoRA among them) can be used"
            )
        own = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in raw.items():
            if name in own:
                values[name] = _or_default(own[name], value)
            elif name not in INERT_FIELDS and value != OFF_VALUES.get(name) and not _is_empty(value):
                raise UnsupportedError(f"`{name}` is set in {CONFIG_NAME} and is not supported")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse an `adapter_config.json`; errors as in `from_dict`, and CheckpointError if it is no JSON object."""
        try:
            raw = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{CONFIG_NAME} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{CONFIG_NAME} must hold a JSON object")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The contents of an `adapter_config.json` that PEFT reads back as the same adapter."""
        out = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        loftq = {} if self.loftq_config is None else asdict(self.loftq_config)
        return out | {"loftq_config": loftq, "peft_type": "LORA", "inference_mode": True}

    def save(self, folder: str | Path) -> None:
        """Write `adapter_config.json` into `folder`, which must exist."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        Path(folder, CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _or_default(of: Any, value: Any) -> Any:
    """PEFT treats null as "not set" for fields whose default is something else."""
    if value is not None:
        return value
    return of.default_factory() if of.default_factory is not MISSING else of.default


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _normalise_sequences(config: LoraConfig) -> None:
    """Lists from JSON become tuples, so that a config is immutable and can be compared."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, list | tuple | set | frozenset):
            value = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
            object.__setattr__(config, name, value)
            if not all(isinstance(item, str) and item for item in value):
                raise ConfigError(f"`{name}` must hold module names")
        elif not isinstance(value, str | None):
            raise ConfigError(f"`{name}` must be a list of names, a regular expression or null")
    layers = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    if not isinstance(layers, list | tuple | None) or not all(type(i) is int and i >= 0 for i in layers or ()):
        raise ConfigError("`layers_to_transform` must hold layer indices")
    pattern = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if not isinstance(pattern, list | tuple | None) or not all(isinstance(item, str) for item in pattern or ()):
        raise ConfigError("`layers_pattern` must hold names")
    # Empty means every layer and any pattern, as in PEFT.
    object.__setattr__(config, "layers_to_transform", tuple(layers) if layers else None)
    object.__setattr__(config, "layers_pattern", tuple(item for item in pattern or () if item) or None)


def _normalise_full_weights(config: LoraConfig) -> None:
    """The fields that name whole modules, parameters, rows and layers."""
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(config, name)
        if value is not None:
            if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) and v for v in value):
                raise ConfigError(f"`{name}` must be a list of names")
            object.__setattr__(config, name, tuple(sorted(value) if isinstance(value, set) else value) or None)
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        named = {str(name): _token_ids(ids) for name, ids in tokens.items()}
        object.__setattr__(config, "trainable_token_indices", named or None)
    elif tokens is not None:
        object.__setattr__(config, "trainable_token_indices", _token_ids(tokens) or None)
    if config.bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"Requested bias: {reprlib.repr(config.bias)}, is not implemented.")
    _normalise_replication(config)
    if not isinstance(config.loftq_config, LoftQConfig | Mapping | None):
        raise ConfigError("`loftq_config` must be a mapping")
    if not isinstance(config.auto_mapping, Mapping | None):
        raise ConfigError("`auto_mapping` must be a mapping")
    if isinstance(config.loftq_config, Mapping):
        given = dict(config.loftq_config)
        unknown = set(given) - {"loftq_bits", "loftq_iter"}
        if unknown:
            raise ConfigError(f"`loftq_config` has an unknown entry {min(unknown)!a}")
        object.__setattr__(config, "loftq_config", LoftQConfig(**given) if given else None)


def _normalise_replication(config: LoraConfig) -> None:
    ranges = config.layer_replication
    if ranges is None:
        return
    if not isinstance(ranges, list | tuple) or not all(_is_range(r) for r in ranges):
        raise ConfigError("`layer_replication` must be a list of [start, end) pairs of layer indices")
    if sum(end - start for start, end in ranges) > MAX_LAYERS:
        raise ConfigError(f"`layer_replication` makes more than {MAX_LAYERS} layers")
    object.__setattr__(config, "layer_replication", tuple((r[0], r[1]) for r in ranges) or None)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(i) is int and i >= 0 for i in value)
        and value[0] < value[1]
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(i) is int and i >= 0 for i in value):
        raise ConfigError("`trainable_token_indices` must hold token ids")
    if len(set(value)) != len(value):
        raise ConfigError("`trainable_token_indices` names a token twice")
    return tuple(value)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"`{name}` must be a finite number, not {reprlib.repr(value)}")


def _check_patterns(config: LoraConfig) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"`{name}` must map names to numbers")
        for number in value.values():
            _check_number(name, number)
    if any(not isinstance(r, int) or r <= 0 for r in config.rank_pattern.values()):
        raise ConfigError("`r` should be a positive integer value in every entry of `rank_pattern`")
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform is not None or config.layers_pattern is not None
    ):
        raise ConfigError("`layers_to_transform` and `layers_pattern` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_init(config: LoraConfig) -> None:
    init = config.init_lora_weights
    if isinstance(init, bool):
        return
    if not isinstance(init, str):
        raise ConfigError(f"`init_lora_weights` must be true, false or a name, not {reprlib.repr(init)}")
    if init.lower() not in PLAIN_INITS and not config.changes_base:
        raise ConfigError(f"Unknown initialization init_lora_weights={reprlib.repr(init)}")
    if init.lower() == "loftq" and config.loftq_config is None:
        raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")


def _check_megatron(config: LoraConfig) -> None:
    if config.megatron_config is None:
        return
    if not isinstance(config.megatron_config, Mapping):
        raise ConfigError("`megatron_config` must be a mapping")
    if not isinstance(config.megatron_core, str) or not config.megatron_core.startswith(MEGATRON_PREFIX):
        raise ConfigError(f"`megatron_core` must name a module that begins with '{MEGATRON_PREFIX}'")
    if config.use_dora:
        raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
