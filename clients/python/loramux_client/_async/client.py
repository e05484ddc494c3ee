"""The client: methods name an operation and hand it to their driver."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from loramux_client import _adapters, _generation, _jobs, _keys
from loramux_client._async.driver import AsyncDriver, AsyncStream
from loramux_client._connection import INFO, READY, http_arguments
from loramux_client._progress import JobBar, JobProgress, Progress
from loramux_client._retry import RetryPolicy
from loramux_client.errors import UnavailableError
from loramux_client.models import (
    Adapter,
    ChatAnswer,
    ChatDelta,
    Generation,
    Job,
    Key,
    KeyLimits,
    NewKey,
    ServerInfo,
    Token,
)
from loramux_client.options import Adapters, ChatOptions, GenerateOptions, Message

__all__ = ["AsyncAdapterCalls", "AsyncClient", "AsyncJobCalls", "AsyncKeyCalls"]

AdapterList = list[Adapter]  # a method below is called `list`
JobList = list[Job]
KeyList = list[Key]


class AsyncClient:
    """A loramux server.

    Args:
        url: where it is; by default $LORAMUX_URL, or http://127.0.0.1:8000.
        api_key: by default $LORAMUX_API_KEY, or none.
        timeout_s: for each step of an exchange: how long the server may say nothing.
        retries: how often and how patiently to try again.
        headers: sent with every request.
        transport: httpx's, for proxies, unix sockets and tests.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        headers: dict[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        http = httpx.AsyncClient(**http_arguments(url, api_key, timeout_s, headers), transport=transport)
        self._driver = AsyncDriver(http, retries)
        self.adapters = AsyncAdapterCalls(self._driver)
        self.jobs = AsyncJobCalls(self._driver)
        self.keys = AsyncKeyCalls(self._driver)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Calling it again does nothing."""
        await self._driver.http.aclose()

    async def is_ready(self) -> bool:
        """The server takes new requests: it is not starting, draining or broken."""
        try:
            await self._driver.run(READY)
        except UnavailableError:
            return False
        return True

    async def info(self) -> ServerInfo:
        """What is served, and its limits."""
        return await self._driver.run(INFO)

    async def generate(
        self,
        prompt: str,
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer to a prompt, by the base model, one adapter or a weighted mix."""
        return await self._driver.run(_generation.generate("/generate", prompt, adapters, options, timeout_s))

    def stream(
        self,
        prompt: str,
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream[Token, Generation]:
        """The same token by token."""
        operation = _generation.generate("/generate_stream", prompt, adapters, options, timeout_s)
        return AsyncStream(self._driver, operation, _generation.TokenAssembler())

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatAnswer:
        """The answer to a conversation, through the model's chat template."""
        return await self._driver.run(_generation.chat(messages, adapters, options, timeout_s, is_stream=False))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[ChatDelta, ChatAnswer]:
        """The same piece by piece."""
        operation = _generation.chat(messages, adapters, options, timeout_s, is_stream=True)
        return AsyncStream(self._driver, operation, _generation.ChatAssembler())


class AsyncAdapterCalls:
    """`client.adapters`: what can be done with adapters."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver

    async def list(self) -> AdapterList:
        """All adapters that you may see, by name."""
        return await self._driver.run(_adapters.list_adapters())

    async def get(self, name: str) -> Adapter:
        """One adapter."""
        return await self._driver.run(_adapters.get_adapter(name))

    async def upload(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        expected_generation: int | None = None,
        promote: bool = True,
        labels: Mapping[str, str] | None = None,
        note: str | None = None,
        progress: Progress | bool = False,
        timeout_s: float | None = None,
    ) -> Adapter:
        """Upload a PEFT folder, or a zip, tar or tar.gz of one. When this returns, it is checked and safe on disk.

        Args:
            name: by default that of the folder or archive.
            expected_generation: refuse unless this is the current one; 0 if there should be none.
            promote: False leaves the current generation; the new one is then `name@generation`.
            progress: True draws a bar on the terminal; a function is called with bytes sent and bytes in all.

        Raises:
            FileNotFoundError: the folder lacks a file of an adapter.
            ConflictError: another generation is current than expected.
        """
        return await self._driver.run(
            _adapters.upload_adapter(
                source,
                name,
                progress,
                timeout_s,
                expected_generation=expected_generation,
                promote=None if promote else False,
                labels=labels,
                note=note,
            )
        )

    async def delete(
        self, name: str, *, generation: int | None = None, expected_generation: int | None = None
    ) -> Adapter:
        """Delete an adapter, or one generation that is not current. New requests fail at once, running ones finish."""
        return await self._driver.run(_adapters.delete_adapter(name, generation, expected_generation))

    async def generations(self, name: str) -> AdapterList:
        """All kept generations of a name, newest first."""
        return await self._driver.run(_adapters.list_generations(name))

    async def rollback(self, name: str, *, expected_generation: int | None = None) -> Adapter:
        """Make the next older kept generation the current one."""
        return await self._driver.run(_adapters.post_action(name, "rollback", expected_generation=expected_generation))

    async def promote(self, name: str, generation: int, *, expected_generation: int | None = None) -> Adapter:
        """Make a kept generation the current one."""
        return await self._driver.run(
            _adapters.post_action(name, "promote", generation=generation, expected_generation=expected_generation)
        )

    async def annotate(
        self,
        name: str,
        *,
        generation: int | None = None,
        labels: Mapping[str, str] | None = None,
        note: str | None = None,
    ) -> Adapter:
        """Replace a generation's labels or note, by default the current one's."""
        return await self._driver.run(_adapters.annotate_adapter(name, generation, labels, note))

    async def warm(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        """Make an adapter ready for use; returns when it is."""
        operation = _adapters.post_action(name, "warm", changes_nothing=True, timeout_s=timeout_s)
        return await self._driver.run(operation)

    async def evict(self, name: str) -> Adapter:
        """Free an adapter's memory, once the requests that use it have ended."""
        return await self._driver.run(_adapters.post_action(name, "evict"))

    async def pin(self, name: str) -> Adapter:
        """Keep the name's current generation, whichever it is, ready for use."""
        return await self._driver.run(_adapters.post_action(name, "pin"))

    async def unpin(self, name: str) -> Adapter:
        """Let the adapter come and go again."""
        return await self._driver.run(_adapters.post_action(name, "unpin"))


class AsyncJobCalls:
    """`client.jobs`: long work on adapters; for keys with the scope `admin`."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver

    async def create(self, kind: str, **options: Any) -> Job:
        """Queue a job: "mix", "merge", "convert", ... with its options, by the names that the server's docs have."""
        return await self._driver.run(_jobs.create_job(kind, options))

    async def list(self) -> JobList:
        """All jobs, newest first."""
        return await self._driver.run(_jobs.list_jobs())

    async def get(self, job_id: str) -> Job:
        """A job as it is now."""
        return await self._driver.run(_jobs.get_job(job_id))

    async def cancel(self, job_id: str) -> Job:
        """End a job that has not ended."""
        return await self._driver.run(_jobs.post_job_action(job_id, "cancel"))

    async def retry(self, job_id: str) -> Job:
        """Queue a job again that failed, was cancelled or interrupted."""
        return await self._driver.run(_jobs.post_job_action(job_id, "retry"))

    async def wait(
        self, job: Job | str, *, progress: JobProgress | bool = False, timeout_s: float | None = None
    ) -> Job:
        """Wait for a job's end, and return it with its result.

        Args:
            progress: True draws a bar on the terminal; a function is called with the job after each look.
            timeout_s: how long to wait; None for as long as it takes.

        Raises:
            JobFailedError: it failed, was cancelled, or interrupted by the server's end.
            APITimeoutError: it still runs.
        """
        job_id = job if isinstance(job, str) else job.job_id
        show = JobBar() if progress is True else progress
        pace = _jobs.Pace(timeout_s)
        while True:
            found = await self.get(job_id)
            if show:
                show(found)
            if found.is_over:
                return _jobs.succeeded(found)
            await self._driver.sleep(pace.wait_s())


class AsyncKeyCalls:
    """`client.keys`: API keys; for keys with the scope `admin`."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver

    async def list(self) -> KeyList:
        """All keys, oldest first, without their secrets."""
        return await self._driver.run(_keys.list_keys())

    async def create(
        self,
        name: str,
        scopes: Sequence[str],
        *,
        tenant: str | None = None,
        adapters: Sequence[str] | None = None,
        limits: KeyLimits | None = None,
        expires_at: datetime | None = None,
    ) -> NewKey:
        """Make a key. Its `secret` is in this answer and nowhere else."""
        body = {
            "name": name,
            "scopes": [*scopes],
            "tenant": tenant,
            "adapters": None if adapters is None else [*adapters],
            "limits": None if limits is None else limits.model_dump(),
            "expires_at": None if expires_at is None else expires_at.isoformat(),
        }
        return await self._driver.run(_keys.create_key(body))

    async def revoke(self, key_id: str) -> Key:
        """End a key: it is not valid from now on."""
        return await self._driver.run(_keys.revoke_key(key_id))
