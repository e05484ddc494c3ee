"""Server-sent events, from bytes as they come; no input or output of its own."""

import json
from collections.abc import Iterator
from typing import Any

from loramux_client.errors import UnexpectedAnswerError

__all__ = ["EventDecoder"]

DONE = b"[DONE]"


class EventDecoder:
    """Turns a stream's chunks into the JSON objects of its `data:` lines, wherever the chunks were cut.

    Lines end at LF or CRLF only. OpenAI's `[DONE]` is left out: what it says is said by the stream's end.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The events that this chunk completes.

        Raises:
            UnexpectedAnswerError: an event is no JSON object.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            data = line.removesuffix(b"\r")
            if data.startswith(b"data:"):
                payload = data[len(b"data:") :].strip()
                if payload != DONE:
                    yield _decode(payload)


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        body = json.loads(payload)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UnexpectedAnswerError("the stream holds an event that is no JSON object")
    return body
