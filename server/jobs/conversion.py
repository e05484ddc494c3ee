"""Converting an adapter on its way in, in a process of its own as jobs are: see `server.adapters.intake.Converter`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.jobs.process import WorkProcess

__all__ = ["ConversionProcess"]


class ConversionProcess:
    """Makes adapters of changed bases plain ones; may be called from several threads.

    Args:
        base: folder of the base model; starting values can be computed from it unless its files are quantized.
    """

    def __init__(self, base: Path, make_process: Callable[[], WorkProcess] = WorkProcess) -> None:
        self._base = base
        self._make_process = make_process

    def __call__(self, adapter: Path, initial: Path | None, out: Path) -> Mapping[str, Any]:
        task = {"kind": "convert", "base": str(self._base), "adapter": str(adapter), "out": str(out)}
        if initial is not None:
            task["initial"] = str(initial)
        return self._make_process().run(task, lambda _stage, _fraction: None)
