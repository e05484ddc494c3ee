"""Client of loramux: one base language model, many LoRA and DoRA adapters, every request its own adapter or mix.

    from loramux_client import Client

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("What is the capital of France?", adapters={"pirate": 1.0, "json": 0.5}).text)

`AsyncClient` has the same methods, awaited. Errors: `loramux_client.errors`.
"""

from loramux_client._async.client import AsyncClient
from loramux_client._async.driver import AsyncStream
from loramux_client._progress import JobBar, JobProgress, Progress, ProgressBar
from loramux_client._retry import RetryPolicy
from loramux_client._sync.client import Client
from loramux_client._sync.driver import Stream
from loramux_client.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ConflictError,
    GenerationError,
    IncompleteAnswerError,
    InvalidRequestError,
    JobFailedError,
    LoraMuxError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    ServerError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
    UnexpectedAnswerError,
)
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
    Usage,
)
from loramux_client.options import Adapters, ChatOptions, GenerateOptions, Message

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Adapter",
    "Adapters",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "ChatAnswer",
    "ChatDelta",
    "ChatOptions",
    "Client",
    "ConflictError",
    "GenerateOptions",
    "Generation",
    "GenerationError",
    "IncompleteAnswerError",
    "InvalidRequestError",
    "Job",
    "JobBar",
    "JobFailedError",
    "JobProgress",
    "Key",
    "KeyLimits",
    "LoraMuxError",
    "Message",
    "NewKey",
    "NotFoundError",
    "PermissionDeniedError",
    "Progress",
    "ProgressBar",
    "RateLimitedError",
    "RetryPolicy",
    "ServerError",
    "ServerInfo",
    "StorageFullError",
    "Stream",
    "Token",
    "TooLargeError",
    "UnavailableError",
    "UnexpectedAnswerError",
    "Usage",
]
