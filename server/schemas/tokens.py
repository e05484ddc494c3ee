"""Bodies of `/tokenize`, `/detokenize` and `/chat_tokenize`."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from server.errors import InvalidRequestError
from server.schemas.body import Body, TokenId
from server.schemas.chat import ChatFields, ChatMessage

__all__ = [
    "ChatTokenizeRequest",
    "ChatTokens",
    "DetokenizeRequest",
    "Text",
    "TokenList",
    "TokenShown",
    "TokenizeRequest",
]


class TokenizeRequest(ChatFields):
    """`inputs`, as TGI has it, or `prompt` or `messages`, as vLLM does."""

    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2_048)] | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Refuse what the fields say only together.

        Raises:
            InvalidRequestError: there is not exactly one text.
        """
        self.refuse_unsupported()
        if sum(value is not None for value in (self.inputs, self.prompt, self.messages)) != 1:
            raise InvalidRequestError("give one of `inputs`, `prompt` and `messages`", param="inputs")


class ChatTokenizeRequest(ChatFields):
    """A conversation, as `/v1/chat/completions` takes it."""

    model: Any = None


class TokenShown(BaseModel):
    """A token, and the characters [start, stop) that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class TokenList(BaseModel):
    """vLLM's answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class ChatTokens(BaseModel):
    """TGI's answer for a conversation."""

    tokenize_response: list[TokenShown]
    templated_text: str


class DetokenizeRequest(Body):
    """Token ids."""

    tokens: list[TokenId] = Field(max_length=1 << 20)


class Text(BaseModel):
    """A text."""

    prompt: str
