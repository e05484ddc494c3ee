"""Anthropic's `/v1/messages`: a chat in other shapes."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.chat import ChatCall
from server.api.dependencies import OpenAIServices
from server.api.envelopes import Family, error_body
from server.api.openai import Services, adapter_header, respond
from server.api.openapi import STREAM
from server.api.sse import event
from server.engine import FinishReason
from server.errors import ServerError
from server.schemas.answers import MessagesAnswer
from server.schemas.messages import MessagesRequest
from server.text import TextStream

__all__ = ["router"]

router = APIRouter(tags=["generation"])

ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": MessagesAnswer, "content": STREAM}}
STOP_REASONS = {FinishReason.LENGTH: "max_tokens", FinishReason.EOS: "end_turn", FinishReason.STOP: "stop_sequence"}


@router.post("/v1/messages", response_class=Response, responses=ANSWER)
async def messages(body: MessagesRequest, request: Request, services: OpenAIServices) -> Response:
    """Continue a conversation, as Anthropic's clients ask for it."""
    call = MessagesCall(body, services, adapter_header(request))
    await call.render()
    return await respond(request, call)


class MessagesCall(ChatCall):
    """A call of `/v1/messages`."""

    id_prefix = "msg"

    def __init__(self, body: MessagesRequest, services: Services, header: str | None) -> None:
        super().__init__(body.as_chat(), services, header)

    def plain(self) -> dict[str, Any]:
        (choice,) = self._choices.values()
        usage = self._input_usage() | {"output_tokens": self.num_completion_tokens}
        return self._message([{"type": "text", "text": choice.text}]) | self._end() | {"usage": usage}

    async def events(self) -> AsyncIterator[str]:
        start = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=start | {"usage": self._input_usage() | {"output_tokens": 0}})
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        try:
            with self.services.metrics.observe(self.group):
                async for _, token in self.group:
                    if token.text:
                        yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": token.text})
        except ServerError as error:
            yield event(error_body(error, Family.ANTHROPIC), name="error")
            return
        yield _event("content_block_stop", index=0)
        yield _event("message_delta", delta=self._end(), usage={"output_tokens": self.num_completion_tokens})
        yield _event("message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._head["id"], "type": "message", "role": "assistant", "model": self._head["model"]}
        return head | {"content": content}

    def _input_usage(self) -> dict[str, int]:
        return {"input_tokens": self.group.num_prompt_tokens}

    def _end(self) -> dict[str, Any]:
        (generation,) = self.group.generations
        reason = None if generation.finished is None else STOP_REASONS.get(generation.finished.reason)
        text = generation.request.text
        return {
            "stop_reason": "end_turn" if reason == "stop_sequence" and not self.body.stop_strings else reason,
            "stop_sequence": text.stopped_by if isinstance(text, TextStream) else None,
        }


def _event(kind: str, **fields: Any) -> str:
    return event({"type": kind} | fields, name=kind)
