"""A generation request: what is asked for, what has become of it, and the events it ends in."""

from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lora_core import Key
from server.engine.ports import AdapterLease, TokenConstraint, TokenText
from server.errors import ServerError

__all__ = [
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "SamplingParams",
    "Token",
    "TokenCounts",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token and when to stop; checked where it enters the server.

    The logits are changed in the order in which the fields stand here, which is that of transformers' `generate`.

    Attributes:
        logit_bias: added to the logits, by token.
        repetition_penalty: the logits of tokens of prompt and output are divided by it, or multiplied if negative.
        frequency_penalty: taken off a token's logit for each time that it was generated.
        presence_penalty: taken off the logit of each token that was generated.
        bad_words: sequences of tokens that may not be completed.
        min_tokens: no end-of-sequence or stop token before so many tokens.
        temperature: 0 chooses the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens whose probabilities reach p together.
        min_p: only tokens at least so likely, as a share of the most likely one's probability.
        typical_p: only the tokens closest to the entropy whose probabilities reach p together.
        seed: the draw at a position depends on the seed and the position alone, not on the batch.
        stop_token_ids: end like the end-of-sequence token does, also under `ignore_eos`.
        logprobs: report each token's log-probability under the model, before anything above.
        num_top_logprobs: and those of so many of the most likely tokens.
        prompt_logprobs: and those of the prompt's tokens, in `GenerationRequest.prompt_logprobs`.
        adjusts: whether any of the fields up to `min_tokens` is in use.
    """

    max_new_tokens: int
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: bool = False
    num_top_logprobs: int = 0
    prompt_logprobs: bool = False
    adjusts: bool = field(init=False)

    def __post_init__(self) -> None:
        adjusts = self.penalises or bool(self.logit_bias) or bool(self.bad_words) or self.min_tokens > 0
        object.__setattr__(self, "adjusts", adjusts)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1


class FinishReason(Enum):
    """Why a request ended; the values are TGI's words."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, and the most likely tokens in its place with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` is what it adds to the output. `top` is as in `TokenLogprob`."""

    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that ran to its end or was cancelled."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that could not be completed."""

    error: ServerError


Event = Token | Finished | Failed


class TokenCounts:
    """The distinct tokens of one request, and how often each was generated.

    Attributes:
        ids: the distinct tokens, of the output and, if it was so made, of the prompt.
        counts: for each, how often the output has it.
    """

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self.ids = array("q", dict.fromkeys(prompt_ids))
        self.counts = array("f", bytes(4 * len(self.ids)))
        self._places = {token_id: place for place, token_id in enumerate(self.ids)}
        self._num_counted = 0

    def update(self, output_ids: Sequence[int]) -> None:
        """Count what has come since the last call."""
        for token_id in output_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += 1
        self._num_counted = len(output_ids)


@dataclass(eq=False, slots=True)
class GenerationRequest:
    """One sequence from prompt to last event. Only the engine thread changes it once it is submitted.

    Attributes:
        prompt_ids: never empty; with `max_new_tokens` within the engine's context length.
        emit: takes the request's events, in order; called on the engine thread, must not wait.
        lease: the adapters, or None for the base model.
        text: turns tokens into text; None if nobody wants text.
        tenant, flow: whose it is, and which of the tenant's adapters it is for; see Fairness.
        constraint: which tokens may come next; None if all may.
        prompt_logprobs: of the prompt's tokens from the second on, if wanted; complete before the first `Token`.
        token_counts: what the penalties count, kept by the sampler.
        num_computed: tokens whose keys and values are in the cache.
        block_ids: the cache blocks that hold them.
        num_charged: tokens that its tenant's counter has.
        priority: lower ones run first, and are preempted last; within one, in order of arrival.
        cache_salt: only requests with the same one share cached prompts.
        block_keys: of its full blocks, as far as they were needed (`prefix.PrefixKeys`).
        num_published: blocks, from the first on, that others can find or that were found.
        num_cached_tokens: tokens that were found in the cache when it last started.
        in_flight: the place of its next token among those of the step under way; None if none is on its way.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    emit: Callable[[Event], None]
    lease: AdapterLease | None = None
    text: TokenText | None = None
    tenant: str = ""
    flow: Hashable = None
    constraint: TokenConstraint | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    token_counts: TokenCounts | None = None
    arrival: int = -1
    arrived_s: float = 0.0
    admitted_s: float | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_charged: int = 0
    priority: int = 0
    cache_salt: str = ""
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int = 0
    is_finished: bool = False
    in_flight: int | None = None

    @property
    def num_output(self) -> int:
        """Generated tokens, with the one that is on its way."""
        return len(self.output_ids) + (self.in_flight is not None)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + self.num_output

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not seen yet and has to: 1 in steady decoding, 0 while the last one comes."""
        if self.in_flight is not None and self.num_output >= self.sampling.max_new_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def route_key(self) -> Hashable:
        return None if self.lease is None else self.lease.key

    @property
    def route_weights(self) -> Mapping[Key, float]:
        return {} if self.lease is None else self.lease.slots

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together; `-1 - in_flight` is the one that is on its way."""
        split = len(self.prompt_ids)
        known = self.prompt_ids[start:stop] if start < split else []
        known = known + self.output_ids[max(start - split, 0) : max(stop - split, 0)]
        if self.in_flight is not None and stop == self.num_tokens:
            known.append(-1 - self.in_flight)
        return known
