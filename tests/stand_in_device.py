"""A stand-in for a device other than the host: tensors that say so, and what is asked of it, in order.

Its tensors are the host's underneath, and say that they are on "lazy", which this build has not. As on a GPU, an
operation may not mix them with the host's. What goes to the host is noted, and so is what happens outside of `begin`
(`lora_core.transfer.SideWork`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["AwayTensor", "StandInDevice", "bring_home"]

PLACE = torch.device("lazy", 0)
MAY_MIX = {"aten::_to_copy", "aten::copy_"}


class AwayTensor(torch.Tensor):
    """On the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "AwayTensor":
        out: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=PLACE
        )
        out.held = held
        return out  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the device, which nobody watches")

    def __deepcopy__(self, memo: Any) -> Any:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


@dataclass
class StandInDevice(TorchDispatchMode):
    """Computes on such tensors while it is entered (`SideWork`).

    Attributes:
        to_host: shapes of what went to the host.
        num_beside, num_in_the_way: operations on the device inside of `begin`, and outside; views are none.
    """

    to_host: list[tuple[int, ...]] = field(default_factory=list)
    num_beside: int = 0
    num_in_the_way: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def begin(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def take(self, model: nn.Module) -> None:
        """Put a model's parameters and buffers on the device, in place."""
        with self:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    module._parameters[name] = nn.Parameter(AwayTensor(parameter.detach()), requires_grad=False)
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module._buffers[name] = AwayTensor(buffer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, AwayTensor)]
        goes_away = kwargs.get("device") == PLACE
        if not away and not goes_away:
            return func(*args, **kwargs)
        if not func.is_view:
            self.num_beside += bool(self.depth)
            self.num_in_the_way += not self.depth
        name = func._schema.name
        assert name in MAY_MIX or all(isinstance(t, AwayTensor) or not t.ndim for t in tensors), f"{name} mixes devices"
        goes_home = kwargs.get("device") == torch.device("cpu") or (
            name == "aten::copy_" and not isinstance(args[0], AwayTensor)
        )
        if goes_home:
            self.to_host.append(tuple(away[0].shape))
        own_args, own_kwargs = tree_map(_held, (args, kwargs))
        if goes_away:
            own_kwargs["device"] = torch.device("cpu")
        out = func(*own_args, **own_kwargs)
        if name == "aten::copy_":
            return args[0]
        return out if goes_home else tree_map(_away, out)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, AwayTensor) else leaf


def _away(leaf: Any) -> Any:
    return AwayTensor(leaf) if isinstance(leaf, Tensor) else leaf


def bring_home(tensor: Tensor) -> Tensor:
    return _held(tensor)  # type: ignore[no-any-return]
