"""Every way to say an adapter's name, or a job's, to the server; and the routes that take neither."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

__all__ = ["CALLS", "GREEDY", "JOB_CALLS", "NAMELESS", "NamingCall", "generate"]

GREEDY = {"max_new_tokens": 6, "ignore_eos_token": True}
MESSAGES = [{"role": "user", "content": "x"}]


@dataclass(frozen=True)
class NamingCall:
    """A request to a documented route that says a name; `is_admins`: no other scope reaches it."""

    method: str
    route: str
    send: Callable[[httpx.Client, str], httpx.Response]
    is_admins: bool = False

    def __call__(self, client: httpx.Client, name: str) -> httpx.Response:
        return self.send(client, name)


def generate(client: httpx.Client, name: str, prompt: str = "Hello") -> httpx.Response:
    return client.post("/generate", json={"inputs": prompt, "parameters": GREEDY | {"adapter_id": name}})


def body(route: str, make: Callable[[str], Any], **others: Any) -> NamingCall:
    """POST of a JSON body that holds the name."""
    return NamingCall("POST", route, lambda client, name: client.post(route, json=make(name)), **others)


def path(method: str, route: str, json: Any = None, **others: Any) -> NamingCall:
    """A request whose path holds the name."""

    def send(client: httpx.Client, name: str) -> httpx.Response:
        filled = route.replace("{generation}", "1")
        for part in ("{name}", "{model_id}", "{job_id}", "{key_id}"):
            filled = filled.replace(part, name)
        return client.request(method, filled, json=json)

    return NamingCall(method, route, send, **others)


def job(kind: str, make: Callable[[str], dict[str, Any]]) -> NamingCall:
    return body("/admin/jobs", lambda name: {"kind": kind} | make(name))


def with_header(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/generate", json={"inputs": "x"}, headers={"X-Adapter-Id": name})


ADMINS = {"is_admins": True}
CALLS: dict[str, NamingCall] = {
    "generate": NamingCall("POST", "/generate", generate),
    "stream": body("/generate_stream", lambda n: {"inputs": "x", "parameters": {"adapter_id": n}}),
    "mix": body("/generate", lambda n: {"inputs": "x", "adapters": [{"name": n}, {"name": "public"}]}),
    "merged": body("/generate", lambda n: {"inputs": "x", "parameters": {"merged_adapters": {"ids": [n]}}}),
    "header": NamingCall("POST", "/generate", with_header),
    "list": body("/", lambda n: {"inputs": "x", "parameters": {"adapter_id": n}}),
    "completion": body("/v1/completions", lambda n: {"model": n, "prompt": "x"}),
    "completion_of_base": body("/v1/completions", lambda n: {"model": f"tiny:{n}", "prompt": "x"}),
    "completion_stream": body("/v1/completions", lambda n: {"model": n, "prompt": "x", "stream": True}),
    "completion_mix": body("/v1/completions", lambda n: {"prompt": "x", "adapters": [{"name": n}]}),
    "chat": body("/v1/chat/completions", lambda n: {"model": n, "messages": MESSAGES}),
    "chat_stream": body("/v1/chat/completions", lambda n: {"model": n, "messages": MESSAGES, "stream": True}),
    "messages": body("/v1/messages", lambda n: {"model": n, "messages": MESSAGES, "max_tokens": 2}),
    "messages_mix": body(
        "/v1/messages",
        lambda n: {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "adapters": [{"name": n}]},
    ),
    "model": path("GET", "/v1/models/{model_id}"),
    "show": path("GET", "/admin/adapters/{name}"),
    "delete": path("DELETE", "/admin/adapters/{name}"),
    "annotate": path("PATCH", "/admin/adapters/{name}", {"note": "x"}),
    "generations": path("GET", "/admin/adapters/{name}/generations"),
    "delete_generation": path("DELETE", "/admin/adapters/{name}/generations/{generation}"),
    "promote": path("POST", "/admin/adapters/{name}/promote", {"generation": 1}),
    "rollback": path("POST", "/admin/adapters/{name}/rollback"),
    "warm": path("POST", "/admin/adapters/{name}/warm"),
    "evict": path("POST", "/admin/adapters/{name}/evict", **ADMINS),
    "pin": path("POST", "/admin/adapters/{name}/pin", **ADMINS),
    "unpin": path("POST", "/admin/adapters/{name}/unpin", **ADMINS),
    "job_mix": job("mix", lambda n: {"name": "own-made", "adapters": [{"name": n}, {"name": "public"}]}),
    "job_convert": job("convert", lambda n: {"name": "own-made", "adapter": n, "rank": 2}),
    "job_verify": job("verify", lambda n: {"adapters": ["public", n]}),
    "load": body("/v1/load_lora_adapter", lambda n: {"lora_name": n, "lora_path": "x"}, **ADMINS),
    "unload": body("/v1/unload_lora_adapter", lambda n: {"lora_name": n}, **ADMINS),
    "revoke_key": path("DELETE", "/admin/keys/{key_id}", **ADMINS),
}
# These take a job's id.
JOB_CALLS: dict[str, NamingCall] = {
    "show_job": path("GET", "/admin/jobs/{job_id}"),
    "cancel_job": path("POST", "/admin/jobs/{job_id}/cancel"),
    "retry_job": path("POST", "/admin/jobs/{job_id}/retry"),
    "job_events": path("GET", "/admin/jobs/{job_id}/events"),
}
# These name no adapter but one that they make, or list what there is.
NAMELESS = {
    ("GET", "/"),
    ("GET", "/ping"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/lora_adapters"),
    ("GET", "/admin/adapters"),
    ("POST", "/admin/adapters"),
    ("GET", "/admin/jobs"),
    ("GET", "/admin/tiers"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("POST", "/tokenize"),
    ("POST", "/chat_tokenize"),
    ("POST", "/detokenize"),
}
