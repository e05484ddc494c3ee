"""EngineLoop: one thread that schedules, runs, samples and tells everybody what came of it, step after step.

Others talk to it through its inbox only. Whatever happens to a request, exactly one terminal event is emitted for it:
`Finished` or `Failed`.

On a device the next step is scheduled and launched while one runs (`ModelRunner.runs_ahead`); its inputs refer to the
tokens that only the device knows yet. What turns out to have ended is computed once more and thrown away.

    host     schedule 1, launch 1, schedule 2, launch 2, read 1, schedule 3, launch 3, read 2, …
    device                         step 1 ────────────▸ step 2 ────────────▸ step 3

Requests whose next logits depend on the token before (grammars, penalties, bans: `needs_adjusting`) are read first.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.allocator import trim
from server.engine.adjust import needs_adjusting
from server.engine.batch import PromptLogprobs, RouteMemo, build_batch
from server.engine.blocks import BlockPool
from server.engine.fairness import Fairness
from server.engine.ports import AdapterLease
from server.engine.request import Event, Failed, Finished, FinishReason, GenerationRequest, Token
from server.engine.runner import ModelRunner
from server.engine.sampling import Drawn, Sampled, draw
from server.engine.scheduler import Scheduler, Step
from server.engine.transfers import upload
from server.errors import (
    ContextLengthError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)

__all__ = ["EngineLoop", "EngineStats"]

logger = logging.getLogger(__name__)

# So many failed steps in a row mean that the fault is the engine's, not one request's.
MAX_FAILED_STEPS = 3
# An idle engine looks up after this long, in case somebody forgot to wake it.
IDLE_WAIT_S = 0.5
# A busy one gives memory back that often, which costs some hundredths of a second.
TRIM_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and health, made once a step.

    Attributes:
        num_steps_ahead: of the steps, those that were launched before the one before was read.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_steps_ahead: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the cache in use, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(slots=True)
class _Launched:
    """A step that the device has been given and whose tokens have not been read.

    Attributes:
        requests: those that get the tokens; a step of prompts' parts may have none, and is waited for all the same.
        prompts: log-probabilities that are wanted of prompts.
        leases: of requests that have ended since: the step may still read their adapters.
    """

    step: Step
    requests: list[GenerationRequest]
    prompts: PromptLogprobs
    drawn: Drawn
    begin_s: float
    leases: list[AdapterLease] = field(default_factory=list)


class EngineLoop:
    """Runs requests on a ModelRunner.

    Args:
        max_waiting: requests that may wait; one more is refused.
        num_threads: cores for the engine's own thread; None leaves PyTorch's threads as they are. With a number, every
            other thread is confined to one core from `start` on. GNU OpenMP falls back from spinning to sleeping, and
            each of a step's thousand short operators gets slower by half, as soon as two threads have teams of their
            own; so nobody but the engine may have one. The process must not have made one before, either.
        fairness: the order in which waiting requests start.
        on_step: called on the engine thread after each step, when its events have been emitted, and when idle.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_waiting: int = 512,
        num_threads: int | None = None,
        fairness: Fairness | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner = runner
        self.max_waiting = max_waiting
        self.stats = EngineStats()
        self._num_threads = num_threads
        self._on_step = on_step
        config = runner.config
        self._pool = BlockPool(runner.cache.num_blocks, config.block_size)
        self._scheduler = Scheduler(
            self._pool,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            fairness=fairness,
            target_step_s=config.target_step_s,
            use_prefix_cache=config.use_prefix_cache,
        )
        self._routes = RouteMemo()
        self._lock = threading.Lock()
        self._awake = threading.Event()
        self._submitted: list[GenerationRequest] = []
        self._cancelled: list[GenerationRequest] = []
        self._num_open = 0
        self._has_started = threading.Event()
        self._is_closing = False
        self._num_failed_steps = 0
        self._launched: list[_Launched] = []
        self._last_read_s = 0.0
        self._num_steps_ahead = 0
        self._thread = threading.Thread(target=self._run, name="loramux-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._has_started.wait()
        if self._num_threads is not None:
            torch.set_num_threads(1)  # for this thread, and for all that begin later

    @property
    def is_healthy(self) -> bool:
        """The thread runs and its last steps did not all fail."""
        return self._thread.is_alive() and self._num_failed_steps < MAX_FAILED_STEPS

    def check(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse what can never fit.

        Raises:
            ContextLengthError: the sequence would be longer than the context.
        """
        limit = self.runner.max_model_len
        if num_prompt_tokens + max_new_tokens > limit:
            raise ContextLengthError(limit, num_prompt_tokens, max_new_tokens)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; from here on the engine owns its lease.

        Raises:
            InvalidRequestError: it has no prompt, or can never fit.
            OverloadedError: too many requests wait.
            UnavailableError: the engine is closing or broken.
        """
        if not request.prompt_ids:
            raise InvalidRequestError("the prompt has no tokens", code="prompt_empty")
        self.check(len(request.prompt_ids), request.sampling.max_new_tokens)
        with self._lock:
            if self._is_closing or self._num_failed_steps >= MAX_FAILED_STEPS:
                raise UnavailableError("the engine is not running")
            if self._num_open >= self.max_waiting + self.runner.config.max_running:
                raise OverloadedError(f"{self._num_open} requests are in the queue already")
            self._num_open += 1
            self._submitted.append(request)
        self._awake.set()

    def cancel(self, request: GenerationRequest) -> None:
        """End a request early; what it holds is free before the next step. Ended and refused ones are left alone."""
        with self._lock:
            self._cancelled.append(request)
        self._awake.set()

    def wake(self) -> None:
        """Something that the engine waits for has changed: an adapter has come, or a slot."""
        self._awake.set()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the step under way; open requests fail. Calling it again does nothing."""
        with self._lock:
            self._is_closing = True
        self._awake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def check_integrity(self) -> None:
        """Assert that the books agree; for tests, while the engine is idle."""
        self._scheduler.check_integrity()
        self.runner.cache.check_integrity()
        self.runner.bank.check_integrity()
        assert self._num_open == len(self._scheduler.running) + len(self._scheduler.waiting)

    def _run(self) -> None:
        self.runner.enter_thread()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            torch.get_num_threads()  # settles it for this thread, before another thread sets its own number
        self._has_started.set()
        trimmed_s, num_steps_at_trim = time.monotonic(), 0
        try:
            while not self._is_closing:
                self._awake.clear()
                self._take_inbox()
                is_idle = not self._step()
                self._on_step()
                is_quiet = is_idle and not self._awake.wait(IDLE_WAIT_S)
                is_due = is_quiet or time.monotonic() > trimmed_s + TRIM_INTERVAL_S
                if is_due and self.stats.num_steps > num_steps_at_trim:
                    trim()
                    trimmed_s, num_steps_at_trim = time.monotonic(), self.stats.num_steps
        except BaseException:
            logger.exception("the engine thread died")
            raise
        finally:
            self._is_closing = True
            self._take_inbox()
            for request in [*self._scheduler.running, *self._scheduler.waiting]:
                self._end(request, Failed(UnavailableError("the server is shutting down", code="shutting_down")))
            self.runner.settle()
            while self._launched:
                self._release(self._launched.pop())
            self._on_step()

    def _take_inbox(self) -> None:
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        now = time.monotonic()
        for request in submitted:
            self._scheduler.add(request, now)
        for request in cancelled:
            if request.arrival >= 0 and not request.is_finished:
                self._end(request, Finished(FinishReason.CANCELLED))

    def _step(self) -> bool:
        """Launch a step, and read the one before it or this one; False if there was nothing to do."""
        must_read = self._launched and any(map(needs_adjusting, self._launched[0].requests))
        num_sampled = self._read() if must_read else 0
        was_busy = bool(self._launched)
        step = self._scheduler.schedule(time.monotonic())
        for request, error in step.failed:
            self._finish(request, Failed(error))
        has_launched = bool(step.chunks) and self._launch(step)
        if was_busy:
            num_sampled += self._read()
            self._num_steps_ahead += has_launched
        if has_launched:
            self._commit(self._launched[0])
            if not self.runner.runs_ahead:
                num_sampled += self._read()
        self._note_stats(step, num_sampled)
        return bool(step.chunks) or was_busy

    def _launch(self, step: Step) -> bool:
        """Give a step to the device; False if that failed."""
        begin_s = time.monotonic()
        runner = self.runner
        last = self._launched[0].drawn.tokens if self._launched and self._launched[0].requests else None
        try:
            batch = build_batch(step, self._pool.block_size, runner.device, self._routes, spans_only=runner.reads_spans)
            logits = runner.forward(batch, last)
            prompts = PromptLogprobs(logits, batch.prompt_rows)
            if batch.sampled_rows is not None:
                logits = logits[upload(batch.sampled_rows, runner.device, torch.long)]
            drawn = draw(logits, batch.sampled, eos_token_ids=runner.facts.eos_token_ids)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(step.chunks))
            runner.settle()  # what was launched before it failed reads adapters that are about to be released
            self._fail(step, error)
            return False
        self._launched.append(_Launched(step, batch.sampled, prompts, drawn, begin_s))
        return True

    def _commit(self, launched: _Launched) -> None:
        """From here on its tokens are on their way."""
        self._scheduler.commit(launched.step)
        for place, request in enumerate(launched.requests):
            request.in_flight = place

    def _read(self) -> int:
        """Wait for the oldest step and pass on what it gave; returns the number of new tokens."""
        launched = self._launched.pop(0)
        num_sampled = 0
        try:
            drawn = launched.drawn.read()
            launched.prompts.note()  # there by now, and complete before the first token is told
            for request, sampled in zip(launched.requests, drawn, strict=True):
                if not request.is_finished:  # else it has ended meanwhile
                    request.in_flight = None
                    self._advance(request, sampled)
                    num_sampled += 1
            now_s = time.monotonic()
            self._scheduler.note_duration(launched.step, now_s - max(launched.begin_s, self._last_read_s))
            self._last_read_s = now_s
            self._num_failed_steps = 0
        except Exception as error:
            logger.exception("a step of %d requests failed", len(launched.step.chunks))
            self._fail(launched.step, error)
        self._release(launched)
        return num_sampled

    def _fail(self, step: Step, error: Exception) -> None:
        self._num_failed_steps += 1
        for chunk in step.chunks:
            if not chunk.request.is_finished:
                self._end(chunk.request, Failed(GenerationError(f"a step failed: {type(error).__name__}")))

    def _release(self, launched: _Launched) -> None:
        for lease in launched.leases:
            lease.release()

    def _advance(self, request: GenerationRequest, sampled: Sampled) -> None:
        """Append a request's new token, emit it, and end the request if it is the last one."""
        if sampled.token_id is None:
            self._end(request, Failed(_no_token(sampled)))
            return
        token_id = sampled.token_id
        request.output_ids.append(token_id)
        is_complete = request.constraint is not None and request.constraint.accept(token_id)
        text, hit_stop = ("", False) if request.text is None else request.text.push(token_id)
        reason = FinishReason.STOP if hit_stop else self._finish_reason(request, token_id)
        if reason is None and is_complete:
            reason = FinishReason.EOS
        if reason is not None and request.text is not None and not hit_stop:
            text += request.text.finish()
        request.emit(Token(token_id, text, sampled.logprob, sampled.top))
        if reason is not None:
            self._end(request, Finished(reason))

    def _finish_reason(self, request: GenerationRequest, token_id: int) -> FinishReason | None:
        sampling = request.sampling
        is_eos = token_id in self.runner.facts.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return FinishReason.EOS
        return FinishReason.LENGTH if len(request.output_ids) >= sampling.max_new_tokens else None

    def _end(self, request: GenerationRequest, event: Event) -> None:
        if self._launched and request.lease is not None:
            self._launched[-1].leases.append(request.lease)
            request.lease = None
        self._scheduler.remove(request)
        self._finish(request, event)

    def _finish(self, request: GenerationRequest, event: Event) -> None:
        request.is_finished = True
        with self._lock:
            self._num_open -= 1
        request.emit(event)

    def _note_stats(self, step: Step, num_sampled: int) -> None:
        old, scheduler = self.stats, self._scheduler
        num_prompt = sum(max(min(c.stop, len(c.request.prompt_ids)) - c.start, 0) for c in step.chunks)
        self.stats = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=self._pool.num_usable,
            num_free_blocks=self._pool.num_free,
            num_steps=old.num_steps + bool(step.chunks),
            num_prompt_tokens=old.num_prompt_tokens + num_prompt,
            num_generated_tokens=old.num_generated_tokens + num_sampled,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_tokens=scheduler.num_prefix_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_steps_ahead=self._num_steps_ahead,
        )


def _no_token(sampled: Sampled) -> ServerError:
    if sampled.is_blocked:
        message = "no token is left that may come next: the grammar, the bad words and the bias exclude them all"
        return InvalidRequestError(message, code="no_token_allowed")
    return GenerationError("the model's output is not finite: the adapter overflows", code="output_not_finite")
