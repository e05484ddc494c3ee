"""LoraModel: a base model with adapters in it, under PEFT's method names."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.adapter_module import AdapterModule
from lora_core.checkpoint import read_adapter, write_adapter
from lora_core.config import LoraConfig
from lora_core.convert import subtract_mutated_init, subtracted_config
from lora_core.errors import AdapterNotFoundError, ConfigError, UnsupportedError
from lora_core.inject import inject, replicate_layers, unwrap
from lora_core.layer import LoraLayer
from lora_core.loading import fill_adapter, plain_adapter
from lora_core.merging import merge_adapters, unmerge_adapters
from lora_core.routing import Route, Router, Run
from lora_core.state import KEY_PREFIX, adapter_state, base_embeddings
from lora_core.targets import with_default_targets
from lora_core.weighted import add_weighted_adapter
from lora_core.weights import AdapterWeights, LoraTensors

__all__ = ["BASE_NAME", "LoraModel"]

# In `adapter_names`, a row that wants no adapter.
BASE_NAME = "__base__"

RowAdapters = str | Sequence[str] | Mapping[str, float]


class LoraModel(nn.Module):
    """A base model with trainable adapters, changed in place.

    The base model applies the active adapters wherever it is called, as under PEFT. Several active adapters are the
    weighted sum of their weight changes, in whatever order; PEFT gives a DoRA adapter the result of those before it.

    Args:
        model: any module with layers that can carry adapters.
        config: of the first adapter, or one per adapter by name, or None to add adapters later.
        adapter_name: the name of the first one.

    Attributes:
        layers: the modules with LoRA by their names in the base model, for parameters by those of the file.
        peft_config: configuration by adapter name.
        active_adapters: names of the adapters that apply, each with weight 1.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | Mapping[str, LoraConfig] | None = None,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        self.model = model
        self.router = Router()
        self.layers: dict[str, LoraLayer] = {}
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        self.parts: dict[str, dict[str, AdapterModule]] = {}
        self._is_enabled = True
        self._replication: tuple[tuple[int, int], ...] | None = None
        self.requires_grad_(False)
        configs = config if isinstance(config, Mapping) else {} if config is None else {adapter_name: config}
        for name, one in configs.items():
            self.add_adapter(name, one)
        if configs:
            first = next(iter(configs))
            self.set_adapter(first, inference_mode=configs[first].inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    # Running.

    def forward(self, *args: Any, adapter_names: Sequence[RowAdapters] | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            adapter_names: one entry per row of the batch: a name, "__base__", a list of names, or weights by name.
                DoRA, whole modules and embeddings included, which PEFT refuses. By default every row has the active
                adapters.

        Raises:
            AdapterNotFoundError, ConfigError: a name does not exist, or there is not one for each row.
            UnsupportedError: adapters are merged, or training checkpoints gradients.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        with self._rows(adapter_names, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[RowAdapters] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`, with `adapter_names` as in `forward`; rows may be repeated for beams."""
        generate = cast(Any, self.model).generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self._rows(adapter_names, args, kwargs):
            return generate(*args, **kwargs)

    @contextmanager
    def _rows(
        self, adapter_names: Sequence[RowAdapters], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if inputs is not None and len(inputs) != len(adapter_names):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(inputs)} respectively."
            )
        if self.merged_adapters:
            raise UnsupportedError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise UnsupportedError(
                "`adapter_names` cannot be used under gradient checkpointing: rows would be forgotten"
            )
        rows = [_weights(row) for row in adapter_names]
        unknown = {name for row in rows for name in row} - set(self.peft_config)
        if unknown:
            raise AdapterNotFoundError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        with self.router.use(Route(Run(row, 1) for row in rows)):
            yield

    # Adapters come and go.

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Create an adapter's parameters; the active adapters stay as they are.

        Raises:
            ConfigError: the name is taken or holds a dot, or the configuration contradicts itself.
            TargetError: the configuration matches nothing in the model.
        """
        self._add(adapter_name, config, starting_values=True)

    def _add(self, name: str, config: LoraConfig, *, starting_values: bool) -> None:
        if name in self.peft_config:
            raise ConfigError(f"Adapter with name '{name}' already exists.")
        if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise ConfigError("adapter names may not be empty, contain a dot or be an attribute of nn.ModuleDict")
        if self.merged_adapters:
            raise UnsupportedError("adapters are merged: call `unmerge_adapter` before adding another")
        self._replicate(config)
        config = with_default_targets(config, self.model)
        try:
            parts = inject(self.model, self.router, config, name, starting_values=starting_values)
        except BaseException:
            for module in self.model.modules():
                if isinstance(module, AdapterModule):
                    module.delete(name)
            unwrap(self.model, only_empty=True)
            raise
        self.parts[name], self.peft_config[name] = parts, config
        self.layers |= {key: module for key, module in parts.items() if isinstance(module, LoraLayer)}
        self._freeze(name, trainable=False)

    def _replicate(self, config: LoraConfig) -> None:
        if config.layer_replication == self._replication or config.layer_replication is None:
            return
        if self.peft_config or self._replication is not None:
            raise ConfigError("`layer_replication` must be that of the model's first adapter")
        replicate_layers(self.model, config.layer_replication)
        self._replication = config.layer_replication

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it alone was active, the first of those that are left becomes active, as in PEFT.

        Raises:
            AdapterNotFoundError: it does not exist.
            UnsupportedError: it is merged.
        """
        self._require(adapter_name)
        if adapter_name in self.merged_adapters:
            raise UnsupportedError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        for module in self.parts.pop(adapter_name).values():
            module.delete(adapter_name)
        del self.peft_config[adapter_name]
        self.layers = {key: layer for key, layer in self.layers.items() if any(key in p for p in self.parts.values())}
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name] or sorted(self.peft_config)[:1]
            self.set_adapter(left)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, active, and trainable unless `inference_mode`; merged ones are unmerged.

        Raises:
            AdapterNotFoundError: one does not exist.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._require(name)
        self.unmerge_adapter()
        self.active_adapters = names
        for name in self.peft_config:
            self._freeze(name, trainable=name in names and not inference_mode)
        self._apply_active()

    def enable_adapter_layers(self) -> None:
        """Apply the active adapters again; what is trainable stays as it was (PEFT makes all active ones trainable)."""
        self._is_enabled = True
        self._apply_active()

    def disable_adapter_layers(self) -> None:
        """Be the base model until `enable_adapter_layers`; merged adapters are unmerged. Trained biases are off too."""
        self.unmerge_adapter()
        self._is_enabled = False
        self._apply_active()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model within a block."""
        before = self._is_enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    def _apply_active(self) -> None:
        active = self.active_adapters if self._is_enabled else []
        self.router.default = Route.uniform(dict.fromkeys(active, 1.0)) if active else None

    def _freeze(self, name: str, *, trainable: bool) -> None:
        for module in self.parts[name].values():
            for parameter in module.state(name).values():
                if parameter.is_floating_point() and isinstance(parameter, nn.Parameter):
                    parameter.requires_grad_(trainable)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Combine adapters into a new one; options and errors as in `lora_core.weighted.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    # Merging.

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters whose change is in the base weights at the moment."""
        return next((m.merged_adapters for m in self._modules_with_adapters() if m.merged_adapters), [])

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, progressbar: bool = False
    ) -> None:
        """Put adapters, by default the active ones, into the base weights; the originals are kept.

        Raises:
            AdapterNotFoundError: one does not exist (PEFT merges nothing, silently).
            UnsupportedError: layers are replicated, so that one weight would take several changes.
            LoraError: `safe_merge`, and a merged weight is NaN or infinite; nothing is merged then.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self._require(name)
        if self._replication is not None:
            raise UnsupportedError("Cannot merge LORA layers when base model layers are replicated")
        report = _show_progress if progressbar else None
        merge_adapters(list(self._modules_with_adapters()), names, safe=safe_merge, report=report)

    def unmerge_adapter(self) -> None:
        """Put the original base weights back, bit for bit."""
        unmerge_adapters(self._modules_with_adapters())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with adapters, by default the active ones, in its weights and no trace of this package left.

        A weight that was tied to another one and got a change of its own is its own from then on, and the model's
        configuration says so; PEFT adds the change to both.

        Raises: as `merge_adapter`.
        """
        self.merge_adapter(adapter_names, safe_merge, progressbar=progressbar)
        return self._unload()

    def unload(self) -> nn.Module:
        """The base model as it was (PEFT leaves the copies of `modules_to_save` in it)."""
        self.unmerge_adapter()
        return self._unload()

    def _unload(self) -> nn.Module:
        unwrap(self.model)
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False) and not _embeddings_are_tied(self.model):
            config.tie_word_embeddings = False
        self.parts, self.layers, self.peft_config, self.active_adapters = {}, {}, {}, []
        self.router.default = None
        return self.model

    def _modules_with_adapters(self) -> Iterator[AdapterModule]:
        return (module for module in self.model.modules() if isinstance(module, AdapterModule))

    # Files.

    def adapter_weights(self, adapter_name: str = "default") -> AdapterWeights:
        """The adapter's LoRA parameters by module, as matrices."""
        self._require(adapter_name)
        modules: dict[str, LoraTensors] = {}
        for key, layer in self.parts[adapter_name].items():
            if isinstance(layer, LoraLayer) and layer.has_factors(adapter_name):
                modules[key] = layer.tensors(adapter_name)
        return AdapterWeights(self.peft_config[adapter_name], modules, base_embeddings(self, adapter_name))

    def save_pretrained(
        self,
        folder: str | Path,
        adapter_name: str = "default",
        *,
        dtype: torch.dtype | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
    ) -> None:
        """Write a PEFT adapter folder (into `folder` itself, whatever the adapter's name).

        Args:
            dtype: of the tensors in the file; the parameters' own by default.
            path_initial_model_for_weight_conversion: the adapter as it was before training, if its initialisation
                changed the base (PiSSA, OLoRA, …): what is written is then a plain LoRA of the original base.

        Raises:
            AdapterNotFoundError: it does not exist.
            CheckpointError: the initial adapter is not one of this adapter.
        """
        self._require(adapter_name)
        config, state = self.peft_config[adapter_name], adapter_state(self, adapter_name)
        if path_initial_model_for_weight_conversion is not None:
            state = subtract_mutated_init(state, read_adapter(path_initial_model_for_weight_conversion)[1])
            config = subtracted_config(config)
        write_adapter(config, state, folder, dtype=dtype)

    def subtract_mutated_init(self, output_state_dict: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
        """A trained adapter's state dict minus an initial adapter of this model; see `lora_core.convert`.

        Args:
            output_state_dict: keys with or without PEFT's prefix, as those of the result.
            adapter_name: of the initial adapter.
        """
        self._require(adapter_name)
        initial = adapter_state(self, adapter_name, with_base=False)
        if any(key.startswith(KEY_PREFIX) for key in output_state_dict):
            initial = {KEY_PREFIX + key: tensor for key, tensor in initial.items()}
        return subtract_mutated_init(output_state_dict, initial)

    def load_adapter(self, folder: str | Path, adapter_name: str = "default") -> None:
        """Add an adapter from a PEFT folder; inactive until `set_adapter`. The base weights never change.

        An adapter that was trained on a base changed by "pissa" or "olora" becomes a plain one of twice the rank on the
        way in; PEFT changes the base instead, for all adapters.

        Raises:
            LoraError: the folder is no valid adapter, or does not fit the model, which is as it was then; or it was
                trained on a base that cannot be computed again (code `adapter_needs_conversion`).
        """
        config, tensors = plain_adapter(self, *read_adapter(folder))
        self._add(adapter_name, replace(config, inference_mode=False), starting_values=False)
        try:
            fill_adapter(self, adapter_name, tensors)
        except BaseException:
            self.delete_adapter(adapter_name)
            unwrap(self.model, only_empty=True)
            raise

    def _require(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterNotFoundError(f"Adapter {name} does not exist")


def _show_progress(done: int, total: int) -> None:
    print(f"\rmerged {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)  # noqa: T201


def _weights(row: RowAdapters) -> dict[str, float]:
    if isinstance(row, Mapping):
        return dict(row)
    names = [row] if isinstance(row, str) else list(row)
    return {name: 1.0 for name in names if name != BASE_NAME}


def _embeddings_are_tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is None or head.weight is table.weight
