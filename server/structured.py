"""Structured output: a grammar, and for each step the tokens that it allows.

llguidance does the work in Rust, without the GIL. A mask is computed on this module's own thread as soon as its
request's token is chosen, so while the model computes the next step; the engine finds it ready when it samples.
"""

import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, grammar_from

from server.errors import InvalidRequestError
from server.text import TextCodec

__all__ = ["WHITESPACE", "Grammar", "GrammarKind", "StructuredOutput", "TokenMasks"]

logger = logging.getLogger(__name__)

MAX_GRAMMAR_CHARS = 1 << 18
MAX_ERROR_CHARS = 300
# Between JSON's tokens: enough for indentation, but no model can go on with it forever.
WHITESPACE = r"[ \t\n]{1,32}"
# A mask takes milliseconds at most: with more work than this a grammar is refused, or its request fails.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarKind(Enum):
    """How an output's form is described. A grammar may also be in GBNF."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "grammar"


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of an output: a JSON schema, a regular expression, a list of texts, or a grammar in Lark's syntax.

    Attributes:
        param: the request field that it came from.
    """

    kind: GrammarKind
    value: Any
    param: str | None = None


class StructuredOutput:
    """Compiles grammars for one model's vocabulary. Owns a thread, which begins with the first grammar."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loramux-grammar")

    def open(self, grammar: Grammar, num_sequences: int = 1) -> list["TokenMasks"]:
        """A constraint for each sequence; milliseconds, so not on the event loop.

        Raises:
            InvalidRequestError: the grammar is malformed, too large or says something that is not supported.
        """
        trie = self._codec.trie
        if trie is None:
            message = "structured output is not supported with this model's tokenizer"
            raise InvalidRequestError(message, code="not_supported", param=grammar.param)
        matcher = LLMatcher(trie, _compile(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        matchers = [matcher, *(matcher.deep_copy() for _ in range(num_sequences - 1))]
        return [TokenMasks(matcher, self._codec.vocab_size, self._workers) for matcher in matchers]

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)


class TokenMasks:
    """What one sequence may generate next (`TokenConstraint`)."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, workers: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._workers = workers
        self._next: Future[bytearray] = workers.submit(self._compute)

    def forbidden(self) -> bytearray:
        """As in `TokenConstraint`; the same one until `accept` is called."""
        return self._next.result()

    def accept(self, token_id: int) -> bool:
        """As in `TokenConstraint`."""
        if not self._matcher.consume_token(token_id) or self._matcher.is_stopped():
            return True
        self._next = self._workers.submit(self._compute)
        return False

    def _compute(self) -> bytearray:
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            logger.warning("a grammar cannot go on: %s", self._matcher.get_error()[:MAX_ERROR_CHARS])
            return bytearray(b"\1" * self._vocab_size)
        bits = np.unpackbits(allowed, bitorder="little", count=self._vocab_size)
        return bytearray(bits ^ 1)


def _compile(grammar: Grammar) -> str:
    value = grammar.value
    size = len(value) if isinstance(value, str) else len(json.dumps(value))
    if size > MAX_GRAMMAR_CHARS:
        message = f"the grammar may have {MAX_GRAMMAR_CHARS} characters at most"
        raise InvalidRequestError(message, code="grammar_invalid", param=grammar.param)
    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(json.dumps(value), defaults={"whitespace_pattern": WHITESPACE})
        if grammar.kind is GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(value)
        if grammar.kind is GrammarKind.CHOICE:
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        return grammar_from("grammar", value)
    except (ValueError, RecursionError) as error:
        raise _refusal(grammar, str(error)) from None


def _refusal(grammar: Grammar, reason: str) -> InvalidRequestError:
    text = " ".join(reason.split()).encode("ascii", "backslashreplace").decode()
    return InvalidRequestError(
        f"the {grammar.kind.value} is refused: {text[:MAX_ERROR_CHARS]}", code="grammar_invalid", param=grammar.param
    )
