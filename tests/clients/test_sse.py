"""The decoder of server-sent events, however the bytes are cut."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_client import UnexpectedAnswerError
from loramux_client._sse import EventDecoder

OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=5)


@given(events=OBJECTS, line_end=st.sampled_from(["\n", "\r\n"]), ascii_only=st.booleans(), data=st.data())
def test_events_are_the_same_wherever_the_chunks_end(
    events: list[dict[str, str]], line_end: str, ascii_only: bool, data: st.DataObject
) -> None:
    blocks = [f"data: {json.dumps(event, ensure_ascii=ascii_only)}" for event in events]
    stream = (line_end * 2).join([": a comment", "event: x", *blocks, "data: [DONE]", ""]).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    decoder = EventDecoder()
    assert [event for chunk in chunks for event in decoder.feed(chunk)] == events


@pytest.mark.parametrize("line", [b"data: nonsense\n", b"data: [1]\n", b"data:\n", b"data: \xff\n"])
def test_what_is_no_object_is_an_error(line: bytes) -> None:
    with pytest.raises(UnexpectedAnswerError):
        list(EventDecoder().feed(line))


def test_an_event_that_never_ends_is_none() -> None:
    decoder: Any = EventDecoder()
    assert list(decoder.feed(b'data: {"a": 1}')) == []
