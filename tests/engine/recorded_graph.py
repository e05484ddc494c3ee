"""CUDA graphs in tests, or a stand-in: every operation of a run is noted with its tensors, and done again.

As in a graph, numbers that Python saw are fixed, addresses are fixed, and asking a tensor for its value is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from server.engine.graphs import CudaCapture
from tests.device import DEVICE

SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


@dataclass
class RecordedCalls(TorchDispatchMode):
    """Notes PyTorch's operations and the interpreter's kernel launches."""

    calls: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in SYNCS:
            raise RuntimeError(f"{func} asks the device for a value")
        out = func(*args, **(kwargs or {}))
        outputs = _tensors(out)
        memory = {_address(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [_address(tensor) not in memory for tensor in outputs]  # a reshape is a view, or is not

        def again() -> None:
            results = _tensors(func(*args, **(kwargs or {})))
            for target, source, is_fresh in zip(outputs, results, fresh, strict=True):
                if is_fresh:
                    target.copy_(source)

        mutates = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if mutates or any(fresh):
            self.calls.append(again)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.is_mkldnn is False else id(tensor)


class RecordingCapture:
    """The `Capture` of tests: a graph where there is a GPU."""

    def __init__(self, monkeypatch: Any) -> None:
        self._monkeypatch = monkeypatch
        self._graphs = CudaCapture() if DEVICE.type == "cuda" else None
        self.num_recordings = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.num_recordings += 1
        return self._note(run) if self._graphs is None else self._graphs(run)

    def _note(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded = RecordedCalls()
        launch = interpreter.GridExecutor.__call__

        def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            recorded.calls.append(lambda: launch(executor, *args, **kwargs))

        with self._monkeypatch.context() as patch, torch.inference_mode(), recorded:
            patch.setattr(interpreter.GridExecutor, "__call__", noted)
            output = run()

        def replay() -> None:
            with torch.inference_mode():
                for call in recorded.calls:
                    call()

        return replay, output
