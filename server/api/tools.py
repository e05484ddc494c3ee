"""Tools: how a model's own chat template writes calls, grammars that force one, and reading calls as they come.

Two ways of writing are known: `<tool_call>{…}</tool_call>` within the text (Hermes, Qwen, SmolLM3 and many others), and
a message that is nothing but the JSON of a call (Llama 3). A template with neither takes part with forced calls only.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.errors import InvalidRequestError
from server.schemas.chat import ChatRequest, ToolChoice, ToolDefinition
from server.structured import WHITESPACE, Grammar, GrammarKind
from server.text import TextCodec

__all__ = ["CalledTool", "ToolReader", "Tools", "open_tools"]

OPENING, CLOSING = "<tool_call>", "</tool_call>"
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class CalledTool:
    """One call that the model made; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request.

    Attributes:
        definitions: as the template reads them.
        is_tagged: calls stand between `<tool_call>` and `</tool_call>`.
        grammar: forces a call; None if the model may choose.
    """

    definitions: list[dict[str, Any]]
    is_tagged: bool
    grammar: Grammar | None

    def reader(self) -> "ToolReader":
        return ToolReader({d["function"]["name"] for d in self.definitions}, is_tagged=self.is_tagged)


def open_tools(body: ChatRequest, codec: TextCodec) -> Tools | None:
    """The tools that a request offers to the model; None if there are none, or it may not call any.

    Raises:
        InvalidRequestError: the template has no place for tools, or the choice cannot be made.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("`tool_choice` needs `tools`", param="tool_choice")
        return None
    if choice == "none":
        return None
    if not codec.has_tools:
        message = "`tools` are not supported: this model's chat template has no place for them"
        raise InvalidRequestError(message, code="not_supported", param="tools")
    if body.as_grammar() is not None:
        message = "`tools` and structured output cannot be combined; use `tool_choice`"
        raise InvalidRequestError(message, code="not_supported", param="response_format")
    template = str(codec.tokenizer.chat_template)
    is_tagged = OPENING in template
    forced: Sequence[ToolDefinition] = body.tools if choice == "required" else ()
    if isinstance(choice, ToolChoice):
        forced = [tool for tool in body.tools if tool.function.name == choice.function.name]
        if not forced:
            message = f"`tool_choice` names {choice.function.name!r}, which is none of the `tools`"
            raise InvalidRequestError(message, param="tool_choice")
    key = "parameters" if '"parameters"' in template and '"arguments"' not in template else "arguments"
    return Tools(
        definitions=[tool.for_template() for tool in body.tools],
        is_tagged=is_tagged,
        grammar=_call_grammar(forced, key, is_tagged=is_tagged) if forced else None,
    )


def _call_grammar(tools: Sequence[ToolDefinition], key: str, *, is_tagged: bool) -> Grammar:
    """A grammar of one call, in Lark's syntax as llguidance extends it."""
    rules = [f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{key}": '
        schema = (tool.function.parameters or {"type": "object"}) | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        rules.append(f'call{i}: {json.dumps(head, ensure_ascii=False)} arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {json.dumps(schema)}")
    start = f'start: "{OPENING}\\n" call "\\n{CLOSING}"' if is_tagged else "start: call"
    return Grammar(GrammarKind.LARK, "\n".join([start, *rules]), "tools")


class ToolReader:
    """Reads one message as it comes, and tells its text from its calls.

    Args:
        names: of the tools that may be called; anything else that looks like a call is text.
    """

    def __init__(self, names: set[str], *, is_tagged: bool) -> None:
        self._names = names
        self._is_tagged = is_tagged
        self._held = ""  # not known yet what it is
        self._is_text = False  # untagged: it did not begin as a call does

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[CalledTool]]:
        """The text and the calls that are certain after this much more of the message."""
        self._held += text
        return self._tagged(is_last) if self._is_tagged else self._untagged(is_last)

    def _tagged(self, is_last: bool) -> tuple[str, list[CalledTool]]:
        shown = ""
        calls: list[CalledTool] = []
        while True:
            before, opening, rest = self._held.partition(OPENING)
            if not opening:
                break
            inside, closing, after = rest.partition(CLOSING)
            if not closing and not is_last:
                shown, self._held = shown + before, opening + rest
                return shown, calls
            call = self._parse(inside)
            if call is None:
                shown += before + opening + inside + closing
            else:
                shown += before.rstrip("\n") if not shown else before.strip("\n")
                calls.append(call)
            self._held = after
        num_held = (
            0 if is_last else next((n for n in range(len(OPENING) - 1, 0, -1) if self._held.endswith(OPENING[:n])), 0)
        )
        end = len(self._held) - num_held
        shown, self._held = shown + self._held[:end], self._held[end:]
        return shown, calls

    def _untagged(self, is_last: bool) -> tuple[str, list[CalledTool]]:
        begins_as_call = self._held.lstrip().startswith("{") or not self._held.strip()
        if begins_as_call and not self._is_text:
            if not is_last:
                return "", []
            call = self._parse(self._held)
            if call is not None:
                return "", [call]
        self._is_text = True
        shown, self._held = self._held, ""
        return shown, []

    def _parse(self, text: str) -> CalledTool | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments: Any = next((value[key] for key in ARGUMENT_KEYS if key in value), {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return CalledTool(value["name"], arguments)
