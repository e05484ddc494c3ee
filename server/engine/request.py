"""A generation request: what is asked for, what has become of it, and the events it ends in."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from lora_core import Key
from server.engine.ports import AdapterLease, TokenText
from server.errors import ServerError

__all__ = ["Event", "Failed", "FinishReason", "Finished", "GenerationRequest", "SamplingParams", "Token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token and when to stop; checked where it enters the server.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens whose probabilities reach p together, after `top_k`.
        seed: the draw at a position depends on the seed and the position alone, not on the batch.
        stop_token_ids: end like the end-of-sequence token does, also under `ignore_eos`.
        logprobs: report each token's log-probability under the model, before temperature and truncation.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: bool = False


class FinishReason(Enum):
    """Why a request ended; the values are TGI's words."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` is what it adds to the output."""

    token_id: int
    text: str
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that ran to its end or was cancelled."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that could not be completed."""

    error: ServerError


Event = Token | Finished | Failed


@dataclass(eq=False, slots=True)
class GenerationRequest:
    """One sequence from prompt to last event. Only the engine thread changes it once it is submitted.

    Attributes:
        prompt_ids: never empty; with `max_new_tokens` within the engine's context length.
        emit: takes the request's events, in order; called on the engine thread, must not wait.
        lease: the adapters, or None for the base model.
        text: turns tokens into text; None if nobody wants text.
        num_computed: tokens whose keys and values are in the cache.
        block_ids: the cache blocks that hold them.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    emit: Callable[[Event], None]
    lease: AdapterLease | None = None
    text: TokenText | None = None
    arrival: int = -1
    arrived_s: float = 0.0
    admitted_s: float | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not seen yet: 1 in steady decoding."""
        return self.num_tokens - self.num_computed

    @property
    def route_key(self) -> Hashable:
        return None if self.lease is None else self.lease.key

    @property
    def route_weights(self) -> Mapping[Key, float]:
        return {} if self.lease is None else self.lease.slots

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return self.prompt_ids[start:stop] + self.output_ids[: max(stop - split, 0)]
