"""A stack of decoder layers (`layers.py`) that C computes in one call (`lora_core/native/decoder.c`), on a CPU.

It takes a layer's place only where both give the same bits.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_core.native import library
from lora_core.ops.native import NativeGroup
from lora_core.routing import Route
from lora_core.slots import Layout
from server.engine.attention import LayerAttention, NativeAttention, Span
from server.engine.attention.interface import STEP_ARGUMENT
from server.engine.kv_cache import KVCache, LayerShape
from server.engine.layers import LayerParts, Places, Seen

__all__ = ["BLOCK_SIZE", "DecoderStack", "NativeLayers", "Seconds"]

NUM_PRODUCTS = 4
# Of the cache of a trial; it holds one block.
BLOCK_SIZE = 16


class Seconds(ctypes.Structure):
    """As in decoder.c: where time went."""

    _fields_ = (
        ("products", ctypes.c_double),
        ("adapters", ctypes.c_double),
        ("attention", ctypes.c_double),
        ("others", ctypes.c_double),
    )


class _Projection(ctypes.Structure):
    """As in decoder.c; the tensors are held by whoever fills it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("multiply", "weight", "scales", "bias")),
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
        ("head_norms", ctypes.c_void_p * 2),
        ("head_epsilons", ctypes.c_float * 2),
        ("parts", _Projection * NUM_PRODUCTS),
        ("attention", LayerAttention),
    )


class _Pass(ctypes.Structure):
    """As in decoder.c, likewise."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "step", "wanted")),
        ("num_wanted", ctypes.c_int64),
        ("seconds", ctypes.c_void_p),
    )


class DecoderStack(Places):
    """A `LayerStack` under `NativeAttention`."""

    # Set by whoever wants an account; all stacks add to it.
    seconds: ClassVar[Seconds | None] = None

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        super().__init__(parts)
        found = library(parts[0].dtype)
        assert found is not None
        self._run: Callable[..., int] = found.decoder_layers
        self._parts = parts
        self._router = parts[0].groups[0].router
        self._dtype = parts[0].dtype
        self._c = (_Decoder * len(parts))()
        self._groups = [group for part in parts for group in part.groups]
        self._adapters = [adapters for part in parts for adapters in _adapters(part)]
        self._products = [product for layer in self._c for product in layer.parts]
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._num_rows = -1
        self._cache: KVCache | None = None
        self._routes: tuple[tuple[Route | None, int], ...] = ()
        self._layouts: list[Layout] = []
        for layer, part in zip(self._c, parts, strict=True):
            layer.size = part.sizes[0][0]
            layer.norms[:] = [norm.weight.data_ptr() for norm in part.norms]
            layer.epsilons[:] = [norm.eps for norm in part.norms]
            if part.attention.norms is not None:
                layer.head_norms[:] = [norm.weight.data_ptr() for norm in part.attention.norms]
                layer.head_epsilons[:] = [norm.eps for norm in part.attention.norms]
        for product, group, adapters in zip(self._products, self._groups, self._adapters, strict=True):
            if group.native is not None:
                product.multiply, product.weight, product.scales = group.native.addresses
            product.bias = None if group.bias is None else group.bias.data_ptr()
            product.num_in, product.num_out = group.members[0].in_features, sum(group.sizes)
            product.layers, product.num_layers = ctypes.addressof(adapters.layers), len(adapters.layers)

    def can_take(self, x: Tensor, step: object) -> bool:
        is_plain = x.shape[0] == 1 and x.dtype == self._dtype and x.is_contiguous()
        return is_plain and isinstance(step, NativeAttention) and not torch.is_grad_enabled()

    def run(
        self,
        first: int,
        stop: int,
        x: Tensor,
        step: NativeAttention,
        embeddings: tuple[Tensor, Tensor],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Through the layers [first, stop).

        Args:
            wanted: [N] int64, ascending: with the stack's last layer, the tokens that alone are computed to the end,
                under the router's head route; None for all.

        Returns:
            [1, T or N, D].

        Raises:
            MemoryError: there is no memory for what lies between their products.
        """
        num_rows = x.shape[1]
        if num_rows > self._num_rows or step.cache is not self._cache:
            self._reserve(max(num_rows, self._num_rows), step.cache)
        num_left = num_rows if wanted is None else len(wanted)
        last_out = stop * NUM_PRODUCTS - NUM_PRODUCTS + 1
        self._point_to_adapters(num_rows, num_left)
        y = x.clone()
        seconds = None if self.seconds is None else ctypes.addressof(self.seconds)
        rows = None if wanted is None else wanted.data_ptr()
        now = _Pass(num_rows, y.data_ptr(), step.address(embeddings), rows, num_left, seconds)
        arguments = ctypes.byref(self._c, first * ctypes.sizeof(_Decoder)), stop - first, ctypes.byref(now)
        start, end = first * NUM_PRODUCTS, stop * NUM_PRODUCTS
        product, is_multiplied = start, 0
        while (product := start + self._run(*arguments, product - start, is_multiplied)) != end:
            if product < start:
                raise MemoryError(f"no memory for {num_rows} rows of a layer")
            given = self._buffers(product)[0][: num_rows if product < last_out else num_left]
            # Held until the next one is there: C has read it by then.
            made = self._groups[product].multiply(given).to(self._dtype).contiguous()
            self._products[product].y = made.data_ptr()
            if product % NUM_PRODUCTS == 0:
                self._point_attention(product // NUM_PRODUCTS, made)
            is_multiplied = 1
        return y[:, :num_left]

    def _point_to_adapters(self, num_rows: int, num_left: int) -> None:
        """Tell C what the routes under way want; nothing is to be done while they and the adapters stay the same.

        Args:
            num_left: rows behind the last layer's attention; the head route's, if these are not all.
        """
        route = self._router.route
        is_base = route is None or route.is_base
        layouts = [] if is_base else [layout for adapters in self._adapters for layout in adapters.layouts]
        first = route, num_rows
        last = (self._router.head_route, num_left) if num_left < num_rows else first
        if (first, last) == self._routes and layouts == self._layouts:
            return
        self._routes, self._layouts = (first, last), layouts
        routes = [first] * (len(self._products) - NUM_PRODUCTS + 1) + [last] * (NUM_PRODUCTS - 1)
        for product, adapters, (own, count) in zip(self._products, self._adapters, routes, strict=True):
            product.plan = None if own is None or own.is_base else adapters.plan(own, count)

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


class NativeLayers:
    """Layers in C (`StackKind`).

    Args:
        shapes: what each layer's cache holds.
    """

    def __init__(self, shapes: Sequence[LayerShape]) -> None:
        self._shapes = shapes

    def can_hold(self, parts: LayerParts) -> bool:
        return len(_adapters(parts)) == NUM_PRODUCTS and library(parts.dtype) is not None

    def make(self, parts: Sequence[LayerParts]) -> DecoderStack:
        return DecoderStack(parts)

    def is_equal(self, theirs: Callable[..., Any], ours: Callable[..., Any], call: Seen) -> bool:
        """Both make the same bits of random numbers."""
        x = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(0)).to(call.x.dtype)
        with torch.inference_mode():
            results = [
                forward(x, **call.others | {STEP_ARGUMENT: self.trial_step(x.shape[1], x.dtype)})
                for forward in (theirs, ours)
            ]
        return isinstance(results[0], Tensor) and torch.equal(*results)

    def trial_step(self, num_tokens: int, dtype: torch.dtype) -> NativeAttention:
        """A step of one sequence, at most `BLOCK_SIZE` tokens, with a cache of its own."""
        cache = KVCache(self._shapes, 2, BLOCK_SIZE, dtype=dtype, device=torch.device("cpu"))
        return NativeAttention(cache, BLOCK_SIZE + torch.arange(num_tokens), [Span([1], 0, num_tokens)])


def _adapters(parts: LayerParts) -> list[NativeGroup]:
    return [group.adapters for group in parts.groups if isinstance(group.adapters, NativeGroup)]
