# Made from _async/client.py by make_sync.py: change that file.
"""The client: methods name an operation and hand it to their driver."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import httpx

from loramux_client import _adapters, _generation
from loramux_client._sync.driver import Driver, Stream
from loramux_client._connection import INFO, http_arguments
from loramux_client._retry import RetryPolicy
from loramux_client._upload import Progress
from loramux_client.models import Adapter, ChatAnswer, ChatDelta, Generation, ServerInfo, Token
from loramux_client.options import Adapters, ChatOptions, GenerateOptions, Message

__all__ = ["AdapterCalls", "Client"]


class Client:
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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        http = httpx.Client(**http_arguments(url, api_key, timeout_s, headers), transport=transport)
        self._driver = Driver(http, retries)
        self.adapters = AdapterCalls(self._driver)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Calling it again does nothing."""
        self._driver.http.close()

    def info(self) -> ServerInfo:
        """What is served, and its limits."""
        return self._driver.run(INFO)

    def generate(
        self,
        prompt: str,
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer to a prompt, by the base model, one adapter or a weighted mix."""
        return self._driver.run(_generation.generate("/generate", prompt, adapters, options, timeout_s))

    def stream(
        self,
        prompt: str,
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream[Token, Generation]:
        """The same token by token."""
        operation = _generation.generate("/generate_stream", prompt, adapters, options, timeout_s)
        return Stream(self._driver, operation, _generation.TokenAssembler())

    def chat(
        self,
        messages: Sequence[Message],
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatAnswer:
        """The answer to a conversation, through the model's chat template."""
        return self._driver.run(_generation.chat(messages, adapters, options, timeout_s, is_stream=False))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        adapters: Adapters = None,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream[ChatDelta, ChatAnswer]:
        """The same piece by piece."""
        operation = _generation.chat(messages, adapters, options, timeout_s, is_stream=True)
        return Stream(self._driver, operation, _generation.ChatAssembler())


class AdapterCalls:
    """`client.adapters`: what can be done with adapters."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def list(self) -> list[Adapter]:
        """All adapters that you may see, by name."""
        return self._driver.run(_adapters.list_adapters())

    def get(self, name: str) -> Adapter:
        """One adapter."""
        return self._driver.run(_adapters.get_adapter(name))

    def upload(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        progress: Progress | bool = False,
        timeout_s: float | None = None,
    ) -> Adapter:
        """Upload a PEFT folder, or a zip, tar or tar.gz of one. When this returns, it is checked and safe on disk.

        Args:
            name: by default that of the folder or archive.
            progress: True draws a bar on the terminal; a function is called with bytes sent and bytes in all.

        Raises:
            FileNotFoundError: the folder lacks a file of an adapter.
        """
        return self._driver.run(_adapters.upload_adapter(source, name, progress, timeout_s))

    def delete(self, name: str) -> Adapter:
        """Delete an adapter: new requests for it fail at once, running ones finish."""
        return self._driver.run(_adapters.delete_adapter(name))
