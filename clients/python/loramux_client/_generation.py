"""Generations and chats: their operations, and how their streams are put together. No input or output of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from loramux_client._operation import Operation, reader
from loramux_client.errors import IncompleteAnswerError, UnexpectedAnswerError, error_from_event
from loramux_client.models import ChatAnswer, ChatDelta, Generation, Token
from loramux_client.options import Adapters, ChatOptions, GenerateOptions, Message, check_options, mix_of

__all__ = ["Assembler", "ChatAssembler", "TokenAssembler", "chat", "generate"]

Item_co = TypeVar("Item_co", covariant=True)
Result_co = TypeVar("Result_co", covariant=True)
M = TypeVar("M", bound=BaseModel)


def generate(
    path: str, prompt: str, adapters: Adapters, options: Mapping[str, Any], timeout_s: float | None
) -> Operation[Generation]:
    """`/generate` or `/generate_stream`."""
    parameters = check_options(options, GenerateOptions) | {"details": True}
    if parameters.get("temperature"):  # the route takes a temperature of 1 alone for "not set", and is greedy then
        parameters.setdefault("do_sample", True)
    body: dict[str, Any] = {"inputs": prompt, "parameters": parameters}
    if mix := mix_of(adapters):
        body["adapters"] = mix
    return Operation(
        method="POST", path=path, json=body, read=reader(Generation), changes_nothing=True, timeout_s=timeout_s
    )


def chat(
    messages: Sequence[Message],
    adapters: Adapters,
    options: Mapping[str, Any],
    timeout_s: float | None,
    *,
    is_stream: bool,
) -> Operation[ChatAnswer]:
    """`/v1/chat/completions`."""
    body: dict[str, Any] = {"model": "", "messages": list(messages), **check_options(options, ChatOptions)}
    if isinstance(adapters, str):
        body["model"] = adapters
    elif mix := mix_of(adapters):
        body["adapters"] = mix
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Operation(
        method="POST",
        path="/v1/chat/completions",
        json=body,
        read=reader(ChatAnswer),
        changes_nothing=True,
        timeout_s=timeout_s,
    )


class Assembler(Protocol, Generic[Item_co, Result_co]):
    """Turns a stream's events into items, and all of them into a result."""

    def add(self, event: Mapping[str, Any]) -> Item_co | None:
        """What an event brings, if it is for the caller.

        Raises:
            APIStatusError: it says that the request failed.
        """

    def result(self) -> Result_co:
        """All of it; IncompleteAnswerError if the last event has not come."""


class TokenAssembler:
    """Of `/generate_stream`."""

    def __init__(self) -> None:
        self._last: Generation | None = None

    def add(self, event: Mapping[str, Any]) -> Token | None:
        if event.get("error"):
            raise error_from_event(event)
        if event.get("generated_text") is not None:
            self._last = _read(Generation, event)
        return _read(Token, event.get("token"))

    def result(self) -> Generation:
        if self._last is None:
            raise IncompleteAnswerError("the stream ended before its last token")
        return self._last


class ChatAssembler:
    """Of a streamed `/v1/chat/completions` with its usage."""

    def __init__(self) -> None:
        self._first: Mapping[str, Any] = {}
        self._text = ""
        self._finish_reason: str | None = None
        self._usage: Any = None
        self._tool_calls: dict[int, dict[str, Any]] = {}

    def add(self, event: Mapping[str, Any]) -> ChatDelta | None:
        if event.get("error"):
            raise error_from_event(event)
        self._first = self._first or event
        self._usage = event.get("usage") or self._usage
        if not event.get("choices"):
            return None
        choice = event["choices"][0]
        delta = choice.get("delta") or {}
        for call in delta.get("tool_calls") or ():
            self._add_tool_call(call)
        text = delta.get("content") or ""
        self._text += text
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return ChatDelta(text=text, finish_reason=choice.get("finish_reason"))

    def _add_tool_call(self, piece: Mapping[str, Any]) -> None:
        """The first piece of a call has its id and name; its arguments come bit by bit."""
        call = self._tool_calls.setdefault(piece["index"], {"type": "function", "function": {"arguments": ""}})
        function = piece.get("function") or {}
        call |= {key: piece[key] for key in ("id", "type") if piece.get(key)}
        if function.get("name"):
            call["function"]["name"] = function["name"]
        call["function"]["arguments"] += function.get("arguments") or ""

    def result(self) -> ChatAnswer:
        if self._finish_reason is None:
            raise IncompleteAnswerError("the stream ended before its last token")
        message = {"content": self._text, "tool_calls": [self._tool_calls[i] for i in sorted(self._tool_calls)]}
        choice = {"message": message, "finish_reason": self._finish_reason}
        facts = {key: self._first.get(key) for key in ("id", "model")}
        return _read(ChatAnswer, facts | {"choices": [choice], "usage": self._usage})


def _read(model: type[M], value: Any) -> M:
    try:
        return model.model_validate(value)
    except ValidationError:
        raise UnexpectedAnswerError(f"the stream holds an event that is no {model.__name__}") from None
