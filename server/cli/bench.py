"""`loramux bench`: how fast a running server answers, as its clients see it."""

import asyncio
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Annotated

import typer

from loramux_client import AsyncClient
from server.cli.connection import ApiKey, AsJson, ServerUrl, parse_adapters, refusals
from server.cli.console import show_json, show_table

__all__ = ["bench"]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "into", "the", "deep", "dark", "wood"]


@dataclass(slots=True)
class Timings:
    """Of one run, in seconds."""

    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    total_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Medians and tails in milliseconds, and the throughput."""
        out = {"tokens_per_s": round(self.num_tokens / self.total_s, 1), "total_s": round(self.total_s, 2)}
        for name, values in (("first_token", self.first_token_s), ("between_tokens", self.between_tokens_s)):
            for percent in (50, 95, 99):
                out[f"{name}_p{percent}_ms"] = round(1000 * percentile(values, percent), 1)
        return out


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Requests take turns over `choices`, each with a prompt of its own."""

    choices: list[str | dict[str, float] | None]
    num_requests: int
    concurrency: int
    max_new_tokens: int
    prompt_words: int

    async def run(self, client: AsyncClient) -> Timings:
        """Send it all; raises the first error of a request."""
        timings, free = Timings(), asyncio.Semaphore(self.concurrency)
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(self.num_requests):
                group.create_task(self._one(client, number, free, timings))
        timings.total_s = time.monotonic() - start_s
        return timings

    async def _one(self, client: AsyncClient, number: int, free: asyncio.Semaphore, timings: Timings) -> None:
        words = itertools.islice(itertools.cycle(WORDS[number % len(WORDS) :] + WORDS), self.prompt_words)
        async with free:
            last_s, into = time.monotonic(), timings.first_token_s
            stream = client.stream(
                f"{number} {' '.join(words)}",
                adapters=self.choices[number % len(self.choices)],
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
                ignore_eos_token=True,
            )
            async with stream as tokens:
                async for _ in tokens:
                    now = time.monotonic()
                    into.append(now - last_s)
                    last_s, into = now, timings.between_tokens_s
                    timings.num_tokens += 1


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed; 0.0 without values."""
    if not values:
        return 0.0
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


def bench(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME[=WEIGHT]", help="Requests take turns over these; repeatable."),
    ] = None,
    num_requests: Annotated[int, typer.Option("--requests", min=1)] = 64,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 64,
    prompt_words: Annotated[int, typer.Option("--prompt-words", min=1, help="Length of each prompt.")] = 64,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Measure throughput and latencies over HTTP, with streams that end at their full length."""
    choices = [parse_adapters([text]) for text in adapter or ()] or [None]
    load = Load(choices, num_requests, concurrency, max_new_tokens, prompt_words)

    async def run() -> Timings:
        async with AsyncClient(url, api_key=api_key) as client:
            await client.info()
            return await load.run(client)

    with refusals():
        try:
            figures = asyncio.run(run()).figures()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
    if as_json:
        show_json(figures)
    else:
        show_table(("FIGURE", ""), figures.items())
