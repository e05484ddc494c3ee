"""Decoding steps recorded once and replayed: what changes from step to step is in tensors that stay where they are.

A decoding step is some thousand short operations, which take longer to launch than to run. A recording has them
launched as one. It is made for fixed numbers of tokens and of adapters' entries; a batch is padded to the next one
with tokens of nobody's, which read and write nothing. Adapters load, leave and change without a new recording: the
kernels find them through tables.

    (tokens, kind)   (1, nothing) (1, few) … (2, nothing) …        nothing: no adapters, nothing launched for them
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core import DeviceModelSlots, Route
from lora_core.ops.plan import SMALL_TILE, PlannedRoute, RoutePlan, Tile, tiles_of
from server.engine.attention import AttentionPlan
from server.engine.batch import Batch, with_tokens
from server.engine.device_step import DeviceStep

__all__ = ["Capture", "CudaCapture", "DecodeGraphs"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What adapters' part a recording has room for.

    Attributes:
        tiles: sets of adapters at most, where there are more tokens than that; None: as many as tokens.
        entries: adapters of a set.
        max_rank: of an adapter; one of a higher rank than any kind has decodes without a recording.
    """

    tiles: int | None
    entries: int
    max_rank: int

    def num_tiles(self, num_tokens: int) -> int:
        return num_tokens if self.tiles is None else min(self.tiles, num_tokens)


# From the least to the most. Room that is not used costs some microseconds a layer.
KINDS = (Kind(0, 0, 0), Kind(8, 1, 16), Kind(8, 2, 16), Kind(None, 1, 128), Kind(None, 4, 128))


class Capture(Protocol):
    """Records what a function does with tensors."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns what does it again, and the tensor in which the result then is.

        Raises:
            RuntimeError: the function does something that cannot be recorded.
        """


class CudaCapture:
    """Records CUDA graphs that share their working memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # kernels are compiled, and libraries take their memory, outside of the recording
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to copy adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return graph.replay, output


@dataclass(slots=True)
class _Inputs:
    """What all recordings of one number of tokens read."""

    tokens: Tensor  # [3, B] int64, as `DeviceStep.compute` takes them
    attention: AttentionPlan
    last_rows: Tensor


@dataclass(slots=True)
class _Recording:
    """`route` is what the plan holds now, and `gained` the slots that had gains then."""

    replay: Callable[[], None]
    logits: Tensor
    plan: RoutePlan
    route: Route | None = None
    gained: frozenset[int] = frozenset()


class DecodeGraphs:
    """Recordings for up to `max_tokens` tokens.

    Args:
        step: runs the model.
        bank: the slots that the recordings' kernels look into.
        max_blocks: cache blocks of the longest sequence.
    """

    def __init__(
        self, step: DeviceStep, bank: DeviceModelSlots, capture: Capture, *, max_tokens: int, max_blocks: int
    ) -> None:
        self._step = step
        self._bank = bank
        self._capture = capture
        self._max_blocks = max_blocks
        self._sizes = [1 << i for i in range((max_tokens - 1).bit_length() + 1)]
        self._inputs: dict[int, _Inputs] = {}
        self._recordings: dict[tuple[int, Kind], _Recording] = {}
        self.num_replays = 0

    def record(self) -> None:
        """Make all recordings, the largest first, in whose memory the others fit.

        Raises:
            RuntimeError: the model's code cannot be recorded.
        """
        for size in reversed(self._sizes):
            self._inputs[size] = self._make_inputs(size)
            for kind in KINDS:
                self._recordings[size, kind] = self._record(size, kind)

    def run(self, batch: Batch, last: Tensor | None = None) -> Tensor | None:
        """Replay a batch: its logits [T, V], until the next replay; None if no recording fits it.

        Args:
            last: as for `with_tokens`.
        """
        num_tokens = len(batch.spans)
        if num_tokens > self._sizes[-1] or len(batch.sampled) < num_tokens or batch.prompt_rows:
            return None
        if any(span.num_tokens > 1 for span in batch.spans):
            return None
        slots = batch.route.segments.keys()
        tiles = tiles_of(batch.route, num_tokens, SMALL_TILE, self._bank.max_slots)
        size = next(size for size in self._sizes if size >= num_tokens)
        fitting = (kind for kind in KINDS if self._recordings[size, kind].plan.fits(tiles))
        kind = next((kind for kind in fitting if self._bank.can_plan(slots, kind.max_rank)), None)
        if kind is None:
            return None
        recording = self._recordings[size, kind]
        self._fill(self._inputs[size], recording, batch, tiles, last)
        recording.replay()
        self.num_replays += 1
        return recording.logits[:num_tokens]

    def _fill(
        self, inputs: _Inputs, recording: _Recording, batch: Batch, tiles: list[Tile], last: Tensor | None
    ) -> None:
        """Write a batch into the tensors that a recording reads."""
        tokens = torch.zeros(inputs.tokens.shape, dtype=torch.int64, pin_memory=inputs.tokens.is_cuda)
        tokens[2] = -1
        for row, values in zip(tokens, (batch.input_ids[0], batch.position_ids[0], batch.cache_positions), strict=True):
            row[: len(values)] = values
        inputs.tokens.copy_(tokens, non_blocking=True)
        if last is not None:
            inputs.tokens[0] = with_tokens(inputs.tokens[0], last)
        inputs.attention.fill(batch.spans, self._step.cache.block_size)
        gained = self._bank.table.gained
        if recording.route is not batch.route or recording.gained is not gained:
            recording.plan.fill(tiles, gained)
            recording.route, recording.gained = batch.route, gained

    def _make_inputs(self, size: int) -> _Inputs:
        cache = self._step.cache
        attention = AttentionPlan(size, 0, size * self._max_blocks, self._step.num_kv_heads, cache.device)
        attention.fill([], cache.block_size)
        tokens = torch.zeros(3, size, dtype=torch.int64, device=cache.device)
        tokens[2] = -1
        return _Inputs(tokens, attention, torch.arange(size, device=cache.device))

    def _record(self, size: int, kind: Kind) -> _Recording:
        inputs, num_tiles = self._inputs[size], kind.num_tiles(size)
        plan = RoutePlan(num_tiles, num_tiles * kind.entries, SMALL_TILE, self._step.cache.device, size)
        plan.fill([])
        route = PlannedRoute(size, plan, kind.max_rank)

        def run() -> Tensor:
            return self._step.compute(inputs.tokens, inputs.attention, route, route, inputs.last_rows)

        replay, logits = self._capture(run)
        return _Recording(replay, logits, plan)
