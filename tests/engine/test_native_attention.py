"""Attention in C against the definition in float64, and that a row's result is its own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core import native
from server.engine.attention import AttentionCall, NativeAttention, Span
from server.engine.kv_cache import KVCache, LayerShape
from tests.native_kinds import native_kind

__all__ = ["native_kind"]

CPU = torch.device("cpu")
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": 37, "softcap": 3.0, "sinks": True},
}


@pytest.fixture(autouse=True)
def _c_only(native_kind: str) -> None:
    if native_kind == "off":
        pytest.skip("about C")


@dataclass
class Text:
    """A sequence's queries, keys and values [L, heads, dim], all of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[int]


class World:
    """Sequences and a cache whose blocks hold anything, NaN included, until they are written."""

    def __init__(
        self,
        lengths: Sequence[int],
        dtype: torch.dtype,
        *,
        dim: int,
        value_dim: int,
        heads: int,
        kv_heads: int,
        block: int,
    ) -> None:
        counts = [-(-length // block) for length in lengths]
        order = random.sample(range(1, 1 + sum(counts)), sum(counts))
        self.cache = KVCache([LayerShape(kv_heads, dim, value_dim)], 1 + sum(counts), block, dtype=dtype, device=CPU)
        for pool in self.cache._pools[0]:
            pool.fill_(torch.nan)
        shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
        self.texts = [
            Text(*(torch.randn(length, *shape).to(dtype) for shape in shapes), [order.pop() for _ in range(count)])
            for length, count in zip(lengths, counts, strict=True)
        ]

    def attend(self, call: AttentionCall, parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Parts are (text, first new token, number of them); returns each one's output."""
        block = self.cache.block_size
        spans, positions, chosen = [], [], []
        for i, start, count in parts:
            text, new = self.texts[i], slice(start, start + count)
            spans.append(Span(text.blocks, start, count))
            positions += [text.blocks[p // block] * block + p % block for p in range(start, start + count)]
            chosen.append((text.query[new], text.key[new], text.value[new]))
        step = NativeAttention(self.cache, torch.tensor(positions), spans)
        query, key, value = (torch.cat(each) for each in zip(*chosen, strict=True))
        return list(step.attend(call, query, key, value).split([count for _, _, count in parts]))


def _definition(call: AttentionCall, text: Text) -> Tensor:
    """Every token's output [L, H, Dv], in float64."""
    query, key, value = (part.double() for part in (text.query, text.key, text.value))
    length, heads = query.shape[:2]
    group = heads // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (call.window or length))
    scores = scores.masked_fill(hidden, -torch.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double()[:, None, None].expand(-1, length, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length]
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1))


def _world(dtype: torch.dtype, lengths: Sequence[int]) -> World:
    kv_heads = random.choice([1, 2, 3])
    dim, value_dim = random.choice([(8, 8), (16, 12), (20, 20), (64, 64), (36, 70)])
    return World(
        lengths,
        dtype,
        dim=dim,
        value_dim=value_dim,
        heads=kv_heads * random.choice([1, 3, 4, 17]),
        kv_heads=kv_heads,
        block=random.choice([1, 4, 12, 16, 32]),
    )


def _call(world: World, kind: str) -> AttentionCall:
    options = dict(CALLS[kind])
    if "sinks" in options:
        options["sinks"] = torch.randn(world.texts[0].query.shape[1])
    return AttentionCall(0, world.texts[0].query.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("kind", CALLS)
def test_prompts_in_chunks_and_decoding_agree_with_the_definition(kind: str, dtype: torch.dtype) -> None:
    for _ in range(3):
        lengths = [random.randint(1, 90) for _ in range(4)]
        world = _world(dtype, lengths)
        call = _call(world, kind)
        wanted = [_definition(call, text) for text in world.texts]
        done = [0] * len(lengths)
        while any(d < length for d, length in zip(done, lengths, strict=True)):
            left = [i for i, length in enumerate(lengths) if done[i] < length]
            chosen = random.sample(left, random.randint(1, len(left)))
            counts = [random.choice([1, random.randint(1, lengths[i] - done[i])]) for i in chosen]
            parts = [(i, done[i], count) for i, count in zip(chosen, counts, strict=True)]
            for (i, start, count), out in zip(parts, world.attend(call, parts), strict=True):
                torch.testing.assert_close(out.double(), wanted[i][start : start + count], **CLOSE[dtype])
                done[i] += count


@pytest.mark.parametrize("kind", CALLS)
def test_a_tokens_result_does_not_depend_on_its_batch_or_chunk(kind: str) -> None:
    world = _world(torch.float32, [70, 50, 33])
    call = _call(world, kind)
    whole = [world.attend(call, [(i, 0, len(text.query))])[0] for i, text in enumerate(world.texts)]
    for i, text in enumerate(world.texts):
        for position in random.sample(range(len(text.query)), 8):
            assert torch.equal(world.attend(call, [(i, position, 1)])[0][0], whole[i][position])
    parts = [(0, 40, 30), (1, 49, 1), (2, 3, 20)]
    for (i, start, count), out in zip(parts, world.attend(call, parts), strict=True):
        assert torch.equal(out, whole[i][start : start + count])


def test_what_is_not_finite_stays_with_its_own_sequence() -> None:
    world = _world(torch.float32, [40, 40])
    world.texts[0].key[20] = torch.nan
    call = _call(world, "plain")
    first, second = world.attend(call, [(0, 0, 40), (1, 0, 40)])
    assert first[20:].isnan().all()
    torch.testing.assert_close(second.double(), _definition(call, world.texts[1]), **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", list(native.DTYPES))
def test_rotation_is_that_of_rotary_positions(dtype: torch.dtype) -> None:
    dim, kv_heads, heads, num_tokens = 24, 2, 6, 37
    world = World([num_tokens], dtype, dim=dim, value_dim=dim, heads=heads, kv_heads=kv_heads, block=16)
    text = world.texts[0]
    angles = 6 * torch.rand(1, num_tokens, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.tensor([text.blocks[p // 16] * 16 + p % 16 for p in range(num_tokens)])
    step = NativeAttention(world.cache, positions, [Span(text.blocks, 0, num_tokens)])
    call = AttentionCall(0, dim**-0.5)
    out = step.attend_joined(call, torch.cat([text.query, text.key, text.value], dim=1), kv_heads, (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        x = x.double()
        turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * cos[0, :, None].double() + turned * sin[0, :, None].double()

    rotated = Text(rotate(text.query), rotate(text.key), text.value, [])
    torch.testing.assert_close(out.double(), _definition(call, rotated), **CLOSE[dtype])
