"""Decoder layers as most models have them, computed by C, all of them in one call (`lora_core/native/decoder.c`).

The model's code stays as it is and calls its layers one after the other: the first one's call computes those behind it
too, whose own calls then find it done. This takes the place of a layer's `forward` only where both are seen to give the
same bits, and of several at once only where each was seen to be given what the one before it returned. Whatever it is
not made for goes to the model's own code: another kind of attention step, autograd, a layer in which an adapter has put
a module of its own.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.native import library
from lora_core.ops.native import NativeGroup
from lora_core.routing import Route
from lora_core.shared import SharedLinears
from lora_core.slots import Layout
from server.engine.attention import LayerAttention, NativeAttention, RotaryAttention, Span
from server.engine.attention.interface import STEP_ARGUMENT
from server.engine.kv_cache import KVCache, LayerShape
from server.engine.replace import GatedMlp, RmsNorm

__all__ = ["DecoderStack", "Seconds", "replace_decoders"]

CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
NUM_PRODUCTS = 4
# Of the cache of a trial.
BLOCK_SIZE = 16


class Seconds(ctypes.Structure):
    """As in decoder.c: where time went."""

    _fields_ = (("products", ctypes.c_double), ("adapters", ctypes.c_double), ("attention", ctypes.c_double))


class _Projection(ctypes.Structure):
    """As in decoder.c; the tensors are held by whoever fills it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out")),
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("plan", "x", "y")),
    )


class _Decoder(ctypes.Structure):
    """As in decoder.c, likewise."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("norms", ctypes.c_void_p * 2),
        ("epsilons", ctypes.c_float * 2),
        ("parts", _Projection * NUM_PRODUCTS),
        ("attention", LayerAttention),
    )


class _Pass(ctypes.Structure):
    """As in decoder.c, likewise."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "step", "seconds")),
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer is made of.

    Attributes:
        groups: its four products: q, k and v; the output; gate and up; down.
        adapters: of each.
    """

    layer: nn.Module
    attention: RotaryAttention
    mlp: GatedMlp
    norms: tuple[RmsNorm, RmsNorm]
    groups: list[SharedLinears]
    adapters: list[NativeGroup]

    @property
    def dtype(self) -> torch.dtype:
        return self.norms[0].weight.dtype

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Input and output features of each product."""
        return tuple((group.members[0].in_features, sum(group.sizes)) for group in self.groups)

    @property
    def places(self) -> list[tuple[dict[str, Any], str, nn.Module]]:
        """Where modules are, by which it is seen whether they still are; `getattr` takes longer than a layer's sums."""
        parents = self.layer, self.attention, self.mlp
        return [(parent._modules, name, child) for parent in parents for name, child in parent.named_children()]


class DecoderStack:
    """Layers that follow each other: x + attention(norm(x)), then that + mlp(norm(that)), [1, T, D] -> [1, T, D]."""

    # Set by whoever wants an account; all stacks add to it.
    seconds: ClassVar[Seconds | None] = None

    def __init__(self, parts: Sequence[Parts]) -> None:
        found = library(parts[0].dtype)
        assert found is not None
        self._run: Callable[..., int] = found.decoder_layers
        self._parts = parts
        self._places = [part.places for part in parts]
        self._router = parts[0].groups[0].router
        self._dtype = parts[0].dtype
        self._c = (_Decoder * len(parts))()
        self._groups = [group for part in parts for group in part.groups]
        self._adapters = [adapters for part in parts for adapters in part.adapters]
        self._products = [product for layer in self._c for product in layer.parts]
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._num_rows = -1
        self._cache: KVCache | None = None
        self._route: Route | None = None
        self._planned_rows = -1
        self._layouts: list[Layout] = []
        for layer, part in zip(self._c, parts, strict=True):
            layer.size = part.sizes[0][0]
            layer.norms[:] = [norm.weight.data_ptr() for norm in part.norms]
            layer.epsilons[:] = [norm.eps for norm in part.norms]
        for product, group, adapters in zip(self._products, self._groups, self._adapters, strict=True):
            if group.native is not None:
                product.weight, product.scales = group.native.addresses
            product.bias = None if group.bias is None else group.bias.data_ptr()
            product.num_in, product.num_out = group.members[0].in_features, sum(group.sizes)
            product.layers, product.num_layers = ctypes.addressof(adapters.layers), len(adapters.layers)

    def end(self, first: int) -> int:
        """The first layer from `first` on in which a module is another than it was, or their number."""
        for index in range(first, len(self._places)):
            if not all(modules[name] is child for modules, name, child in self._places[index]):
                return index
        return len(self._places)

    def can_take(self, x: Tensor) -> bool:
        is_plain = x.shape[0] == 1 and x.dtype == self._dtype and x.is_contiguous()
        return is_plain and not torch.is_grad_enabled()

    def run(self, first: int, stop: int, x: Tensor, step: NativeAttention, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Through the layers [first, stop).

        Raises:
            MemoryError: there is no memory for what lies between their products.
        """
        num_rows = x.shape[1]
        if num_rows > self._num_rows or step.cache is not self._cache:
            self._reserve(max(num_rows, self._num_rows), step.cache)
        self._point_to_adapters(num_rows)
        y = x.clone()
        seconds = None if self.seconds is None else ctypes.addressof(self.seconds)
        now = _Pass(num_rows, y.data_ptr(), step.address(embeddings), seconds)
        arguments = ctypes.byref(self._c, first * ctypes.sizeof(_Decoder)), stop - first, ctypes.byref(now)
        start, end = first * NUM_PRODUCTS, stop * NUM_PRODUCTS
        product, is_multiplied = start, 0
        while (product := start + self._run(*arguments, product - start, is_multiplied)) != end:
            if product < start:
                raise MemoryError(f"no memory for {num_rows} rows of a layer")
            # Held until the next one is there: C has read it by then.
            made = self._groups[product].multiply(self._buffers(product)[0][:num_rows]).to(self._dtype).contiguous()
            self._products[product].y = made.data_ptr()
            if product % NUM_PRODUCTS == 0:
                self._point_attention(product // NUM_PRODUCTS, made)
            is_multiplied = 1
        return y

    def _point_to_adapters(self, num_rows: int) -> None:
        """Tell C what the route under way wants; nothing is to be done while it and the adapters stay the same."""
        route = self._router.route
        is_base = route is None or route.is_base
        layouts = [] if is_base else [layout for adapters in self._adapters for layout in adapters.layouts]
        if route is self._route and layouts == self._layouts and num_rows == self._planned_rows:
            return
        self._route, self._layouts, self._planned_rows = route, layouts, num_rows
        for product, adapters in zip(self._products, self._adapters, strict=True):
            product.plan = None if is_base or route is None else adapters.plan(route, num_rows)

    def _reserve(self, num_rows: int, cache: KVCache) -> None:
        """Memory between the products, which all layers use, for at most so many rows."""
        if num_rows > self._num_rows:
            self._memory.clear()
        self._num_rows, self._cache = num_rows, cache
        for i, product in enumerate(self._products):
            product.x, product.y = (part.data_ptr() for part in self._buffers(i))
        for i in range(len(self._parts)):
            self._point_attention(i, self._buffers(i * NUM_PRODUCTS)[1])

    def _point_attention(self, index: int, joined: Tensor) -> None:
        """A layer's attention reads queries, keys and values from there, [rows, ΣO]."""
        attention, cache = self._parts[index].attention, self._cache
        assert cache is not None
        heads, out = (
            part.view(len(part), -1, attention.head_dim)
            for part in (joined, self._buffers(index * NUM_PRODUCTS + 1)[0])
        )
        query, key, value = heads.split([out.shape[1], attention.num_kv_heads, attention.num_kv_heads], dim=1)
        self._c[index].attention = LayerAttention.of(attention.call, cache, query, key, value, out)

    def _buffers(self, product: int) -> tuple[Tensor, Tensor]:
        """A product's input and output."""
        group, place = self._groups[product], 2 * (product % NUM_PRODUCTS)
        keys = (place, group.members[0].in_features), (place + 1, sum(group.sizes))
        for key in keys:
            if key not in self._memory:
                self._memory[key] = torch.empty(self._num_rows, key[1], dtype=self._dtype)
        return self._memory[keys[0]], self._memory[keys[1]]


class StackedForward:
    """In the place of a layer's `forward`."""

    def __init__(self, stack: DecoderStack, done: "Done", index: int, forward: Callable[..., Any]) -> None:
        self._stack = stack
        self._done = done
        self._index = index
        self._forward = forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        done, index = self._done, self._index
        if hidden_states is done.output and 0 < index < done.stop:
            return hidden_states
        step = kwargs.get(STEP_ARGUMENT)
        stop = self._stack.end(index) if isinstance(step, NativeAttention) and not args else index
        if stop == index or not self._stack.can_take(hidden_states):
            return self._forward(hidden_states, *args, **kwargs)
        assert isinstance(step, NativeAttention)
        done.stop = stop
        done.output = self._stack.run(index, stop, hidden_states, step, kwargs["position_embeddings"])
        return done.output


@dataclass(slots=True)
class Done:
    """What came of a stack's last run, and the layer that it stopped before."""

    output: Tensor | None = None
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A call of a layer in a run of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    def is_followed_by(self, other: "Seen") -> bool:
        """The other was given what this returned, and otherwise the same."""
        names = self.kwargs.keys() | other.kwargs.keys()
        are_same = all(self.kwargs.get(name) is other.kwargs.get(name) for name in names - {"hidden_states"})
        return other.x is self.output and are_same and len(self.args) == len(other.args) <= 1


def replace_decoders(model: nn.Module, trial: Callable[[], object], shapes: Sequence[LayerShape]) -> int:
    """Let C compute the layers that a `DecoderStack` equals; returns how many.

    Args:
        trial: runs the model once, with no route in use.
        shapes: what each layer's cache holds.
    """
    found = [parts for module in model.modules() if (parts := _parts(module)) is not None]
    seen = _calls([parts.layer for parts in found], trial)
    equal = [parts for parts in found if parts.layer in seen and _is_equal(parts, shapes, seen[parts.layer])]
    runs: list[list[Parts]] = []
    for parts in equal:
        follows = runs and seen[runs[-1][-1].layer].is_followed_by(seen[parts.layer])
        if follows and runs[-1][-1].dtype == parts.dtype:
            runs[-1].append(parts)
        else:
            runs.append([parts])
    for run in runs:
        stack, done = DecoderStack(run), Done()
        for index, parts in enumerate(run):
            own = StackedForward(stack, done, index, parts.layer.forward)
            setattr(parts.layer, "forward", own)  # noqa: B010 - to type checkers a method stays what it is
    return len(equal)


def _parts(layer: nn.Module) -> Parts | None:
    """A layer's parts, if it has those that `DecoderStack` knows and no others, all in one dtype."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    children = dict(layer.named_children())
    attention, mlp, first, second = (children.pop(name, None) for name in CHILDREN)
    if children or not isinstance(attention, RotaryAttention) or not isinstance(mlp, GatedMlp) or not mlp.is_silu:
        return None
    if not isinstance(first, RmsNorm) or not isinstance(second, RmsNorm) or attention.call.sinks is not None:
        return None
    products = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj]
    groups = [group for m in products if isinstance(group := getattr(m, "shared", None), SharedLinears)]
    adapters = [group.adapters for group in groups if isinstance(group.adapters, NativeGroup)]
    if len(adapters) < len(products) or len(groups[1].members) > 1 or len(groups[3].members) > 1:
        return None
    tensors = [first.weight, second.weight, *(group.bias for group in groups if group.bias is not None)]
    if len({tensor.dtype for tensor in tensors}) > 1 or library(first.weight.dtype) is None:
        return None
    return Parts(layer, attention, mlp, (first, second), groups, adapters)


def _calls(layers: Sequence[nn.Module], trial: Callable[[], object]) -> Mapping[nn.Module, Seen]:
    """The last call of each layer in a run of the model."""
    seen: dict[nn.Module, Seen] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[layer] = Seen(args, kwargs, output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _is_equal(parts: Parts, shapes: Sequence[LayerShape], call: Seen) -> bool:
    """Both make the same bits of random numbers."""
    x = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(0)).to(call.x.dtype)
    kwargs = {name: value for name, value in call.kwargs.items() if name != "hidden_states"}
    forwards = parts.layer.forward, StackedForward(DecoderStack([parts]), Done(), 0, parts.layer.forward)
    results = []
    for forward in forwards:
        cache = KVCache(shapes, 2, BLOCK_SIZE, dtype=x.dtype, device=x.device)
        step = NativeAttention(cache, BLOCK_SIZE + torch.arange(x.shape[1]), [Span([1], 0, x.shape[1])])
        with torch.inference_mode():
            results.append(forward(x, **kwargs | {STEP_ARGUMENT: step}))
    theirs, ours = results
    return isinstance(theirs, Tensor) and torch.equal(theirs, ours)
