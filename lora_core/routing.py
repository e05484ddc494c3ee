"""Which token wants how much of which adapter.

A route is the sparse matrix w [T, N] of `lora_core.maths`, kept run-length encoded: runs of consecutive rows that
want the same adapters. In a packed batch a run is one request's tokens; in a padded batch it is one row; with
`LoraModel.set_adapter` one run covers everything. An empty mapping is a base-model run.

    rows   0        3     5           9
           |--------|-----|-----------|        half-open runs: {a: 1} × 3, {} × 2, {a: .5, b: .5} × 4
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Key", "Route", "Router", "Run", "Segment"]

# An adapter as the layers know it: a slot number in the server, a name in the library.
Key = Hashable


class Run(NamedTuple):
    """`num_rows` consecutive rows that all want `weights`."""

    weights: Mapping[Any, float]  # by Key; a mapping's key type is invariant, and callers have str or int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) want `weight` of one adapter."""

    start: int
    stop: int
    weight: float


class Route:
    """The routing of one forward pass; immutable, so that what is derived from it can be kept in `cache`.

    Attributes:
        runs: the runs in row order.
        num_rows: rows in all. A layer that sees k·num_rows tokens takes each row for k tokens in a row.
        segments: for each adapter in use, its segments in row order; adapters in order of first use.
        cache: a place for backends to keep what they derive from this route, once for all layers.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs: tuple[Run, ...] = tuple(Run(*run) for run in runs)
        self.segments: dict[Key, list[Segment]] = {}
        self.cache: dict[Hashable, object] = {}
        start = 0
        for weights, num_rows in self.runs:
            if num_rows < 0:
                raise ValueError("a run cannot have a negative number of rows")
            for key, weight in weights.items():
                self._append(key, start, start + num_rows, float(weight))
            start += num_rows
        self.num_rows = start

    @classmethod
    def uniform(cls, weights: Mapping[Any, float]) -> "Route":
        """Every row wants the same adapters, however many rows come."""
        return cls([Run(weights, 1)])

    @property
    def is_base(self) -> bool:
        """No row wants any adapter."""
        return not self.segments

    def select(self, rows: Sequence[int]) -> "Route":
        """The route of some rows, given in ascending order; for the layers that run on these rows only."""
        runs: list[Run] = []
        chosen = iter(rows)
        row = next(chosen, None)
        end = 0
        for weights, num_rows in self.runs:
            start, end = end, end + num_rows
            count = 0
            while row is not None and start <= row < end:
                count += 1
                row = next(chosen, None)
            if count:
                runs.append(Run(weights, count))
        if row is not None:
            raise ValueError("rows must be in ascending order and inside the route")
        return Route(runs)

    def _append(self, key: Key, start: int, stop: int, weight: float) -> None:
        """Add a segment, growing the last one where the two touch."""
        if weight == 0.0 or start == stop:
            return
        segments = self.segments.setdefault(key, [])
        if segments and segments[-1].stop == start and segments[-1].weight == weight:
            segments[-1] = Segment(segments[-1].start, stop, weight)
        else:
            segments.append(Segment(start, stop, weight))


class Router:
    """Where the layers of one model find the route of the forward pass under way.

    Attributes:
        default: the route outside of `use`, also while gradient checkpointing computes a layer again; None is the base.
    """

    def __init__(self) -> None:
        self.default: Route | None = None
        self._route: Route | None = None
        self._head_route: Route | None = None

    @property
    def route(self) -> Route | None:
        """For every layer but the output embedding; None means the base model."""
        return self.default if self._route is None else self._route

    @property
    def head_route(self) -> Route | None:
        """For the output embedding, which may run on fewer rows."""
        return self.default if self._route is None else self._head_route

    @contextmanager
    def use(self, route: Route, head_route: Route | None = None) -> Iterator[None]:
        """Run a block of code under `route`; always cleared, never nested.

        Raises:
            RuntimeError: a route is in use already.
        """
        if self._route is not None:
            raise RuntimeError("a route is already in use")
        self._route, self._head_route = route, route if head_route is None else head_route
        try:
            yield
        finally:
            self._route = self._head_route = None

    @contextmanager
    def within(self, route: Route) -> Iterator[None]:
        """Inside a module that runs on some rows only, go on with these rows' own route."""
        before = self._route, self._head_route
        self._route = self._head_route = route
        try:
            yield
        finally:
            self._route, self._head_route = before
