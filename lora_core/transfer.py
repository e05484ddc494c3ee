"""Copies to the device, and work on it, beside a running step.

Whoever brings an adapter to the device waits until it is there before anybody may route to it; so no step ever waits
for a copy, and none reads half of one. On CUDA the copies run on a stream of their own, and so does what it takes to
make an adapter ready where the base weights are.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Copies",
    "DirectCopies",
    "DirectWork",
    "SideWork",
    "StreamCopies",
    "StreamWork",
    "copies_for",
    "side_work_for",
]


class Copies(Protocol):
    """Some copies that belong together; used by one thread at a time."""

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        """[num_bytes] uint8, for `copy` to write."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy; `source` must stay as it is until `finish`."""

    def finish(self) -> None:
        """Wait until everything has arrived."""


class DirectCopies:
    """Copies at once (`Copies`)."""

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self) -> None: ...


class StreamCopies:
    """Copies on a CUDA stream of their own (`Copies`), behind what its maker has given the device.

    Memory comes from that stream too: what a freed adapter leaves is written again by later copies only. These do not
    wait for the steps under way, so that nobody may free an adapter before the last step that reads it is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._sources: list[Tensor] = []

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._sources.append(source)

    def finish(self) -> None:
        _wait_for(self._stream)
        self._sources.clear()


def copies_for(device: torch.device) -> Copies:
    """The way to copy to a device."""
    return StreamCopies(device) if device.type == "cuda" else DirectCopies()


class SideWork(Protocol):
    """Where threads other than the engine's compute on the device; several may at once."""

    def begin(self) -> AbstractContextManager[None]:
        """What the device is given inside runs beside the steps, and is done at the end."""


class DirectWork:
    """Computes as everybody does (`SideWork`)."""

    def begin(self) -> AbstractContextManager[None]:
        return nullcontext()


class StreamWork:
    """Computes on a CUDA stream of its own (`SideWork`), behind what its maker has given the device.

    Steps wait neither for it nor it for them. What it makes is there for everybody at the end; as with `StreamCopies`,
    nobody may free it before the last step that reads it is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def begin(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield
            _wait_for(self._stream)


def side_work_for(device: torch.device) -> SideWork:
    """The way to compute on a device."""
    return StreamWork(device) if device.type == "cuda" else DirectWork()


def _wait_for(stream: torch.cuda.Stream) -> None:
    done = torch.cuda.Event(blocking=True)  # the thread sleeps; it does not spin
    done.record(stream)
    done.synchronize()
