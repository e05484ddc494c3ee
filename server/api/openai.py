"""What the routes of OpenAI's family do alike: start a call, stream it or answer it whole, and report its errors."""

import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server.api.disconnect import CLIENT_CLOSED_REQUEST, ClientGoneError, or_disconnect
from server.api.envelopes import Family, dump, error_body
from server.api.model_names import ADAPTER_HEADER, ModelNames
from server.api.sse import EventStream, event
from server.delivery import Generation, GenerationGroup
from server.engine import FinishReason, Token
from server.errors import ContextLengthError, NotFoundError, ServerError
from server.generation import GenerationService, GenerationTask
from server.metrics import Metrics
from server.schemas.openai import OpenAIBody

__all__ = ["FINISH_REASONS", "OpenAICall", "Services", "adapter_header", "random_seed", "respond"]

DONE = "data: [DONE]\n\n"
FINISH_REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass(frozen=True, slots=True)
class Services:
    """What a call needs of the server."""

    generations: GenerationService
    names: ModelNames
    metrics: Metrics
    fingerprint: str


def random_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)


class OpenAICall(ABC):
    """One call and what has come of it. A subclass knows one route's shapes.

    Attributes:
        group: the call's sequences; there once it is started.
    """

    id_prefix: str
    plain_object: str
    stream_object: str

    def __init__(self, body: OpenAIBody, services: Services, header: str | None) -> None:
        self.body = body
        self.services = services
        self.codec = services.generations.codec
        self.weights = services.names.choose(body.weights(), model=body.model, header=header)
        self.group: GenerationGroup
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or services.names.model_id,
            "system_fingerprint": services.fingerprint,
        }

    @abstractmethod
    def task(self) -> GenerationTask:
        """What to generate."""

    @abstractmethod
    def take(self, generation: Generation, token: Token) -> Iterator[dict[str, Any]]:
        """Take a token; gives the stream's choices for it, in order."""

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """The choices of the whole answer."""

    async def start(self) -> None:
        """Submit the call.

        Raises:
            ServerError: in the words of this family; nothing was started then.
        """
        try:
            self.group = await self.services.generations.start(self.task())
        except NotFoundError as error:
            message = f"The model `{next(iter(self.weights))}` does not exist"
            if len(self.weights) > 1 or not self.body.model:
                message = error.message
            raise NotFoundError(message, code="model_not_found", param="model") from None
        except ContextLengthError as error:
            error.message = _too_long(error)
            raise

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, and of all that was generated."""
        num_prompt, num_generated = self.group.num_prompt_tokens, self.num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }

    @property
    def num_completion_tokens(self) -> int:
        return self.group.num_generated

    def chunk(self, choices: Sequence[dict[str, Any]], *, is_last: bool = False) -> dict[str, Any]:
        """One event of a stream."""
        out = self._head | {"object": self.stream_object, "choices": choices}
        options = self.body.stream_options
        if options is not None and (options.include_usage or options.continuous_usage_stats):
            out["usage"] = self.usage() if is_last or options.continuous_usage_stats else None
        return out

    def plain(self) -> dict[str, Any]:
        """The whole answer."""
        return self._head | {"object": self.plain_object, "choices": self.choices(), "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as a stream, once the call is started."""
        try:
            with self.services.metrics.observe(self.group):
                async for generation, token in self.group:
                    for choice in self.take(generation, token):
                        yield event(self.chunk([choice]))
        except ServerError as error:
            yield event(error_body(error, Family.OPENAI))
            yield DONE
            return
        if self.body.wants_usage:
            yield event(self.chunk([], is_last=True))
        yield DONE


async def respond(request: Request, call: OpenAICall) -> Response:
    """Answer a call, as a stream if its body asks for one. Errors that are known by then are real HTTP errors."""
    if call.body.stream:
        await call.start()
        return EventStream(call.events(), _headers(call), on_close=call.group.cancel)
    try:
        await or_disconnect(request, _collect(call))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(dump(call.plain()), headers=_headers(call), media_type="application/json")


def adapter_header(request: Request) -> str | None:
    """The adapter that a request names in its headers."""
    return request.headers.get(ADAPTER_HEADER)


def _headers(call: OpenAICall) -> dict[str, str]:
    if not call.weights:
        return {}
    generations = ",".join(map(str, call.group.adapter_generations.values()))
    return {"x-adapter-id": ",".join(call.weights), "x-adapter-generation": generations}


async def _collect(call: OpenAICall) -> None:
    await call.start()
    try:
        with call.services.metrics.observe(call.group):
            async for generation, token in call.group:
                for _ in call.take(generation, token):
                    pass
    finally:
        call.group.cancel()


def _too_long(error: ContextLengthError) -> str:
    """In words that the clients of this family look for."""
    head = f"This model's maximum context length is {error.limit} tokens"
    if error.num_prompt_tokens >= error.limit:
        return f"{head}, and the prompt is too long: {error.num_prompt_tokens} tokens."
    total = error.num_prompt_tokens + error.max_new_tokens
    return (
        f"{head}. However, you requested {total} tokens ({error.num_prompt_tokens} in the prompt, "
        f"{error.max_new_tokens} in the completion)."
    )
