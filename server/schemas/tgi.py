"""Bodies of `/`, `/generate` and `/generate_stream`, in the shape that TGI's and LoRAX's clients send and read."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from server.engine import SamplingParams
from server.errors import InvalidRequestError
from server.schemas.body import (
    MAX_BAD_WORDS,
    MAX_MIX_ENTRIES,
    MAX_SEED,
    MAX_SEQUENCES,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    AdapterBody,
    AdapterName,
    MergedAdapters,
    MixEntry,
    StopString,
    TokenId,
    chosen_weights,
)
from server.schemas.grammars import ResponseFormat
from server.structured import Grammar

__all__ = ["GenerateParameters", "GenerateRequest"]


class GenerateParameters(AdapterBody):
    """Parameters of a generation. What is known but not supported is refused by `refuse_unsupported`."""

    adapter_id: AdapterName | None = Field(None, description="adapter name; null for the base model")
    adapter_source: Literal["hub", "local"] | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    min_new_tokens: int | None = Field(None, ge=0)
    bad_words: list[StopString] | None = Field(None, max_length=MAX_BAD_WORDS)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: list[StopString] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos_token: bool | None = None
    truncate: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    return_k_alternatives: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    grammar: ResponseFormat | None = None

    watermark: bool | None = None
    num_beams: Any = None
    use_beam_search: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "watermark": (False,),
        "num_beams": (1,),
        "use_beam_search": (False,),
    }

    @property
    def num_sequences(self) -> int:
        return self.best_of or 1

    @property
    def wants_details(self) -> bool:
        return bool(self.details or self.decoder_input_details)

    def sampling(self, seed: int) -> SamplingParams:
        """How to sample; `max_new_tokens` 0 leaves the length to the server. `seed` is used if none is given.

        Raises:
            InvalidRequestError: `best_of` with a seed, or without sampling.
        """
        top_p, typical_p = (None if value == 1 else value for value in (self.top_p, self.typical_p))
        draws = (self.do_sample, self.top_k, top_p, typical_p)
        temperature = self.temperature
        if temperature is None or (temperature == 1 and not any(draws)):
            temperature = 1.0 if any(draws) else 0.0
        if self.num_sequences > 1 and (temperature == 0 or self.seed is not None):
            raise InvalidRequestError("`best_of` needs sampling, without a `seed`", param="best_of")
        return SamplingParams(
            max_new_tokens=self.max_new_tokens or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            min_tokens=self.min_new_tokens or 0,
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=top_p or 1.0,
            min_p=self.min_p or 0.0,
            typical_p=typical_p or 1.0,
            seed=seed if self.seed is None else self.seed,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos_token),
            logprobs=True,
            num_top_logprobs=max(self.top_n_tokens or 0, self.return_k_alternatives or 0),
            prompt_logprobs=bool(self.decoder_input_details),
        )

    def as_grammar(self) -> Grammar | None:
        """The form that the output must have; None if it is free.

        Raises:
            InvalidRequestError: it is given twice, or not whole.
        """
        if self.grammar is not None and self.response_format is not None:
            raise InvalidRequestError("give only one of `grammar` and `response_format`", param="grammar")
        if self.grammar is not None:
            return self.grammar.as_grammar("grammar")
        return None if self.response_format is None else self.response_format.as_grammar("response_format")


class GenerateRequest(AdapterBody):
    """A prompt, and which adapters answer it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "What is the capital of France?", "parameters": {"adapter_id": "pirate"}},
                {
                    "inputs": "What is the capital of France?",
                    "adapters": [{"name": "pirate", "weight": 1.0}, {"name": "json", "weight": 1.0}],
                },
            ]
        }
    )

    inputs: str = Field(min_length=1)
    stream: bool | None = None
    parameters: GenerateParameters | None = None
    adapters: list[MixEntry] | None = Field(None, max_length=MAX_MIX_ENTRIES)

    @property
    def settings(self) -> GenerateParameters:
        """The parameters, all unset if there are none."""
        return self.parameters or GenerateParameters()

    def weights(self) -> dict[str, float]:
        """Weight by adapter name; empty if none is named. Errors as in `chosen_weights`."""
        return chosen_weights(self.settings.adapter_id, self.settings.merged_adapters, self.adapters)
