"""What the server answers, as frozen pydantic models. Fields that this version does not know are dropped."""

from datetime import datetime
from typing import Any

from pydantic import AliasPath, BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Adapter",
    "ChatAnswer",
    "ChatDelta",
    "Generation",
    "Job",
    "Key",
    "KeyLimits",
    "NewKey",
    "ServerInfo",
    "Token",
    "Usage",
]


class Model(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Adapter(Model):
    """An adapter on the server.

    Attributes:
        digest: sha256 over its files; equal digests are equal adapters.
        generation: counts what was uploaded under the name, from 1.
        is_current: the bare name means this generation; the others are `name@generation`.
        is_pinned: the name's current generation stays ready for use.
        details: what the check at upload found out: type, rank, targets, ...
        residency: "slot" (ready for use), "host" (in memory) or "store" (on disk).
        usage: what became of it since the server's start.
    """

    name: str
    digest: str
    generation: int
    created_at: datetime
    num_bytes: int
    details: dict[str, Any] = Field(default_factory=dict)
    residency: str = "store"
    is_current: bool = True
    is_pinned: bool = False
    labels: dict[str, str] = Field(default_factory=dict)
    note: str = ""
    source: dict[str, Any] = Field(default_factory=dict)
    usage: dict[str, Any] = Field(default_factory=dict)


class Token(Model):
    """One generated token.

    Attributes:
        text: what it adds to the output; "" inside a character, and of special tokens.
        logprob: under the model, before temperature and truncation.
        special: an end-of-sequence token or the like.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_special_text(cls, data: Any) -> Any:
        return data | {"text": ""} if isinstance(data, dict) and data.get("special") else data


class Generation(Model):
    """A complete answer to `generate`.

    Attributes:
        finish_reason: "length", "eos_token" or "stop_sequence".
        seed: what the draws depend on; None for a greedy answer.
        tokens: the generated ones; empty for a stream's result, whose tokens the stream has given already.
    """

    text: str = Field(validation_alias="generated_text")
    finish_reason: str = Field(validation_alias=AliasPath("details", "finish_reason"))
    num_prompt_tokens: int = Field(validation_alias=AliasPath("details", "prompt_tokens"))
    num_generated_tokens: int = Field(validation_alias=AliasPath("details", "generated_tokens"))
    seed: int | None = Field(None, validation_alias=AliasPath("details", "seed"))
    tokens: list[Token] = Field(default_factory=list, validation_alias=AliasPath("details", "tokens"))


class Usage(Model):
    """Token counts of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(Model):
    """A complete answer to `chat`.

    Attributes:
        text: "" where the model called tools and said nothing.
        finish_reason: "stop", "length" or "tool_calls".
    """

    id: str
    model: str
    text: str | None = Field("", validation_alias=AliasPath("choices", 0, "message", "content"))
    finish_reason: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    tool_calls: list[dict[str, Any]] = Field(
        default_factory=list, validation_alias=AliasPath("choices", 0, "message", "tool_calls")
    )
    usage: Usage


class ChatDelta(Model):
    """A piece of an answer to `chat_stream`; only the last one has a `finish_reason`."""

    text: str = ""
    finish_reason: str | None = None


class KeyLimits(Model):
    """How much a key may ask for; None for no limit.

    Attributes:
        max_adapters, max_adapter_bytes: of all that its tenant keeps.
    """

    weight: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None


class Key(Model):
    """An API key, without its secret.

    Attributes:
        scopes: of "generate", "adapters:read", "adapters:write" and "admin".
        adapters: names or patterns to which it is confined; None for no such list.
    """

    key_id: str
    name: str
    scopes: list[str]
    tenant: str | None = None
    adapters: list[str] | None = None
    limits: KeyLimits = KeyLimits()
    created_at: datetime
    expires_at: datetime | None = None


class NewKey(Key):
    """A key that was just made; its secret is shown this one time."""

    secret: str


class Job(Model):
    """Long work on the server.

    Attributes:
        state: "queued", "running", "succeeded", "failed", "cancelled" or "interrupted": by the server's end.
        attempt: counts from 1.
        stage, fraction, eta_s: how far it is; seconds that are left if it goes on as it went so far.
        error: `message` and `code` of one that failed; `report`, if it refused an adapter.
    """

    job_id: str
    kind: str
    state: str
    options: dict[str, Any] = Field(default_factory=dict)
    inputs: list[dict[str, Any]] = Field(default_factory=list)
    attempt: int = 1
    created_at: str = ""
    started_at: str = ""
    finished_at: str = ""
    stage: str = ""
    fraction: float = 0.0
    eta_s: float | None = None
    result: dict[str, Any] = Field(default_factory=dict)
    error: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """It has ended, one way or another."""
        return self.state not in {"queued", "running"}


class ServerInfo(Model):
    """What is served, and its limits."""

    model_id: str
    model_dtype: str
    model_device_type: str
    max_total_tokens: int
    max_concurrent_requests: int
    max_adapters_in_use: int
    version: str
