"""Running a module once per distinct mix of adapters, on the rows that want it.

For modules whose output is no sum of a base part and adapter parts: whole copies of a module, weights of experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UnsupportedError
from lora_core.routing import Key, Route, Router

__all__ = ["call_by_rows"]

Weights = Mapping[Any, float]


def call_by_rows(
    router: Router, route: Route, knows: Callable[[Key], bool], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`call(weights, *args, **kwargs)` for every distinct weighting of the adapters that the module knows.

    Each call is for its own rows; rows that differ in other adapters only share one. Tensors among the arguments are
    split where their leading dimensions, taken together, are a multiple of the route's rows; others are passed whole.
    While a call runs, `router` has the route of its rows.

    Returns:
        The output, a tensor or a tuple of tensors, with the leading dimensions of the first tensor that was split.

    Raises:
        UnsupportedError: the rows differ and the module gives something else than tensors with a row per input row.
    """
    known = frozenset(key for key in route.segments if knows(key))
    groups = _groups(route, known)
    if len(groups) == 1:
        return call(groups[0].weights, *args, **kwargs)
    values = (*args, *kwargs.values())
    first = next((v for v in values if isinstance(v, Tensor) and _depth(v, route.num_rows)), None)
    if first is None:
        raise UnsupportedError("a module that an adapter replaces has no input with a row for each row of the batch")
    lead = first.shape[: _depth(first, route.num_rows)]
    num_tokens = lead.numel()
    parts = []
    for group in groups:
        index = group.token_index(num_tokens // route.num_rows, first.device)
        own_args = [_select(value, index, num_tokens, route.num_rows) for value in args]
        own_kwargs = {name: _select(value, index, num_tokens, route.num_rows) for name, value in kwargs.items()}
        with router.within(group.route):
            parts.append((index, call(group.weights, *own_args, **own_kwargs)))
    return _gather(parts, lead)


class _Group:
    """Rows that want the same of a module.

    Args:
        weights: of the adapters that the module knows.
        rows: in ascending order.
        route: of these rows alone.
    """

    def __init__(self, weights: Weights, rows: list[int], route: Route) -> None:
        self.weights = weights
        self.rows = rows
        self.route = route.select(rows)
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def token_index(self, tokens_per_row: int, device: torch.device) -> Tensor:
        """Where the rows' tokens are, [len(rows)·tokens_per_row]; made once for all modules."""
        key = (tokens_per_row, device)
        if key not in self._indices:
            starts = torch.tensor(self.rows, device=device)[:, None] * tokens_per_row
            self._indices[key] = (starts + torch.arange(tokens_per_row, device=device)).flatten()
        return self._indices[key]


def _select(value: Any, index: Tensor, num_tokens: int, num_rows: int) -> Any:
    if not isinstance(value, Tensor) or not (depth := _depth(value, num_rows)):
        return value
    flat = value.flatten(0, depth - 1)
    return flat.index_select(0, index) if flat.shape[0] == num_tokens else value


def _gather(parts: list[tuple[Tensor, Any]], lead: torch.Size) -> Any:
    """Put the groups' outputs back in the order of the rows."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_gather([(index, out[i]) for index, out in parts], lead) for i in range(len(first)))
    if not all(isinstance(out, Tensor) and out.ndim and out.shape[0] == len(index) for index, out in parts):
        raise UnsupportedError("a module that an adapter replaces does not give tensors with a row per input row")
    gathered = first.new_zeros(lead.numel(), *first.shape[1:])
    for index, out in parts:
        gathered = gathered.index_copy(0, index, out)
    return gathered.unflatten(0, lead)


def _groups(route: Route, known: frozenset[Key]) -> list[_Group]:
    """The rows by what they want of these adapters; kept with the route."""
    key = ("rows.groups", known)
    if key not in route.cache:
        found: dict[frozenset[tuple[Key, float]], tuple[Weights, list[int]]] = {}
        start = 0
        for weights, num_rows in route.runs:
            wanted = {name: weight for name, weight in weights.items() if weight != 0.0 and name in known}
            if num_rows:
                found.setdefault(frozenset(wanted.items()), (wanted, []))[1].extend(range(start, start + num_rows))
            start += num_rows
        route.cache[key] = [_Group(weights, rows, route) for weights, rows in found.values()]
    return route.cache[key]  # type: ignore[return-value]


def _depth(tensor: Tensor, num_rows: int) -> int:
    """So many leading dimensions hold a multiple of `num_rows` elements, at least one each; 0 if none do."""
    count = 1
    for depth, size in enumerate(tensor.shape, 1):
        count *= size
        if count and count % num_rows == 0:
            return depth
    return 0
