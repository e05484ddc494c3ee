"""The body of Anthropic's `/v1/messages`, which is a conversation in other words."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from server.errors import InvalidRequestError
from server.schemas.body import (
    MAX_MIX_ENTRIES,
    MAX_STOP_STRINGS,
    AdapterBody,
    AdapterName,
    Body,
    MixEntry,
    StopString,
)
from server.schemas.chat import MAX_MESSAGES, ChatMessage, ChatRequest, ContentPart

__all__ = ["MessagesRequest"]


class Message(Body):
    """One message; of its content's blocks only texts are supported."""

    role: Literal["user", "assistant"]
    content: str | list[ContentPart]


class MessagesRequest(AdapterBody):
    """A conversation to be continued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "pirate",
                    "max_tokens": 60,
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                }
            ]
        }
    )

    model: Annotated[str, Field(max_length=512)]
    max_tokens: int = Field(ge=1)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[ContentPart] | None = None
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOP_STRINGS)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stream: bool | None = None
    adapters: list[MixEntry] | None = Field(None, max_length=MAX_MIX_ENTRIES)
    adapter_id: AdapterName | None = None

    tools: Any = None
    tool_choice: Any = None
    thinking: Any = None
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
    output_config: Any = None
    output_format: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "tools": ([],),
        "tool_choice": (),
        "thinking": ({"type": "disabled"},),
        "container": (),
        "mcp_servers": ([],),
        "context_management": (),
        "output_config": (),
        "output_format": (),
    }

    def as_chat(self) -> ChatRequest:
        """The same for `/v1/chat/completions`.

        Raises:
            InvalidRequestError: it asks for what is not supported.
        """
        self.refuse_unsupported()
        if self.messages[-1].role == "assistant":
            message = "`messages`: to go on with the assistant's last message is not supported; end with the user's"
            raise InvalidRequestError(message, code="not_supported", param="messages")
        messages = [ChatMessage(role=one.role, content=one.content) for one in self.messages]
        if self.system:
            messages.insert(0, ChatMessage(role="system", content=self.system))
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stream=self.stream,
            adapters=self.adapters,
            adapter_id=self.adapter_id,
        )
