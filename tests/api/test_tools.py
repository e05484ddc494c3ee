"""Calls are read out of a message wherever it is cut; all else is text."""

import json
import random

import pytest

from server.api.tools import CalledTool, ToolReader

NAMES = {"f", "g"}


def read(text: str, *, is_tagged: bool, num_cuts: int) -> tuple[str, list[CalledTool]]:
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(num_cuts))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reader = ToolReader(NAMES, is_tagged=is_tagged)
    shown, calls = "", []
    for i, piece in enumerate(pieces):
        more, new = reader.push(piece, is_last=i == len(pieces) - 1)
        shown += more
        calls += new
    return shown, calls


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


TAGGED = {
    "one": (call("f", x=1), "", [("f", {"x": 1})]),
    "two": (call("f", x="</tool") + "\n" + call("g"), "", [("f", {"x": "</tool"}), ("g", {})]),
    "text in front": ("Let me see. " + call("g"), "Let me see. ", [("g", {})]),
    "no call": ("Use <tool_cal or <b>x</b>", "Use <tool_cal or <b>x</b>", []),
    "an unknown tool": (call("h"), call("h"), []),
    "malformed": ("<tool_call>{x</tool_call>", "<tool_call>{x</tool_call>", []),
    "no end": (call("f", x=[1])[: -len("</tool_call>")], "", [("f", {"x": [1]})]),
}
UNTAGGED = {
    "one": ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
    "text": ("Hello {you}", "Hello {you}", []),
    "other JSON": ('{"a": 1}', '{"a": 1}', []),
    "arguments": (' {"name": "g", "arguments": {}}', "", [("g", {})]),
}


@pytest.mark.parametrize("num_cuts", [0, 1, 2, 7, 40])
@pytest.mark.parametrize(
    ("text", "shown", "calls", "is_tagged"),
    [(*case, True) for case in TAGGED.values()] + [(*case, False) for case in UNTAGGED.values()],
    ids=[*TAGGED, *(f"untagged {name}" for name in UNTAGGED)],
)
def test_calls_are_read(
    text: str, shown: str, calls: list[tuple[str, dict[str, object]]], is_tagged: bool, num_cuts: int
) -> None:
    got, made = read(text, is_tagged=is_tagged, num_cuts=num_cuts)
    assert got.strip("\n") == shown.strip("\n")
    assert [(c.name, json.loads(c.arguments)) for c in made] == calls
    assert len({c.id for c in made}) == len(made)
