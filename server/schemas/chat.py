"""The body of `/v1/chat/completions`: messages and tools."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from server.errors import InvalidRequestError
from server.schemas.body import MAX_TOP_LOGPROBS, Body
from server.schemas.openai import OpenAIBody

__all__ = ["ChatFields", "ChatMessage", "ChatRequest", "ToolChoice", "ToolDefinition"]

MAX_MESSAGES = 2_048
MAX_TOOLS = 128
# What a request may not put into the template's variables, because the server does.
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "conversation"}
)


class ContentPart(Body):
    """A part of a message; only text is supported."""

    type: str = Field(max_length=64)
    text: str | None = None


class FunctionCall(Body):
    """What an earlier answer called; `arguments` is JSON as text."""

    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] | None = None


class ToolCall(Body):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: text in one piece, and the arguments of calls as objects.

        Raises:
            InvalidRequestError: it has a part that is no text.
        """
        out: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self._text()}
        if self.name is not None:
            out["name"] = self.name
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            out["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return out

    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type not in {"text", "input_text"} or part.text is None:
                raise InvalidRequestError(
                    f"a message's part of type {part.type!r} is not supported; `text` is",
                    code="not_supported",
                    param="messages",
                )
        return "".join(part.text or "" for part in self.content)


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Body):
    """A tool: always a function."""

    type: Literal["function"] = "function"
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class ChosenFunction(Body):
    """The name of the one function to be called."""

    name: str = Field(max_length=256)


class ToolChoice(Body):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class ChatFields(Body):
    """What makes a prompt: also `/tokenize` and `/chat_tokenize` take these."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = Field(None, max_length=32)
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
    }

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables for the template.

        Raises:
            InvalidRequestError: one is none of the template's own.
        """
        given = self.chat_template_kwargs or {}
        wrong = next((name for name in given if not name.isidentifier() or name in RESERVED_VARIABLES), None)
        if wrong is not None:
            message = "`chat_template_kwargs`: names must be identifiers that the server does not use itself"
            raise InvalidRequestError(message, param="chat_template_kwargs")
        return dict(given)


class ChatRequest(OpenAIBody, ChatFields):
    """A conversation to be continued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "pirate", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
            ]
        }
    )

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    best_of: Any = None
    echo: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **OpenAIBody.NEUTRAL,
        **ChatFields.NEUTRAL,
        "best_of": (1,),
        "echo": (False,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    }

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate; 0 leaves the length to the server."""
        return self.max_completion_tokens or self.max_tokens or 0

    @property
    def num_top_logprobs(self) -> int | None:
        """None if no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Refuse what the fields say only together.

        Raises:
            InvalidRequestError: as its message says.
        """
        self.refuse_unsupported()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("`top_logprobs` needs `logprobs`", param="top_logprobs")
        if self.add_generation_prompt is False:
            message = "`add_generation_prompt` false is not supported here"
            raise InvalidRequestError(message, code="not_supported", param="add_generation_prompt")


def _arguments(arguments: str | dict[str, Any] | None) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
