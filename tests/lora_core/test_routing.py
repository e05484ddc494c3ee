"""Routes: segments say what the runs say, as briefly as they can, and the router never keeps a route."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core import Route, Router, Run
from lora_core.routing import Segment

KEYS = ["a", 1, (2, "c"), None]
RUNS = st.lists(
    st.builds(
        Run, st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0, 0.5, 1, -1.0]), max_size=4), st.integers(0, 4)
    ),
    max_size=8,
)


def dense(route: Route) -> torch.Tensor:
    """w [T, N], from the runs."""
    rows = [[run.weights.get(key, 0.0) for key in KEYS] for run in route.runs for _ in range(run.num_rows)]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(KEYS))


def dense_of_segments(route: Route) -> torch.Tensor:
    out = torch.zeros(route.num_rows, len(KEYS), dtype=torch.float64)
    for key, segments in route.segments.items():
        for segment in segments:
            assert segment.weight != 0
            column = out[segment.start : segment.stop, KEYS.index(key)]
            assert len(column) == segment.stop - segment.start > 0
            assert not column.any(), "segments overlap"
            column.fill_(segment.weight)
    return out


@given(RUNS)
def test_segments_say_what_the_runs_say(runs: list[Run]) -> None:
    route = Route(runs)
    wanted = dense(route)
    assert route.num_rows == len(wanted)
    assert torch.equal(dense_of_segments(route), wanted)
    assert route.is_base == (not wanted.any())
    for segments in route.segments.values():
        for before, after in pairwise(segments):
            assert before.stop < after.start or (before.stop == after.start and before.weight != after.weight)
    first_rows = [segments[0].start for segments in route.segments.values()]
    assert first_rows == sorted(first_rows)


@given(RUNS, st.data())
def test_select_takes_rows(runs: list[Run], data: st.DataObject) -> None:
    route = Route(runs)
    rows = sorted(data.draw(st.sets(st.integers(0, route.num_rows - 1)))) if route.num_rows else []
    assert torch.equal(dense(route.select(rows)), dense(route)[rows])


@pytest.mark.parametrize("rows", [[-1], [6], [0, 6], [5, 1], [4, 3, 5, 0], [-1, 0, 1]], ids=str)
def test_select_refuses_other_rows(rows: list[int]) -> None:
    route = Route([Run({"a": 1.0}, 3), Run({"b": 1.0}, 3)])
    with pytest.raises(ValueError, match="ascending order and inside the route"):
        route.select(rows)


@pytest.mark.parametrize(
    ("runs", "segments"),
    [
        ([({"a": 1}, 2), ({"a": 1.0}, 3)], {"a": [Segment(0, 5, 1.0)]}),
        ([({"a": 1}, 2), ({}, 0), ({"a": 0}, 0), ({"a": 1}, 1)], {"a": [Segment(0, 3, 1.0)]}),
        ([({"a": 1}, 2), ({}, 1), ({"a": 1}, 1)], {"a": [Segment(0, 2, 1.0), Segment(3, 4, 1.0)]}),
        ([({"a": 1}, 2), ({"a": 0.5}, 1)], {"a": [Segment(0, 2, 1.0), Segment(2, 3, 0.5)]}),
        ([({"a": 1, "b": 2}, 1), ({"b": 2}, 1)], {"a": [Segment(0, 1, 1.0)], "b": [Segment(0, 2, 2.0)]}),
        ([({"a": 0.0}, 4), ({"b": 1.0}, 0)], {}),
        ([], {}),
    ],
    ids=str,
)
def test_segments_merge(runs: list[Any], segments: dict[str, list[Segment]]) -> None:
    assert Route(runs).segments == segments


def test_a_uniform_route_is_one_row() -> None:
    route = Route.uniform({"a": 1.0})
    assert (route.num_rows, route.segments, route.is_base) == (1, {"a": [Segment(0, 1, 1.0)]}, False)
    assert Route.uniform({}).is_base


def test_a_run_cannot_have_fewer_rows_than_none() -> None:
    with pytest.raises(ValueError, match="negative number of rows"):
        Route([Run({}, 3), Run({}, -1)])


def test_the_router_shows_its_route_inside_only() -> None:
    router, route, head = Router(), Route.uniform({"a": 1.0}), Route.uniform({})
    with router.use(route):
        assert (router.route, router.head_route) == (route, route)
    assert (router.route, router.head_route) == (None, None)
    with router.use(route, head):
        assert (router.route, router.head_route) == (route, head)
    assert (router.route, router.head_route) == (None, None)


def test_the_router_is_cleared_after_an_exception() -> None:
    router = Router()
    with pytest.raises(ZeroDivisionError), router.use(Route.uniform({"a": 1.0})):
        raise ZeroDivisionError
    assert (router.route, router.head_route) == (None, None)


def test_routes_do_not_nest() -> None:
    router, outer = Router(), Route.uniform({"a": 1.0})
    with router.use(outer):
        with pytest.raises(RuntimeError, match="already in use"), router.use(Route.uniform({})):
            pytest.fail("entered")
        assert (router.route, router.head_route) == (outer, outer)
    assert router.route is None
