"""What the generating routes answer, for the OpenAPI document; the answers themselves are made as plain dicts."""

from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

__all__ = [
    "AnthropicError",
    "ChatAnswer",
    "CompletionAnswer",
    "GenerateAnswer",
    "MessagesAnswer",
    "OpenAIError",
    "TgiError",
    "error_schemas",
]

EndReason = Literal["length", "eos_token", "stop_sequence"]
FinishReason = Literal["stop", "length", "tool_calls"]


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class AlternativeToken(BaseModel):
    """One of the most likely tokens in a token's place."""

    id: int
    text: str
    logprob: float


class TopToken(AlternativeToken):
    """The same, as TGI shows it."""

    special: bool


class GeneratedToken(TopToken):
    """A generated token; the texts of those that are not special are the generated text."""

    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class SequenceDetails(BaseModel):
    """What is known of one sequence."""

    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]
    top_tokens: list[list[TopToken]] | None = None


class OtherSequence(SequenceDetails):
    """One of those that `best_of` left behind."""

    generated_text: str


class GenerateDetails(SequenceDetails):
    """`details`, if they were asked for."""

    prompt_tokens: int
    input_length: int
    skipped_tokens: int
    best_of_sequences: list[OtherSequence] | None = None


class GenerateAnswer(BaseModel):
    """The answer of `/generate`; `/` has a list of one."""

    generated_text: str
    details: GenerateDetails | None = None


class Usage(BaseModel):
    """Tokens of the prompts, and of all that was generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """An entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class OpenAIAnswer(BaseModel):
    """What both of OpenAI's answers have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class CompletionAnswer(OpenAIAnswer):
    """The answer of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CalledFunction(BaseModel):
    """`arguments` is JSON."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[AnsweredCall] | None = None


class LogprobEntry(BaseModel):
    """A token with its bytes, which may be part of a character."""

    token: str
    logprob: float
    bytes_: list[int] = Field(alias="bytes")


class ContentLogprob(LogprobEntry):
    """A token of the message."""

    top_logprobs: list[LogprobEntry]


class ChatLogprobs(BaseModel):
    """An entry per token."""

    content: list[ContentLogprob]
    refusal: None


class ChatChoice(BaseModel):
    """One message."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatAnswer(OpenAIAnswer):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None


class TgiError(BaseModel):
    """An error of TGI's routes; `code` is stable."""

    error: str
    error_type: str
    code: str | None = None
    param: str | None = None


class OpenAIErrorDetails(BaseModel):
    """`code` is stable."""

    message: str
    type: str
    code: str | None
    param: str | None


class OpenAIError(BaseModel):
    """An error of OpenAI's routes and our own."""

    error: OpenAIErrorDetails
    error_type: Any


class TextBlock(BaseModel):
    """A part of an answer."""

    type: Literal["text"]
    text: str


class MessagesUsage(BaseModel):
    """Tokens of the prompt and of the answer."""

    input_tokens: int
    output_tokens: int


class MessagesAnswer(BaseModel):
    """The answer of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"]
    stop_sequence: str | None
    usage: MessagesUsage


class AnthropicError(BaseModel):
    """An error of Anthropic's route."""

    type: Literal["error"]
    error: OpenAIErrorDetails


def error_schemas() -> dict[str, Any]:
    """JSON schemas of the errors and their parts by name, for an OpenAPI document."""
    models = (TgiError, OpenAIError, AnthropicError)
    _, errors = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    return errors["$defs"]
