"""Text to tokens, and tokens to text as they come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from server.errors import InvalidRequestError

__all__ = ["TextCodec", "TextStream"]

# The end of the prompt is decoded with the first tokens: some tokenizers drop a space at the start of a text.
NUM_CONTEXT_TOKENS = 6


class TextCodec:
    """A model's tokenizer; its methods may be called from any thread.

    Raises:
        InvalidRequestError: the folder has no tokenizer that can decode a stream.
    """

    def __init__(self, model_path: str | Path) -> None:
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
        self._backend = backend
        self._special_ids = frozenset(tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects at its start.

        Raises:
            InvalidRequestError: the text is no valid Unicode.
        """
        try:
            return list(self.tokenizer(text).input_ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("the text is not valid Unicode", code="text_invalid", param="inputs") from error

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """A special token's own spelling, as in <|im_end|>."""
        return self._backend.id_to_token(token_id) or ""

    def stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> "TextStream":
        return TextStream(self._backend, prompt_ids, stop)


class TextStream:
    """One request's output as text (`TokenText`): whole characters only, and nothing behind a stop string.

    Args:
        stop: strings that end the output; the one that does is part of it.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = backend
        self._stop = tuple(stop)
        self._num_kept = max((len(s) for s in self._stop), default=1) - 1
        self._tail = ""  # the end of the output, where a stop string may have begun
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
        return self._until_stop(text)

    def finish(self) -> str:
        """What was held back, without the character that will never be complete."""
        before = self._backend.decode(self._shown)
        whole = self._backend.decode(self._shown + self._held)
        rest = whole[len(before) :] if whole.startswith(before) else self._backend.decode(self._held)
        return self._until_stop(rest.rstrip("\ufffd"))[0]

    def _until_stop(self, text: str) -> tuple[str, bool]:
        if not text or not self._stop:
            return text, False
        window = self._tail + text
        ends = [at + len(s) for s in self._stop if (at := window.find(s)) >= 0]
        if ends:
            return window[len(self._tail) : min(ends)], True
        self._tail = window[-self._num_kept :] if self._num_kept else ""
        return text, False

    def _decode(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception:  # noqa: BLE001 - the library raises plain Exception
            # Its context does not fit the token (it began inside a character): go on from this token alone.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token_id) or ""
