"""`/v1/chat/completions`."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.dependencies import OpenAIServices
from server.api.openai import FINISH_REASONS, OpenAICall, Services, adapter_header, random_seed, respond
from server.api.openapi import STREAM
from server.api.tgi_answer import finite_logprob
from server.api.tools import CalledTool, ToolReader, Tools, open_tools
from server.delivery import Generation
from server.engine import FinishReason, Token
from server.generation import GenerationTask
from server.schemas.answers import ChatAnswer
from server.schemas.chat import ChatRequest
from server.text import StopRule

__all__ = ["router"]

router = APIRouter(tags=["generation"])

ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": ChatAnswer, "content": STREAM}}


@router.post("/v1/chat/completions", response_class=Response, responses=ANSWER)
async def chat_completions(body: ChatRequest, request: Request, services: OpenAIServices) -> Response:
    """Continue a conversation, rendered with the model's own chat template."""
    call = ChatCall(body, services, adapter_header(request))
    await call.render()
    return await respond(request, call)


@dataclass(slots=True)
class _Choice:
    """What has come of one sequence."""

    generation: Generation
    reader: ToolReader | None
    text: str = ""
    calls: list[CalledTool] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    has_begun: bool = False


class ChatCall(OpenAICall):
    """A call of `/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    plain_object = "chat.completion"
    stream_object = "chat.completion.chunk"
    body: ChatRequest

    def __init__(self, body: ChatRequest, services: Services, header: str | None) -> None:
        body.check()
        super().__init__(body, services, header)
        self._tools: Tools | None = open_tools(body, self.codec)
        self._prompt = ""
        self._choices: dict[int, _Choice] = {}

    async def render(self) -> None:
        """Make the prompt, off the event loop.

        Raises:
            InvalidRequestError: the template refuses the messages.
        """
        messages = [message.for_template() for message in self.body.messages]
        tools = None if self._tools is None else self._tools.definitions
        variables = self.body.template_variables
        self._prompt = await asyncio.to_thread(self.codec.chat_prompt, messages, tools=tools, variables=variables)

    def task(self) -> GenerationTask:
        body = self.body
        sampling = body.sampling(
            random_seed(), max_new_tokens=body.max_new_tokens, num_top_logprobs=body.num_top_logprobs
        )
        forced = None if self._tools is None else self._tools.grammar
        return GenerationTask(
            prompts=[self._prompt],
            sampling=sampling,
            num_sequences=body.num_sequences,
            adapters=self.weights,
            stop=StopRule(body.stop_strings, is_kept=False, min_tokens=sampling.min_tokens),
            bad_words=body.bad_words or (),
            grammar=forced or body.as_grammar(),
            add_special_tokens=False,
            truncate=body.truncate_prompt_tokens,
        )

    def take(self, generation: Generation, token: Token) -> Iterator[dict[str, Any]]:
        choice = self._choices.get(generation.index)
        if choice is None:
            reader = None if self._tools is None else self._tools.reader()
            choice = self._choices[generation.index] = _Choice(generation, reader)
        text, calls = token.text, list[CalledTool]()
        if choice.reader is not None:
            text, calls = choice.reader.push(token.text, is_last=generation.finished is not None)
        num_calls = len(choice.calls)
        choice.text += text
        choice.calls += calls
        choice.token_ids.append(token.token_id)
        logprobs = self._logprobs(generation, token)
        choice.logprobs += logprobs
        if not choice.has_begun:
            choice.has_begun = True
            yield self._delta(choice, {"role": "assistant", "content": ""})
        shown_logprobs = {"content": logprobs, "refusal": None} if self.body.logprobs else None
        if text or logprobs or self.body.return_token_ids:
            ids = [token.token_id] if self.body.return_token_ids else None
            yield self._delta(choice, {"content": text}, logprobs=shown_logprobs, token_ids=ids)
        for i, call in enumerate(calls):
            yield self._delta(choice, {"tool_calls": [{"index": num_calls + i} | call.as_json()]})
        if generation.finished is not None:
            yield self._delta(choice, {}, finish_reason=_finish_reason(choice))

    def choices(self) -> list[dict[str, Any]]:
        out = []
        for index, choice in sorted(self._choices.items()):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if choice.calls:
                message["content"] = choice.text or None
                message["tool_calls"] = [call.as_json() for call in choice.calls]
            shown = {
                "index": index,
                "message": message,
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.body.logprobs else None,
                "finish_reason": _finish_reason(choice),
            }
            out.append(shown | ({"token_ids": choice.token_ids} if self.body.return_token_ids else {}))
        return out

    def plain(self) -> dict[str, Any]:
        answer = super().plain()
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = self.group.generations[0].request.prompt_ids
        return answer

    def _delta(
        self,
        choice: _Choice,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        token_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        shown = {
            "index": choice.generation.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return shown if token_ids is None else shown | {"token_ids": token_ids}

    def _logprobs(self, generation: Generation, token: Token) -> list[dict[str, Any]]:
        """The token's entry; the token that ends a message is no part of its content."""
        ended = generation.finished is not None and generation.finished.reason is FinishReason.EOS
        if not self.body.logprobs or (ended and self.codec.is_special(token.token_id)):
            return []
        entry = self._entry(token.token_id, token.logprob)
        return [entry | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top]}]

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self.codec.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": finite_logprob(logprob), "bytes": list(data)}


def _finish_reason(choice: _Choice) -> str | None:
    finished = choice.generation.finished
    if finished is None:
        return None
    reason = FINISH_REASONS.get(finished.reason)
    return "tool_calls" if choice.calls and reason == "stop" else reason
