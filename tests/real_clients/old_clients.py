"""Run by the interpreter of an environment of its own, which has lorax-client and text-generation.

    python old_clients.py URL EXPECTED.json GUARDED_URL KEY

The second server asks for keys; this one has an adapter `own`, and another tenant `secret`.

Everything that it asserts is about what the clients make of the answers.
"""

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

import lorax
import lorax.errors
import text_generation
import text_generation.errors

PROMPT = "The quick brown fox"


def check_lorax(url: str, expected: dict[str, list], mixed: list) -> None:
    client = lorax.Client(url, timeout=60)
    for name, (tokens, text) in expected.items():
        fields = {"adapter_id": name or None, "max_new_tokens": len(tokens), "ignore_eos_token": True}
        answer = client.generate(PROMPT, **fields, details=True, decoder_input_details=True, return_k_alternatives=2)
        assert answer.generated_text == text, (answer.generated_text, text)
        assert [token.id for token in answer.details.tokens] == tokens
        assert answer.details.finish_reason == lorax.types.FinishReason.Length
        assert answer.details.generated_tokens == len(tokens)
        assert len(answer.details.tokens[0].alternative_tokens) == 2
        assert answer.details.prompt_tokens == len(answer.details.prefill)
        events = list(client.generate_stream(PROMPT, **fields))
        assert [event.token.id for event in events] == tokens
        assert events[-1].generated_text == text
        assert events[-1].details.finish_reason == lorax.types.FinishReason.Length
    tokens, text = mixed
    ids = {"ids": ["rank4", "rank8"], "weights": [0.5, 0.5]}
    mix = lorax.types.MergedAdapters(**ids, merge_strategy="linear", density=0.5)
    fields = {"merged_adapters": mix, "max_new_tokens": len(tokens), "ignore_eos_token": True}
    answer = client.generate(PROMPT, **fields, details=True)
    assert answer.generated_text == text, (answer.generated_text, text)
    assert [token.id for token in answer.details.tokens] == tokens
    best = client.generate(PROMPT, adapter_id="rank4", do_sample=True, best_of=2, max_new_tokens=4, details=True)
    assert len(best.details.best_of_sequences) == 1
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_object", "schema": schema}
    assert json.loads(client.generate(PROMPT, response_format=form, max_new_tokens=200).generated_text)["x"] in {1, 2}
    raises(lorax.errors.NotFoundError, lambda: client.generate(PROMPT, adapter_id="nobody"))
    raises(lorax.errors.NotFoundError, lambda: list(client.generate_stream(PROMPT, adapter_id="nobody")))
    raises(lorax.errors.ValidationError, lambda: client.generate(PROMPT, max_new_tokens=10_000))

    async def streamed() -> str:
        async_client = lorax.AsyncClient(url, timeout=60)
        stream = async_client.generate_stream(PROMPT, adapter_id="dora", max_new_tokens=5, ignore_eos_token=True)
        return "".join([event.token.text async for event in stream if not event.token.special])

    text = asyncio.run(streamed())  # the generated text has no special tokens; random weights may make some
    assert expected["dora"][1].startswith(text), (expected["dora"][1], text)


def check_text_generation(url: str, expected: dict[str, list]) -> None:
    for name, (tokens, _) in expected.items():
        headers = {"X-Adapter-Id": name} if name else {}
        client = text_generation.Client(url, headers=headers, timeout=60)
        answer = client.generate(PROMPT, max_new_tokens=len(tokens), decoder_input_details=True, top_n_tokens=2)
        num = len(answer.details.tokens)
        assert [token.id for token in answer.details.tokens] == tokens[:num]
        assert (
            num == len(tokens) or answer.details.finish_reason == text_generation.types.FinishReason.EndOfSequenceToken
        )
        assert len(answer.details.top_tokens[0]) == 2
        events = list(client.generate_stream(PROMPT, max_new_tokens=len(tokens)))
        assert [event.token.id for event in events] == tokens[:num]
        assert events[-1].generated_text == answer.generated_text
    client = text_generation.Client(url, timeout=60)
    chat = client.chat([{"role": "user", "content": PROMPT}], max_tokens=4, seed=1)
    assert chat.choices[0].message.content is not None
    assert chat.usage["completion_tokens"] <= 4
    raises(text_generation.errors.ValidationError, lambda: client.generate(PROMPT, max_new_tokens=10_000))
    missing = text_generation.Client(url, headers={"X-Adapter-Id": "nobody"})
    raises(text_generation.errors.NotFoundError, lambda: missing.generate(PROMPT))


def check_keys(url: str, key: str) -> None:
    for package, refusal in ((lorax, lorax.errors), (text_generation, text_generation.errors)):

        def client(secret: str, adapter: str, package=package):
            headers = {"Authorization": f"Bearer {secret}", "X-Adapter-Id": adapter}
            return package.Client(url, headers=headers, timeout=60)

        assert client(key, "own").generate(PROMPT, max_new_tokens=2).generated_text is not None
        others, wrong = client(key, "secret"), client("lmx_wrong", "own")
        raises(refusal.NotFoundError, partial(others.generate, PROMPT, max_new_tokens=2))
        for call in (wrong.generate, lambda *a, wrong=wrong, **k: list(wrong.generate_stream(*a, **k))):
            error = raises(refusal.UnknownError, partial(call, PROMPT, max_new_tokens=2))  # no class for it
            assert "API key" in str(error), error


def raises(kind: type, call) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[2]).read_text())
    half_and_half = wanted.pop("rank4 and rank8")
    check_lorax(sys.argv[1], wanted, half_and_half)
    check_text_generation(sys.argv[1], wanted)
    check_keys(sys.argv[3], sys.argv[4])
    print("fine")
