"""Structured output: whatever the model and the adapter, and whoever is in the batch, the text fits."""

import asyncio
import json
import random
import re
from typing import Any

import httpx
import pytest

from tests.api.conftest import Live

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "size": {"enum": [1, 2, 3]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["city", "size", "tags"],
    "additionalProperties": False,
}
REGEX = r"[a-c]{3,6}-[0-9]{2}"
ADAPTERS = [None, "rank4", "rank16", "dora", "rslora"]


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"city", "size", "tags"}
        and bool(re.fullmatch("[a-z]{1,8}", value["city"]))
        and value["size"] in {1, 2, 3}
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b"}
    )


def fits_regex(text: str) -> bool:
    return bool(re.fullmatch(REGEX, text))


def fits_choice(text: str) -> bool:
    return text in {"ja", "nein €"}


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "OpenAI": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        fits_schema,
    ),
    "LoRAX": ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits_schema),
    "huggingface_hub": ({"response_format": {"type": "json_object", "value": SCHEMA}}, fits_schema),
    "TGI": ({"response_format": {"type": "json", "value": SCHEMA}}, fits_schema),
    "TGI's regex": ({"response_format": {"type": "regex", "value": REGEX}}, fits_regex),
    "vLLM": ({"structured_outputs": {"json": SCHEMA}}, fits_schema),
    "vLLM, as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, fits_schema),
    "vLLM's regex": ({"structured_outputs": {"regex": REGEX}}, fits_regex),
    "vLLM's choice": ({"structured_outputs": {"choice": ["ja", "nein €"]}}, fits_choice),
    "vLLM's grammar": ({"structured_outputs": {"grammar": 'start: "ja" | "nein " "€"'}}, fits_choice),
    "GBNF": ({"structured_outputs": {"grammar": 'root ::= "ja" | "nein €"'}}, fits_choice),
    "guided_json": ({"guided_json": SCHEMA}, fits_schema),
    "guided_regex": ({"guided_regex": REGEX}, fits_regex),
    "guided_choice": ({"guided_choice": ["ja", "nein €"]}, fits_choice),
    "guided_grammar": ({"guided_grammar": 'start: "ja" | "nein €"'}, fits_choice),
}
TGI_FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"grammar": {"type": "json", "value": SCHEMA}}, fits_schema),
    "regex": ({"grammar": {"type": "regex", "value": REGEX}}, fits_regex),
    "json_schema": ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, fits_schema),
    "LoRAX": ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits_schema),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_the_openai_family(client: httpx.Client, form: str) -> None:
    fields, fits = FORMS[form]
    body = {"model": "rank4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "seed": 5} | fields
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert fits(choice["message"]["content"]), choice


@pytest.mark.parametrize("form", TGI_FORMS)
def test_every_spelling_of_the_tgi_family(client: httpx.Client, form: str) -> None:
    fields, fits = TGI_FORMS[form]
    # Greedy, a random model may like white space best; the penalty has it say something else in time.
    steered = {"adapter_id": "dora", "max_new_tokens": 300, "frequency_penalty": 2.0, "details": True}
    parameters = steered | fields
    answer = client.post("/generate", json={"inputs": "Hi", "parameters": parameters}).json()
    assert answer["details"]["finish_reason"] == "eos_token"
    assert fits(answer["generated_text"]), answer


def test_a_mixed_batch_fits_and_leaves_the_others_alone(live: Live) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    jobs = [(rng.choice(ADAPTERS), rng.choice([None, *FORMS]), f"Text {i} " * rng.randrange(1, 4)) for i in range(32)]

    async def run() -> list[str]:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:

            async def one(name: str | None, form: str | None, prompt: str, number: int) -> str:
                body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": 300, "seed": number}
                if form is None:
                    body |= {"max_tokens": 15, "temperature": 0, "ignore_eos": True}
                else:
                    body |= FORMS[form][0]
                response = await client.post("/v1/completions", json=body)
                return response.json()["choices"][0]["text"]

            return await asyncio.gather(*(one(*job, i) for i, job in enumerate(jobs)))

    for text, (name, form, prompt) in zip(asyncio.run(run()), jobs, strict=True):
        if form is None:
            assert text == live.expected(name, prompt, 15)[1]
        else:
            assert FORMS[form][1](text), (form, text)


def test_a_seed_gives_the_same_text_again(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 200, "seed": 9, "n": 2, "structured_outputs": {"regex": "[a-z]{20}"}}
    first, second = (client.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
    assert first == second
    assert first[0]["text"] != first[1]["text"]


def test_an_output_that_is_cut_says_so(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 5, "structured_outputs": {"regex": "[a-z]{200}"}}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert re.fullmatch("[a-z]{5,}", choice["text"])


def test_what_leaves_no_token_fails_alone(live: Live, client: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 9, "structured_outputs": {"choice": ["a"]}, "bad_words": ["a"]}
    response = client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_token_allowed")
    live.assert_idle()
