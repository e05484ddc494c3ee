"""From a prompt in a request to a stream of tokens: the one way into the engine."""

import asyncio
import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.delivery import Charge, Delivery, GenerationGroup, charge_nobody
from server.engine import EngineLoop, GenerationRequest, SamplingParams
from server.engine.ports import AdapterLease
from server.errors import ContextLengthError, InvalidRequestError
from server.structured import Grammar, StructuredOutput, TokenMasks
from server.text import StopRule, TextCodec

__all__ = ["AdapterDirectory", "GenerationService", "GenerationTask"]

MAX_SEEDS = 1 << 64


class NamedLease(AdapterLease, Protocol):
    """A lease that knows under which names and generations it was asked for."""

    @property
    def generations(self) -> Mapping[str, int]: ...


class AdapterDirectory(Protocol):
    """Turns names into leases."""

    def open_lease(self, weights: Mapping[str, float]) -> NamedLease | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """What a caller wants: some sequences for each of some prompts.

    Attributes:
        prompts: texts, or token ids.
        sampling: `max_new_tokens` 0 stands for the default; the i-th sequence of a prompt has the seed plus i.
        adapters: weight by name; empty for the base model.
        bad_words: texts that may not come out, as they stand or after a space.
        truncate: keep this many tokens of a prompt, the last ones.
    """

    prompts: Sequence[str | Sequence[int]]
    sampling: SamplingParams
    num_sequences: int = 1
    adapters: Mapping[str, float] = field(default_factory=dict)
    stop: StopRule = field(default_factory=StopRule)
    bad_words: Sequence[str] = ()
    grammar: Grammar | None = None
    add_special_tokens: bool = True
    truncate: int | None = None


class GenerationService:
    """Starts generations.

    Args:
        default_max_new_tokens: for requests that name none; cut to what the context leaves.
    """

    def __init__(
        self,
        engine: EngineLoop,
        codec: TextCodec,
        adapters: AdapterDirectory,
        delivery: Delivery,
        structured: StructuredOutput,
        *,
        default_max_new_tokens: int,
    ) -> None:
        self.engine = engine
        self.codec = codec
        self._adapters = adapters
        self._delivery = delivery
        self._structured = structured
        self._default_max_new_tokens = default_max_new_tokens
        self._tenant = ""
        self._charge: Charge = charge_nobody

    def for_caller(self, adapters: AdapterDirectory, *, tenant: str, charge: Charge) -> "GenerationService":
        """The same for one caller.

        Args:
            adapters: those that it knows.
            tenant: whose its requests are; tenants share the engine fairly.
            charge: is told what its requests use.
        """
        service = copy.copy(self)
        service._adapters = adapters
        service._tenant = tenant
        service._charge = charge
        return service

    async def start(self, task: GenerationTask) -> GenerationGroup:
        """Submit a task's sequences: all of them, those of the first prompt first, or none.

        Raises:
            ServerError: unknown adapter, prompt too long, queue full, and so on; nothing was started then.
        """
        group = GenerationGroup(self.engine, self._charge)
        leases: list[NamedLease | None] = []
        num_submitted = 0
        try:
            leases += (self._adapters.open_lease(task.adapters) for _ in range(len(task.prompts) * task.num_sequences))
            if leases[0] is not None:
                group.adapter_generations = leases[0].generations
            prompts, constraints = await asyncio.to_thread(self._prepare, task)
            sampling = self._checked_sampling(task, prompts)
            self._charge(sum(map(len, prompts)))
            for i, lease in enumerate(leases):
                ids = prompts[i // task.num_sequences]
                request = GenerationRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=ids,
                    sampling=replace(sampling, seed=(sampling.seed + i % task.num_sequences) % MAX_SEEDS),
                    emit=self._delivery.emitter(group, i),
                    lease=lease,
                    tenant=self._tenant,
                    cache_salt=self._tenant,
                    flow=tuple(sorted(task.adapters)),
                    text=self.codec.stream(ids, task.stop),
                    constraint=constraints[i] if constraints else None,
                )
                group.add(request)
                self.engine.submit(request)
                num_submitted += 1
        except BaseException:
            group.cancel()
            for lease in leases[num_submitted:]:
                if lease is not None:
                    lease.release()
            raise
        return group

    def _prepare(self, task: GenerationTask) -> tuple[list[list[int]], list[TokenMasks]]:
        """On a worker thread: each prompt's tokens, and each sequence's constraint."""
        prompts = [self._encode(prompt, task) for prompt in task.prompts]
        if task.grammar is None:
            return prompts, []
        return prompts, self._structured.open(task.grammar, len(prompts) * task.num_sequences)

    def _encode(self, prompt: str | Sequence[int], task: GenerationTask) -> list[int]:
        if isinstance(prompt, str):
            ids = self.codec.encode(prompt, add_special_tokens=task.add_special_tokens)
        else:
            ids = list(prompt)
            self._check_token_ids(ids, "prompt")
        return ids if task.truncate is None else ids[-task.truncate :]

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        unknown = next((i for i in token_ids if not 0 <= i < self.codec.vocab_size), None)
        if unknown is not None:
            message = f"`{param}`: the model has no token {unknown}; its vocabulary has {self.codec.vocab_size}"
            raise InvalidRequestError(message, code="token_unknown", param=param)

    def _checked_sampling(self, task: GenerationTask, prompts: Sequence[Sequence[int]]) -> SamplingParams:
        """The task's sampling, complete, once every prompt is known to fit with its output."""
        sampling = task.sampling
        self._check_token_ids(list(sampling.logit_bias), "logit_bias")
        longest = max(len(ids) for ids in prompts)
        if not sampling.max_new_tokens:
            room = self.engine.runner.max_model_len - longest
            sampling = replace(sampling, max_new_tokens=max(1, min(self._default_max_new_tokens, room)))
        limit = self.engine.runner.max_model_len
        if longest + sampling.max_new_tokens > limit:
            raise ContextLengthError(limit, longest, sampling.max_new_tokens)
        if task.bad_words:
            sampling = replace(sampling, bad_words=self._bad_words(task.bad_words))
        return sampling

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        spellings = dict.fromkeys(form for word in words for form in (word, " " + word.lstrip()))
        encoded = (tuple(self.codec.encode(text, add_special_tokens=False)) for text in spellings)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))
