"""Text to tokens, and tokens to text as they come."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from server.errors import InvalidRequestError

__all__ = ["StopRule", "TextCodec", "TextStream", "TokenSpan"]

logger = logging.getLogger(__name__)

# The end of the prompt is decoded with the first tokens: some tokenizers drop a space at the start of a text.
NUM_CONTEXT_TOKENS = 6
# Something that a template must show if it has a place for tools.
PROBE_TOOL = {"type": "function", "function": {"name": "probe_tool_name", "description": "d", "parameters": {}}}
PROBE_MESSAGES = [{"role": "user", "content": "x"}]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of a text, and the characters [start, stop) that it stands for."""

    token_id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StopRule:
    """Strings that end an output.

    Attributes:
        is_kept: the string is part of the output, as with TGI; else no character of it comes out, as with OpenAI.
        min_tokens: before so many tokens no string is looked for.
    """

    strings: tuple[str, ...] = ()
    is_kept: bool = True
    min_tokens: int = 0


class TextCodec:
    """A model's tokenizer; its methods may be called from any thread.

    Args:
        vocab_size: of the model's logits, which may be more than the tokenizer has; None if it is the same.
        eos_token_ids: tokens that end a sequence; the tokenizer's own if there are none.

    Attributes:
        trie: the vocabulary as llguidance sees it; None if it cannot read this tokenizer.
        has_tools: the chat template has a place for tools.

    Raises:
        InvalidRequestError: the folder has no tokenizer that can decode a stream.
    """

    def __init__(
        self, model_path: str | Path, *, vocab_size: int | None = None, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise InvalidRequestError(f"the tokenizer cannot be loaded: {error}", code="model_unsupported") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequestError(
                "this tokenizer cannot decode a stream: a tokenizer.json is needed", code="model_unsupported"
            )
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or len(tokenizer)
        self._backend = backend
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.trie: LLTokenizer | None = None
        try:
            self.trie = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)
        except ValueError as error:
            logger.warning("no structured output with this tokenizer: %s", error)
        self.has_tools = self._shows_tools()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects at its start.

        Raises:
            InvalidRequestError: the text is no valid Unicode.
        """
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("the text is not valid Unicode", code="text_invalid", param="inputs") from error

    def spans(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of a text with their places in it; errors as in `encode`."""
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("the text is not valid Unicode", code="text_invalid", param="inputs") from error
        return [
            TokenSpan(token_id, text[start:stop] or self.token_text(token_id), start, stop)
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that the model's own template makes of a conversation; to be encoded without special tokens.

        Raises:
            InvalidRequestError: there is no template, or it refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template", code="chat_template_missing", param="messages")
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise InvalidRequestError(message[:500], code="messages_invalid", param="messages") from error

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """A special token's own spelling, as in <|im_end|>."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token alone stands for; they may be part of a character."""
        if self.trie is None:
            return self.decode([token_id]).encode()
        found = self.trie.decode_bytes([token_id])
        if found or self.is_special(token_id):
            return found
        # The trie keeps 0xFF, which no text has, for special tokens; a byte-level vocabulary has a token of it.
        return b"\xff" if self._backend.decode([token_id]) == "\N{REPLACEMENT CHARACTER}" else b""

    def stream(self, prompt_ids: Sequence[int], stop: StopRule) -> "TextStream":
        return TextStream(self._backend, prompt_ids, stop)

    def _shows_tools(self) -> bool:
        if not self.tokenizer.chat_template:
            return False
        try:
            return PROBE_TOOL["function"]["name"] in self.chat_prompt(PROBE_MESSAGES, tools=[PROBE_TOOL])  # type: ignore[index]
        except InvalidRequestError:
            return False


class TextStream:
    """One request's output as text (`TokenText`): whole characters only, and nothing behind a stop string."""

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stop: StopRule) -> None:
        self._backend = backend
        self._stop = stop.strings
        self.stopped_by: str | None = None  # the stop string that ended it
        self._is_kept = stop.is_kept
        self._num_unchecked = stop.min_tokens
        self._num_tail = max((len(s) for s in self._stop), default=1) - 1
        self._tail = ""  # the end of the output, where a stop string may have begun: shown if `is_kept`, else not yet
        context = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        if backend.decode(context).endswith("\ufffd"):  # it ends inside a character, which the output cannot complete
            context = []
        self._stream = DecodeStream(context, skip_special_tokens=True)
        self._shown = context  # tokens whose text is out
        self._held: list[int] = []  # tokens after them, which end inside a character

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that this token completes, and whether a stop string ended in it."""
        self._held.append(token_id)
        text = self._decode(token_id)
        if text:
            self._shown, self._held = self._held[-NUM_CONTEXT_TOKENS:], []
        if self._num_unchecked > 0:
            self._num_unchecked -= 1
            return text, False
        return self._until_stop(text)

    def finish(self) -> str:
        """What was held back, without the character that will never be complete."""
        before = self._backend.decode(self._shown)
        whole = self._backend.decode(self._shown + self._held)
        rest = whole[len(before) :] if whole.startswith(before) else self._backend.decode(self._held)
        text, is_stopped = self._until_stop(rest.rstrip("\ufffd"))
        return text if self._is_kept or is_stopped else text + self._tail

    def _until_stop(self, text: str) -> tuple[str, bool]:
        if not text or not self._stop:
            return text, False
        window = self._tail + text
        found = [(at + len(s), at, s) for s in self._stop if (at := window.find(s)) >= 0]
        if found:
            end, begin, self.stopped_by = min(found)
            return (window[len(self._tail) : end] if self._is_kept else window[:begin]), True
        if self._is_kept:
            self._tail = window[-self._num_tail :] if self._num_tail else ""
            return text, False
        num_held = max(_overlap(window, s) for s in self._stop)
        self._tail = window[len(window) - num_held :]
        return window[: len(window) - num_held], False

    def _decode(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception:  # noqa: BLE001 - the library raises plain Exception
            # Its context does not fit the token (it began inside a character): go on from this token alone.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token_id) or ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
