"""Full weights of an adapter: whole modules (`modules_to_save`) and single embedding rows (`trainable_token_indices`).

They follow the same rule as the rest: the model under a mix of adapters is the base plus the weighted sum of the
adapters' changes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lora_core.adapter_module import AdapterModule, base_of
from lora_core.errors import TargetError, UnsupportedError
from lora_core.routing import Key, Router
from lora_core.rows import call_by_rows

__all__ = ["ModulesToSave", "TrainableTokens"]


class ModulesToSave(AdapterModule):
    """A module of which adapters have copies of their own, named as in PEFT.

    Attributes:
        copies: further copies by key, as a server's slots; not parameters of the model.
    """

    def __init__(self, original_module: nn.Module, router: Router, *, is_head: bool = False) -> None:
        super().__init__(router, is_head=is_head)
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.copies: dict[Any, nn.Module] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original_module"), name)

    def get_base_layer(self) -> nn.Module:
        return self.original_module

    def add_adapter(self, name: str) -> None:
        """Give the adapter a copy of the original module."""
        self.modules_to_save[name] = copy.deepcopy(base_of(self))

    @property
    def adapter_names(self) -> set[str]:
        return set(self.modules_to_save)

    def state(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.modules_to_save:
            return {}
        module = self.modules_to_save[name]
        return dict(module.named_parameters()) | cast(dict[str, nn.Parameter], dict(module.named_buffers()))

    def delete(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def merged_parameters(self, weights: Mapping[Any, float]) -> dict[str, Tensor]:
        own = [(weight, found) for key, weight in weights.items() if (found := self._values(key)) is not None]
        base = {path: self._base_value(path) for path in (own[0][1] if own else ())}
        if len(own) == 1 and own[0][0] == 1.0:
            return {path: own[0][1][path].detach().clone() for path in base if path in own[0][1]}
        return {
            path: value + sum(weight * (values[path] - value) for weight, values in own if path in values)
            for path, value in base.items()
            if own
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.route
        if route is None:
            return self.original_module(*args, **kwargs)
        return call_by_rows(self.router, route, self._knows, self._call, *args, **kwargs)

    def _base_value(self, path: str) -> Tensor:
        """A parameter, or what a packed layer gives out as one."""
        owner, _, name = path.rpartition(".")
        return cast(Tensor, getattr(base_of(self).get_submodule(owner), name))

    def _values(self, key: Any) -> Mapping[str, Tensor] | None:
        if not self._knows(key):
            return None
        return self.copies[key].state_dict() if key in self.copies else self.state(key)

    def _knows(self, key: Any) -> bool:
        return key in self.copies or (isinstance(key, str) and key in self.modules_to_save)

    def _call(self, own: Mapping[Any, float], *args: Any, **kwargs: Any) -> Any:
        """For rows that want so much of the adapters with a copy here."""
        if not own:
            return self.original_module(*args, **kwargs)
        if self.original_module is not base_of(self) and self._is_mixed_with_others(own):
            raise UnsupportedError("a mix of an adapter that trains a module whole with one that has LoRA on it")
        first = next(iter(own))
        if len(own) == 1 and own[first] == 1.0:
            return self._copy(first)(*args, **kwargs)
        return functional_call(self._copy(first), self.merged_parameters(own), args, kwargs)

    def _is_mixed_with_others(self, own: Mapping[Any, float]) -> bool:
        """Some row wants an adapter beside these."""
        return self.route is not None and any(key not in own for key in self.route.segments)

    def _copy(self, key: Any) -> nn.Module:
        return self.copies[key] if key in self.copies else self.modules_to_save[key]


class TrainableTokens(AdapterModule):
    """An embedding, or a linear layer over the vocabulary, of which adapters replace single rows.

    Args:
        base_layer: nn.Embedding or nn.Linear with weight [V, D].
        tied_to: take the rows from there: the output embedding of a model with tied weights.

    Attributes:
        trainable_tokens_delta: [n, D] the new rows (not differences; the name is PEFT's), by adapter.
        token_indices: the n token ids, by adapter.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        router: Router,
        *,
        is_head: bool = False,
        tied_to: "TrainableTokens | None" = None,
    ) -> None:
        super().__init__(router, is_head=is_head)
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, tuple[int, ...]] = {}
        self.slots: dict[Any, tuple[Tensor, Tensor]] = {}  # tokens [n], and their rows minus the base's [n, D]
        self._tied_to = [tied_to]  # in a list, so that it is no submodule

    @property
    def weight(self) -> Any:
        return cast(Any, base_of(self)).weight

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def add_adapter(self, name: str, token_indices: Sequence[int]) -> None:
        """Let the adapter train these rows, beginning with the base's.

        Raises:
            TargetError: a token is not in the vocabulary.
        """
        weight = self.weight
        if max(token_indices) >= weight.shape[0]:
            raise TargetError(f"token {max(token_indices)} is outside of the vocabulary of {weight.shape[0]} tokens")
        rows = torch.tensor(token_indices, device=weight.device)
        self.trainable_tokens_delta[name] = nn.Parameter(weight.detach()[rows].clone())
        self.token_indices[name] = tuple(token_indices)

    @property
    def adapter_names(self) -> set[str]:
        return set((self._tied_to[0] or self).token_indices)

    def state(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.token_indices:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta[name]}

    def delete(self, name: str) -> None:
        if name in self.token_indices:
            del self.trainable_tokens_delta[name], self.token_indices[name]

    def has(self, name: str) -> bool:
        return self._rows(name) is not None

    def merged_parameters(self, weights: Mapping[Any, float]) -> dict[str, Tensor]:
        weight = self.weight.detach()
        out = weight.clone()
        for key, factor in weights.items():
            found = self._rows(key)
            if found is not None:
                index, change = found
                out[index] = (out[index].float() + factor * change.detach()).to(out.dtype)
        return {"weight": out}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        route = self.route
        found = {} if route is None else {key: own for key in route.segments if (own := self._rows(key))}
        if route is None or not found:
            return y
        is_embedding = not x.is_floating_point()
        inputs = x.reshape(-1) if is_embedding else x.reshape(-1, x.shape[-1])
        out = y.reshape(-1, y.shape[-1]).clone()
        per_row = out.shape[0] // route.num_rows
        for key, (index, change) in found.items():
            for segment in route.segments[key]:
                rows = slice(segment.start * per_row, segment.stop * per_row)
                scaled = segment.weight * change
                if is_embedding:
                    out[rows] = _add_to_tokens(out[rows], inputs[rows], index, scaled * self._embed_scale)
                else:
                    logits = F.linear(inputs[rows], scaled.to(inputs.dtype))
                    out[rows] = out[rows].index_add(1, index, logits.to(out.dtype))
        return out.view(y.shape)

    @property
    def _embed_scale(self) -> Any:
        return getattr(base_of(self), "embed_scale", 1.0)

    def _rows(self, key: Key) -> tuple[Tensor, Tensor] | None:
        """An adapter's tokens [n] and the change [n, D] of their rows, in float32."""
        source = self._tied_to[0] or self
        if key in source.slots:
            return source.slots[key]
        if not isinstance(key, str) or key not in source.token_indices:
            return None
        index = torch.tensor(source.token_indices[key], device=self.weight.device)
        return index, source.trainable_tokens_delta[key].float() - self.weight[index].float()


def _add_to_tokens(y: Tensor, ids: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """y [T, D] plus the change [n, D] of each token in `index` [n]; ids [T]."""
    hit = ids[:, None] == index
    added = F.embedding(hit.int().argmax(dim=1), change)
    return torch.where(hit.any(dim=1, keepdim=True), (y.float() + added).to(y.dtype), y)
