"""`/v1/completions`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.dependencies import OpenAIServices
from server.api.openai import FINISH_REASONS, OpenAICall, Services, adapter_header, random_seed, respond
from server.api.openapi import STREAM
from server.api.tgi_answer import finite_logprob
from server.delivery import Generation
from server.engine import Token
from server.generation import GenerationTask
from server.schemas.answers import CompletionAnswer
from server.schemas.completions import CompletionRequest
from server.text import StopRule, TextCodec

__all__ = ["router"]

router = APIRouter(tags=["generation"])

ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": CompletionAnswer, "content": STREAM}}


@router.post("/v1/completions", response_class=Response, responses=ANSWER)
async def completions(body: CompletionRequest, request: Request, services: OpenAIServices) -> Response:
    """Continue one or several prompts."""
    return await respond(request, CompletionCall(body, services, adapter_header(request)))


@dataclass(slots=True)
class _Logprobs:
    """The arrays of OpenAI's `logprobs`: an entry per token."""

    num_top: int
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(
        self, codec: TextCodec, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...], offset: int
    ) -> None:
        """`logprob` None: the first token of a prompt, before which there is nothing."""
        text = _text(codec, token_id)
        self.tokens.append(text)
        self.token_logprobs.append(None if logprob is None else finite_logprob(logprob))
        best = {_text(codec, i): finite_logprob(value) for i, value in reversed(top[: self.num_top])}
        self.top_logprobs.append(None if logprob is None else {text: finite_logprob(logprob)} | best)
        self.text_offset.append(offset)

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


@dataclass(slots=True)
class _Choice:
    """What has come of one sequence."""

    generation: Generation
    text: str = ""
    logprobs: _Logprobs | None = None
    token_ids: list[int] = field(default_factory=list)
    has_begun: bool = False


class CompletionCall(OpenAICall):
    """A call of `/v1/completions`."""

    id_prefix = "cmpl"
    plain_object = stream_object = "text_completion"
    body: CompletionRequest

    def __init__(self, body: CompletionRequest, services: Services, header: str | None) -> None:
        body.check()
        super().__init__(body, services, header)
        self._choices: dict[int, _Choice] = {}
        self._hides_output = body.max_tokens == 0

    def task(self) -> GenerationTask:
        body = self.body
        wants_logprobs = body.logprobs is not None
        ranks = body.num_tried > body.num_sequences
        sampling = body.sampling(
            random_seed(),
            max_new_tokens=body.max_new_tokens,
            num_top_logprobs=body.logprobs if wants_logprobs or not ranks else 0,
            prompt_logprobs=wants_logprobs and bool(body.echo),
        )
        return GenerationTask(
            prompts=body.prompts,
            sampling=sampling,
            num_sequences=body.num_tried,
            adapters=self.weights,
            stop=StopRule(body.stop_strings, is_kept=False, min_tokens=sampling.min_tokens),
            bad_words=body.bad_words or (),
            grammar=body.as_grammar(),
            add_special_tokens=body.add_special_tokens is not False,
            truncate=body.truncate_prompt_tokens,
        )

    def take(self, generation: Generation, token: Token) -> Iterator[dict[str, Any]]:
        choice = self._choices.get(generation.index)
        if choice is None:
            choice = self._choices[generation.index] = _Choice(generation)
        fresh = _Choice(generation)  # what this token adds
        if self.body.logprobs is not None:
            fresh.logprobs = _Logprobs(self.body.logprobs)
        if not choice.has_begun and self.body.echo:
            self._echo(fresh)
        choice.has_begun = True
        if not self._hides_output:
            if fresh.logprobs is not None:
                offset = len(choice.text) + len(fresh.text)
                fresh.logprobs.add(self.codec, token.token_id, token.logprob or 0.0, token.top, offset)
            fresh.text += token.text
            fresh.token_ids.append(token.token_id)
        self._append(choice, fresh)
        if fresh.text or fresh.logprobs is not None or self.body.return_token_ids or generation.finished is not None:
            yield self._shown(fresh, is_first=len(choice.token_ids) <= 1)

    def choices(self) -> list[dict[str, Any]]:
        tried, shown = self.body.num_tried, self.body.num_sequences
        out: list[dict[str, Any]] = []
        for start in range(0, len(self.group.generations), tried):
            choices = [self._choices[i] for i in range(start, start + tried)]
            if tried > shown:
                choices.sort(key=lambda choice: -choice.generation.mean_logprob)
            for choice in choices[:shown]:
                out.append(self._shown(choice, is_first=True) | {"index": len(out)})
        return out

    @property
    def num_completion_tokens(self) -> int:
        return 0 if self._hides_output else super().num_completion_tokens

    def _echo(self, fresh: _Choice) -> None:
        """Put the prompt in front of the first token."""
        prompt = self.body.prompts[fresh.generation.index // self.body.num_tried]
        ids = fresh.generation.request.prompt_ids
        has_text = isinstance(prompt, str) and self.body.truncate_prompt_tokens is None
        if fresh.logprobs is not None:
            offset = 0
            for i, token_id in enumerate(ids):
                entry = fresh.generation.prompt_logprobs[i - 1] if i else None
                logprob, top = (None, ()) if entry is None else (entry.logprob, entry.top)
                fresh.logprobs.add(self.codec, token_id, logprob, top, offset)
                if not (has_text and self.codec.is_special(token_id)):  # a text's own special tokens are not shown
                    offset += len(self.codec.token_bytes(token_id).decode(errors="ignore"))
        fresh.text = prompt if has_text else self.codec.decode(ids)  # type: ignore[assignment]

    @staticmethod
    def _append(choice: _Choice, fresh: _Choice) -> None:
        choice.text += fresh.text
        choice.token_ids += fresh.token_ids
        if fresh.logprobs is None:
            return
        if choice.logprobs is None:
            choice.logprobs = _Logprobs(fresh.logprobs.num_top)
        choice.logprobs.tokens += fresh.logprobs.tokens
        choice.logprobs.token_logprobs += fresh.logprobs.token_logprobs
        choice.logprobs.top_logprobs += fresh.logprobs.top_logprobs
        choice.logprobs.text_offset += fresh.logprobs.text_offset

    def _shown(self, choice: _Choice, *, is_first: bool) -> dict[str, Any]:
        finished = choice.generation.finished
        out: dict[str, Any] = {
            "index": choice.generation.index,
            "text": choice.text,
            "logprobs": None if choice.logprobs is None else choice.logprobs.as_json(),
            "finish_reason": None if finished is None else FINISH_REASONS.get(finished.reason),
        }
        if self.body.return_token_ids:
            out["token_ids"] = choice.token_ids
            if is_first:
                out["prompt_token_ids"] = choice.generation.request.prompt_ids
        return out


def _text(codec: TextCodec, token_id: int) -> str:
    """A token alone; as OpenAI does, its bytes in hexadecimal if they are no whole characters."""
    data = codec.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
