"""What `/v1/completions` and `/v1/chat/completions` have in common, vLLM's and LoRAX's additions included."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from server.engine import SamplingParams
from server.errors import InvalidRequestError
from server.schemas.body import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_MIX_ENTRIES,
    MAX_SEED,
    MAX_SEQUENCES,
    MAX_STOP_STRINGS,
    AdapterBody,
    AdapterName,
    Body,
    MergedAdapters,
    MixEntry,
    StopString,
    TokenId,
    chosen_weights,
)
from server.schemas.grammars import Choices, ResponseFormat, StructuredOutputs
from server.structured import Grammar

__all__ = ["OpenAIBody", "StreamOptions"]

MIN_SEED = -(1 << 63)
TOKEN_KEY = re.compile(r"[0-9]{1,9}", re.ASCII)


class StreamOptions(Body):
    """What a stream shows beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIBody(AdapterBody):
    """Fields of both routes."""

    model: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="the base model, an adapter `name`, `name@generation`, or `base:name`"
    )
    adapter_id: AdapterName | None = None
    adapter_source: Literal["hub", "local"] | None = None
    api_token: str | None = None
    merged_adapters: MergedAdapters | None = None
    adapters: list[MixEntry] | None = Field(None, max_length=MAX_MIX_ENTRIES)

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 for all")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_LOGIT_BIASES)
    bad_words: list[StopString] | None = Field(None, max_length=MAX_BAD_WORDS)
    min_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=MIN_SEED, le=MAX_SEED)
    n: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = Field(None, min_length=1, max_length=1_024)
    guided_grammar: str | None = None

    use_beam_search: Any = None
    num_beams: Any = None
    length_penalty: Any = None
    prompt_logprobs: Any = None
    logits_processors: Any = None
    allowed_token_ids: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "use_beam_search": (False,),
        "num_beams": (1,),
        "length_penalty": (1, 1.0),
        "prompt_logprobs": (),
        "logits_processors": ([],),
        "allowed_token_ids": (),
    }

    @property
    def num_sequences(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Of a stream: one more chunk at its end, with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def weights(self) -> dict[str, float]:
        """Weight by adapter name, of the fields beside `model`. Errors as in `chosen_weights`."""
        return chosen_weights(self.adapter_id, self.merged_adapters, self.adapters)

    def as_grammar(self) -> Grammar | None:
        """The form that the output must have; None if it is free.

        Raises:
            InvalidRequestError: it is given twice, or not whole.
        """
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        candidates = [
            None if self.response_format is None else self.response_format.as_grammar("response_format"),
            None if self.structured_outputs is None else self.structured_outputs.as_grammar("structured_outputs"),
            guided.as_grammar("guided_json"),
        ]
        given = [grammar for grammar in candidates if grammar is not None]
        if len(given) > 1:
            raise InvalidRequestError("give only one form of structured output", param=given[1].param)
        return given[0] if given else None

    def sampling(
        self, seed: int, *, max_new_tokens: int, num_top_logprobs: int | None, prompt_logprobs: bool = False
    ) -> SamplingParams:
        """How to sample; `seed` is used if none is given. `num_top_logprobs` None asks for no log-probabilities.

        Raises:
            InvalidRequestError: a key of `logit_bias` is no token id.
        """
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            logit_bias=_token_keys(self.logit_bias or {}),
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            typical_p=self.typical_p or 1.0,
            seed=(seed if self.seed is None else self.seed) % (1 << 64),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos or self.ignore_eos_token),
            logprobs=num_top_logprobs is not None,
            num_top_logprobs=num_top_logprobs or 0,
            prompt_logprobs=prompt_logprobs,
        )


def _token_keys(biases: Mapping[str, float]) -> dict[int, float]:
    wrong = next((key for key in biases if not TOKEN_KEY.fullmatch(key)), None)
    if wrong is not None:
        raise InvalidRequestError("`logit_bias`: its keys must be token ids", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}
