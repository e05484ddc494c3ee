"""The body of `/v1/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from server.errors import InvalidRequestError
from server.schemas.body import MAX_SEQUENCES, MAX_TOP_LOGPROBS, TokenId
from server.schemas.openai import OpenAIBody

__all__ = ["CompletionRequest"]

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64
MAX_TOTAL_SEQUENCES = 128
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(OpenAIBody):
    """One or several prompts to be continued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "pirate", "prompt": "What is the capital of France?", "max_tokens": 40}]
        }
    )

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0, description="0 only with `echo`")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    add_special_tokens: bool | None = None
    suffix: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {**OpenAIBody.NEUTRAL, "suffix": ("",)}

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def num_tried(self) -> int:
        """Sequences to generate for each prompt, of which the best `num_sequences` are shown."""
        return max(self.best_of or 1, self.num_sequences)

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate; at least one, which is not shown if none is wanted."""
        return max(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, 1)

    def check(self) -> None:
        """Refuse what the fields say only together.

        Raises:
            InvalidRequestError: as its message says.
        """
        self.refuse_unsupported()
        if self.best_of is not None and self.best_of < self.num_sequences:
            raise InvalidRequestError("`best_of` must be at least `n`", param="best_of")
        if self.stream and self.num_tried > self.num_sequences:
            raise InvalidRequestError("`best_of` cannot be streamed", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("`max_tokens` 0 needs `echo`", param="max_tokens")
        if len(self.prompts) * self.num_tried > MAX_TOTAL_SEQUENCES:
            message = f"prompts times `n` or `best_of` may be {MAX_TOTAL_SEQUENCES} at most"
            raise InvalidRequestError(message, param="n")
