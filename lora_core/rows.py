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


def call_by_rows(router: Router, route: Route, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call(weights, *args, **kwargs)` for every distinct weighting of the route, each on its own rows.

    Tensors among the arguments are split where their leading dimensions, taken together, are a multiple of the route's
    rows; others are passed whole. While a call runs, `router` has the route of its rows.

    Returns:
        The output, a tensor or a tuple of tensors, with the leading dimensions of the first tensor that was split.

    Raises:
        UnsupportedError: the rows differ and the module gives something else than tensors with a row per input row.
    """
    groups = _groups(route)
    if len(groups) == 1:
        return call(groups[0][0], *args, **kwargs)
    values = (*args, *kwargs.values())
    first = next((v for v in values if isinstance(v, Tensor) and _depth(v, route.num_rows)), None)
    if first is None:
        raise UnsupportedError("a module that an adapter replaces has no input with a row for each row of the batch")
    lead = first.shape[: _depth(first, route.num_rows)]
    num_tokens = lead.numel()
    parts = []
    for weights, rows in groups:
        index = _token_index(rows, num_tokens // route.num_rows).to(first.device)
        own_args = [_select(value, index, num_tokens, route.num_rows) for value in args]
        own_kwargs = {name: _select(value, index, num_tokens, route.num_rows) for name, value in kwargs.items()}
        with router.within(Route.uniform(weights)):
            parts.append((index, call(weights, *own_args, **own_kwargs)))
    return _gather(parts, lead)


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


def _groups(route: Route) -> list[tuple[Weights, list[int]]]:
    """Distinct weightings with their rows; kept with the route."""
    key = "rows.groups"
    if key not in route.cache:
        found: dict[frozenset[tuple[Key, float]], tuple[Weights, list[int]]] = {}
        start = 0
        for weights, num_rows in route.runs:
            wanted = {name: weight for name, weight in weights.items() if weight != 0.0}
            found.setdefault(frozenset(wanted.items()), (wanted, []))[1].extend(range(start, start + num_rows))
            start += num_rows
        route.cache[key] = list(found.values())
    return route.cache[key]  # type: ignore[return-value]


def _depth(tensor: Tensor, num_rows: int) -> int:
    """So many leading dimensions hold a multiple of `num_rows` elements, at least one each; 0 if none do."""
    count = 1
    for depth, size in enumerate(tensor.shape, 1):
        count *= size
        if count and count % num_rows == 0:
            return depth
    return 0


def _token_index(rows: list[int], tokens_per_row: int) -> Tensor:
    index = torch.tensor(rows)[:, None] * tokens_per_row + torch.arange(tokens_per_row)
    return index.flatten()
