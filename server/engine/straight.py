"""From tokens to logits without the model's own code between its modules, where that does nothing of its own.

A causal language model embeds tokens, passes them through its layers, a norm and its head. The code that calls these
takes more than a millisecond a step, as long as a tenth of a small model's products, and lets its last layer compute
tokens whose logits nobody wants. `StraightModel` calls the same modules where a run of the model shows that each was
given what the one before it returned, and where both give the same bits of random tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import NativeAttention, use_step
from server.engine.decoder import BLOCK_SIZE, DecoderStack, NativeLayers
from server.engine.layers import LayerParts, LayerStack, Seen, calls_of
from server.engine.norm import RmsNorm

__all__ = ["StraightModel", "find_straight_model"]


class Place:
    """Where a module is; another may come there with an adapter."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        name = next(name for name, each in model.named_modules() if each is module)
        parent, _, self._name = name.rpartition(".")
        self._siblings: Any = model.get_submodule(parent)._modules

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._siblings[self._name]
        return module


class StraightModel:
    """A model whose layers are one stack.

    Args:
        embedding, rotary, norm, head: its other modules. Called with tokens; with what is embedded, and positions; with
            what comes out of the layers; and with that again.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: DecoderStack,
        num_layers: int,
        *,
        embedding: nn.Module,
        rotary: nn.Module,
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        self._stack = stack
        self._num_layers = num_layers
        self._rotary = rotary
        self._embedding, self._norm, self._head = (Place(model, module) for module in (embedding, norm, head))

    def run(self, input_ids: Tensor, position_ids: Tensor, last_rows: Tensor, step: NativeAttention) -> Tensor | None:
        """Logits [N, V] of the rows `last_rows` [N] of input_ids [1, T]; None if it is the model's own code to compute.

        Attention is the step's, the route is the router's that is in use.
        """
        norm = self._norm.module
        if not isinstance(norm, RmsNorm) or self._stack.end(0) < self._num_layers:  # an adapter has a module of its own
            return None
        x = self._embedding.module(input_ids)
        if not self._stack.can_take(x, step):
            return None
        embeddings = self._rotary(x, position_ids)
        x = self._stack.run(0, self._num_layers, x, step, embeddings, last_rows)
        logits: Tensor = self._head.module(norm(x))
        return logits[0]


def find_straight_model(
    model: nn.Module,
    trial: Callable[[], object],
    stacks: Sequence[tuple[LayerStack, Sequence[LayerParts]]],
    layers: NativeLayers,
) -> StraightModel | None:
    """The model as a straight one, or None if it is another kind.

    Args:
        trial: runs it once, with no route in use.
        stacks: of layers that have been replaced.
        layers: how.
    """
    if len(stacks) != 1:
        return None
    stack, parts = stacks[0]
    if not isinstance(stack, DecoderStack) or any(
        module._forward_hooks or module._forward_pre_hooks for module in _containers(model, parts[0].layer)
    ):
        return None
    seen = calls_of(model.modules(), trial)
    modules = _find(model, seen, seen[parts[0].layer], seen[parts[-1].layer])
    if modules is None:
        return None
    straight = StraightModel(model, stack, len(parts), **modules)
    return straight if _is_equal(model, straight, layers) else None


def _containers(model: nn.Module, layer: nn.Module) -> Iterator[nn.Module]:
    """Modules that the layer is a part of."""
    return (module for module in model.modules() if module is not layer and layer in set(module.modules()))


def _find(model: nn.Module, seen: Mapping[nn.Module, Seen], first: Seen, last: Seen) -> dict[str, nn.Module] | None:
    """Which modules give the layers their input, and take their output, or None if something is between."""
    whole = seen[model]
    logits: Any = getattr(whole.output, "logits", None)
    embeddings, positions = first.kwargs.get("position_embeddings"), whole.kwargs.get("position_ids")
    embedding = _first(seen, lambda call: call.output is first.x and len(call.args) == 1 and not call.kwargs)
    rotary = _first(seen, lambda call: call.output is embeddings)
    norm = _first(seen, lambda call: call.x is last.output and not call.others)
    head = _first(seen, lambda call: call.output is logits)
    if embedding is None or rotary is None or norm is None or head is None:
        return None
    rotated = (*seen[rotary].args, *seen[rotary].kwargs.values())
    was_straight = (
        seen[embedding].x is whole.kwargs.get("input_ids")
        and len(rotated) == 2
        and rotated[0] is first.x
        and rotated[1] is positions
        and seen[head].x.data_ptr() == seen[norm].output.data_ptr()
        and seen[head].x.shape == seen[norm].output.shape
    )
    return {"embedding": embedding, "rotary": rotary, "norm": norm, "head": head} if was_straight else None


def _first(seen: Mapping[nn.Module, Seen], is_wanted: Callable[[Seen], bool]) -> nn.Module | None:
    """The outermost module whose call is; what is called last is noted last."""
    return next((module for module, call in reversed([*seen.items()]) if is_wanted(call)), None)


def _is_equal(model: nn.Module, straight: StraightModel, layers: NativeLayers) -> bool:
    """Both give the same bits of a batch of random tokens."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.weight.shape[0], (1, BLOCK_SIZE - 1), generator=generator)
    positions, last_rows = torch.arange(ids.shape[1])[None], torch.tensor([2, ids.shape[1] - 1])
    dtype = embedding.weight.dtype
    with torch.inference_mode():
        step = layers.trial_step(ids.shape[1], dtype)
        ours = straight.run(ids, positions, last_rows, step)
        theirs = model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=last_rows,
            **use_step(layers.trial_step(ids.shape[1], dtype)),
        ).logits[0]
    return ours is not None and torch.equal(ours, theirs)
