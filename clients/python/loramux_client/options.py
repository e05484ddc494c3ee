"""The options of generations, by the names that the server's routes use."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

__all__ = ["Adapters", "ChatOptions", "GenerateOptions", "Message", "mix_of"]

Adapters = str | Mapping[str, float] | None
"""Who answers: the name of an adapter, weights by name for a mix, or None for the base model."""

Message = Mapping[str, Any]
"""A message of a chat: `{"role": "user", "content": "…"}`."""


class GenerateOptions(TypedDict, total=False):
    """Options of `generate` and `stream`; `response_format` may hold a JSON schema."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_new_tokens: int
    bad_words: Sequence[str]
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos_token: bool
    truncate: int
    return_full_text: bool
    response_format: Mapping[str, Any]


class ChatOptions(TypedDict, total=False):
    """Options of `chat` and `chat_stream`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_tokens: int
    bad_words: Sequence[str]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[str, float]
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]


def mix_of(adapters: Adapters) -> list[dict[str, Any]]:
    """The same in the shape of the requests' `adapters` field.

    Raises:
        TypeError: `adapters` is something else.
    """
    if adapters is None or adapters == "":
        return []
    if isinstance(adapters, str):
        return [{"name": adapters, "weight": 1.0}]
    if not isinstance(adapters, Mapping):
        raise TypeError("adapters: give a name, or a mapping of names to weights")
    return [{"name": name, "weight": float(weight)} for name, weight in adapters.items()]


def check_options(options: Mapping[str, Any], known: type) -> dict[str, Any]:
    """The options that are set.

    Raises:
        TypeError: one is not known; the server would pass over it in silence.
    """
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(sorted(known.__annotations__))}")
    return {name: value for name, value in options.items() if value is not None}
