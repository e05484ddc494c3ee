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
from server.engine.batch import Batch, PromptRows

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
class LatePrompts:
    """As `PromptLogprobs`; what it notes is late."""

    prompts: Late

    def note(self) -> None:
        self.prompts.wait().note()


@dataclass
class LateDevice:
    """What was launched and has not happened.

    Attributes:
        num_late: steps that were drawn from later than they were launched.
        num_late_prompts: of them, those with log-probabilities of prompts.
        num_waits, num_waits_at_launch: how often the host waited for something that had not happened yet; and of these,
            while it gave the device a step.
    """

    queue: deque[Late] = field(default_factory=deque)
    num_late: int = 0
    num_late_prompts: int = 0
    num_waits: int = 0
    num_waits_at_launch: int = 0
    is_launching: bool = False

    def run_until(self, late: Late) -> None:
        self.num_waits += late in self.queue
        self.num_waits_at_launch += self.is_launching and late in self.queue
        while late in self.queue:
            self.queue.popleft().run()

    def install(self, runner: ModelRunner, patch: pytest.MonkeyPatch) -> None:
        """Put it between the engine loops of this patch and a runner."""
        forward, draw, prompt_logprobs = runner.forward, loop_module.draw, loop_module.PromptLogprobs
        launch = loop_module.EngineLoop._launch

        def late_forward(batch: Batch, last: Any = None) -> Late:
            own = replace(batch, spans=[span._replace(blocks=list(span.blocks)) for span in batch.spans])
            slots = batch.route.segments
            return Late(self, lambda: forward(own, None if last is None else last.value).clone(), slots)

        def late_prompts(logits: Late, rows: Sequence[PromptRows]) -> LatePrompts:
            self.num_late_prompts += bool(rows)
            return LatePrompts(Late(self, lambda: prompt_logprobs(logits.value, rows)))

        def noted_launch(engine: Any, step: Any) -> bool:
            self.is_launching = True
            try:
                return launch(engine, step)
            finally:
                self.is_launching = False

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
        patch.setattr(loop_module, "PromptLogprobs", late_prompts)
        patch.setattr(loop_module.EngineLoop, "_launch", noted_launch)

    def is_done_with(self, slot: int) -> bool:
        """Nothing that has not happened reads a slot's adapter."""
        return all(slot not in late.slots for late in self.queue)
