"""Bad input gets a 4xx with a stable code in the family's envelope, and the server goes on."""

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import Live

GENERATE = "/generate"


def _generate(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "Hello", "parameters": {"max_new_tokens": 2} | parameters}


BAD_REQUESTS: dict[str, tuple[Any, int, str]] = {
    "unknown adapter": (_generate(adapter_id="nobody"), 404, "adapter_not_found"),
    "an adapter's name that is a path": (_generate(adapter_id="../../etc/passwd"), 404, "adapter_not_found"),
    "an adapter's name with a lone surrogate": (_generate(adapter_id="\ud800"), 422, "invalid_value"),
    "unknown adapter in a mix": (
        {"inputs": "Hello", "adapters": [{"name": "rank4"}, {"name": "nobody"}]},
        404,
        "adapter_not_found",
    ),
    "adapters chosen twice": (
        _generate(adapter_id="rank4") | {"adapters": [{"name": "rank8"}]},
        422,
        "adapter_choice_conflict",
    ),
    "more adapters than slots": (
        {"inputs": "Hello", "adapters": [{"name": n} for n in ("rank4", "rank8", "rank16", "dora", "rslora")]},
        422,
        "too_many_adapters",
    ),
    "weights that do not match": (
        _generate(merged_adapters={"ids": ["rank4", "rank8"], "weights": [1.0]}),
        422,
        "invalid_value",
    ),
    "a merge strategy that is not the exact one": (
        _generate(merged_adapters={"ids": ["rank4"], "weights": [1.0], "merge_strategy": "ties"}),
        422,
        "not_supported",
    ),
    "an adapter under another name": (_generate(lora_name="rank4"), 422, "unknown_field"),
    "an adapter in the wrong place": ({"inputs": "Hello", "adapter_id": "rank4"}, 422, "unknown_field"),
    "a mix in the wrong place": (_generate(adapters=[{"name": "rank4"}]), 422, "unknown_field"),
    "empty prompt": ({"inputs": ""}, 422, "invalid_value"),
    "no prompt": ({"parameters": {}}, 422, "invalid_value"),
    "a prompt that is no string": ({"inputs": 7}, 422, "invalid_value"),
    "a prompt with a lone surrogate": ({"inputs": "a\ud800b"}, 422, "invalid_value"),
    "prompt too long": ({"inputs": "x" * 3000}, 422, "context_length_exceeded"),
    "output too long": (_generate(max_new_tokens=10_000), 422, "context_length_exceeded"),
    "no output": (_generate(max_new_tokens=0), 422, "invalid_value"),
    "negative temperature": (_generate(temperature=-1), 422, "invalid_value"),
    "temperature is text": (_generate(temperature="hot"), 422, "invalid_value"),
    "top_p of zero": (_generate(top_p=0), 422, "invalid_value"),
    "top_p above one": (_generate(top_p=1.5), 422, "invalid_value"),
    "top_k of zero": (_generate(top_k=0), 422, "invalid_value"),
    "negative seed": (_generate(seed=-1), 422, "invalid_value"),
    "seed beyond 64 bits": (_generate(seed=1 << 64), 422, "invalid_value"),
    "too many stop strings": (_generate(stop=["x"] * 17), 422, "invalid_value"),
    "an empty stop string": (_generate(stop=[""]), 422, "invalid_value"),
    "a stop string too long": (_generate(stop=["x" * 257]), 422, "invalid_value"),
    "weight too large": ({"inputs": "Hello", "adapters": [{"name": "rank4", "weight": 1e30}]}, 422, "invalid_value"),
    "unsupported source": (_generate(adapter_source="s3"), 422, "invalid_value"),
    "watermark": (_generate(watermark=True), 422, "not_supported"),
    "beam search": (_generate(num_beams=4), 422, "not_supported"),
    "beam search in vLLM's words": (_generate(use_beam_search=True), 422, "not_supported"),
    "a regular expression that is none": (_generate(grammar={"type": "regex", "value": "(a"}), 422, "grammar_invalid"),
    "a schema that is none": (_generate(grammar={"type": "json", "value": {"type": "x"}}), 422, "grammar_invalid"),
    "a grammar without a value": (_generate(grammar={"type": "regex"}), 422, "missing_field"),
    "a grammar of no known type": (_generate(grammar={"type": "xml", "value": "a"}), 422, "invalid_value"),
    "two grammars": (
        _generate(grammar={"type": "regex", "value": "a"}, response_format={"type": "json_object"}),
        422,
        "invalid_value",
    ),
    "best_of without sampling": (_generate(best_of=2), 422, "invalid_value"),
    "best_of with a seed": (_generate(best_of=2, do_sample=True, seed=1), 422, "invalid_value"),
    "best_of too large": (_generate(best_of=17, do_sample=True), 422, "invalid_value"),
    "repetition_penalty of zero": (_generate(repetition_penalty=0), 422, "invalid_value"),
    "frequency_penalty above two": (_generate(frequency_penalty=2.1), 422, "invalid_value"),
    "typical_p above one": (_generate(typical_p=1.1), 422, "invalid_value"),
    "truncate of zero": (_generate(truncate=0), 422, "invalid_value"),
    "too many top_n_tokens": (_generate(top_n_tokens=21), 422, "invalid_value"),
    "an empty bad word": (_generate(bad_words=[""]), 422, "invalid_value"),
    "a number in quotes": (_generate(top_k="5"), 422, "invalid_value"),
    "a list for a body": ([], 422, "invalid_value"),
    "null for a body": (None, 422, "invalid_value"),
}


@pytest.mark.parametrize("path", [GENERATE, "/generate_stream"])
@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(client: httpx.Client, path: str, case: str) -> None:
    body, status, code = BAD_REQUESTS[case]
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    answer = response.json()
    assert (response.status_code, answer["code"]) == (status, code), answer
    assert isinstance(answer["error"], str)
    assert answer["error_type"] == ("not_found" if status == 404 else "validation")
    assert client.post(path, json=_generate()).status_code == 200


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "json_invalid"),
        (b"", "invalid_value"),
        (b"\xff\xfe", "json_invalid"),
        (b"NaN", "invalid_value"),
        (b'{"inputs": "x", "parameters": {"temperature": NaN}}', "invalid_value"),
        (b'{"inputs": "x", "parameters": {"temperature": Infinity}}', "invalid_value"),
        (b'{"inputs": "x", "parameters": {"seed": ' + b"9" * 5000 + b"}}", "json_invalid"),
        (b'{"inputs": ' + b"[" * 100_000, "json_invalid"),
    ],
    ids=["cut off", "empty", "no utf-8", "NaN", "NaN inside", "Infinity inside", "5,000 digits", "deep"],
)
def test_malformed_json(client: httpx.Client, content: bytes, code: str) -> None:
    response = client.post(GENERATE, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, code), response.text


def test_a_body_above_the_limit(client: httpx.Client) -> None:
    response = client.post(GENERATE, json={"inputs": "x" * 200_000})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")

    def endless() -> Any:
        for _ in range(64):
            yield b"x" * (1 << 14)

    chunked = client.post(GENERATE, content=endless(), headers={"Content-Type": "application/json"})
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")


def test_unknown_routes_and_methods_keep_the_familys_shape(client: httpx.Client) -> None:
    assert client.get("/nowhere").json()["code"] == "route_not_found"
    assert client.get("/v1/nowhere").json()["error"]["code"] == "route_not_found"
    assert client.get("/admin/nowhere").json()["error"]["code"] == "route_not_found"
    assert (client.get(GENERATE).status_code, client.get(GENERATE).json()["code"]) == (405, "method_not_allowed")
    assert client.put("/").headers["allow"] == "GET, POST"
    assert client.delete(GENERATE).headers["allow"] == "POST"


def test_a_broken_adapter_file_fails_its_own_requests_only(live: Live, client: httpx.Client) -> None:
    record = live.server.store.get("dora16")
    live.server.registry.forget(record.digest)  # out of memory: the next request reads the file
    path = next((live.server.store._objects.root / record.digest).glob("*.safetensors"))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        broken = client.post(GENERATE, json=_generate(adapter_id="dora16"))
        assert (broken.status_code, broken.json()["code"]) == (503, "adapter_corrupt")
        assert client.post(GENERATE, json=_generate(adapter_id="dora")).status_code == 200
    finally:
        path.write_bytes(sound)
    assert client.post(GENERATE, json=_generate(adapter_id="dora16")).status_code == 200
