"""A stand-in for a device that runs behind the host: what it is given happens when somebody waits for it, not before.

The host's part of a step is done at launch, as on a device: which tokens, blocks, adapters, sampling parameters and
random numbers. Whoever frees or changes on the host what a step under way still needs gets other tokens.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from server.engine import GenerationRequest, ModelRunner
from server.engine import loop as loop_module
from server.engine.adjust import needs_adjusting
from server.engine.batch import Batch

__all__ = ["LateDevice"]


class Late:
    """Something that the device will have computed."""

    def __init__(self, device: "LateDevice", compute: Callable[[], Any], slots: Iterable[Any] = ()) -> None:
        self.slots = set(slots)
        self._device = device
        self._compute = compute
        self._value: Any = None
        device.queue.append(self)

    def run(self) -> None:
        self._value = self._compute()

    @property
    def value(self) -> Any:
        """For what runs on the device later."""
        return self._value

    def wait(self) -> Any:
        """For the host."""
        self._device.run_until(self)
        return self._value

    def __getitem__(self, rows: torch.Tensor) -> "Late":
        return Late(self._device, lambda: self._value[rows])


@dataclass
class LateDrawn:
    """As `Drawn`; its tokens are late."""

    drawn: Late
    tokens: Late

    def read(self) -> Any:
        return self.drawn.wait().read()


@dataclass
class LateDevice:
    """What was launched and has not happened.

    Attributes:
        num_late: steps that were drawn from later than they were launched.
    """

    queue: deque[Late] = field(default_factory=deque)
    num_late: int = 0

    def run_until(self, late: Late) -> None:
        while late in self.queue:
            self.queue.popleft().run()

    def install(self, runner: ModelRunner, patch: pytest.MonkeyPatch) -> None:
        """Put it between the engine loops of this patch and a runner."""
        forward, draw = runner.forward, loop_module.draw

        def late_forward(batch: Batch, last: Any = None) -> Late:
            own = replace(batch, spans=[span._replace(blocks=list(span.blocks)) for span in batch.spans])
            slots = batch.route.segments
            logits = Late(self, lambda: forward(own, None if last is None else last.value).clone(), slots)
            if batch.prompt_rows:
                return logits.wait()  # type: ignore[no-any-return]
            return logits

        def late_draw(logits: Any, requests: Sequence[GenerationRequest], **options: Any) -> Any:
            own = [copy.copy(request) for request in requests]
            for request in own:
                request.output_ids = list(request.output_ids)
            compute = Late(self, lambda: draw(logits.value if isinstance(logits, Late) else logits, own, **options))
            tokens = Late(self, lambda: compute.value.tokens)
            if any(map(needs_adjusting, requests)):
                tokens.wait()
            self.num_late += tokens in self.queue
            return LateDrawn(compute, tokens)

        patch.setattr(runner, "forward", late_forward)
        patch.setattr(runner, "settle", lambda: [self.queue.popleft().run() for _ in range(len(self.queue))])
        patch.setattr(loop_module, "draw", late_draw)

    def is_done_with(self, slot: int) -> bool:
        """Nothing that has not happened reads a slot's adapter."""
        return all(slot not in late.slots for late in self.queue)
