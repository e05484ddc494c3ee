"""Run by the interpreter of an environment of its own, which has litellm.

    python litellm_client.py URL EXPECTED.json GUARDED_URL KEY

The second server asks for keys; this one has an adapter `own`. Everything that it asserts is about what litellm makes
of the answers.
"""

import json
import sys
from pathlib import Path

import litellm

PROMPT = "The quick brown fox"
FIXED = {"temperature": 0, "timeout": 60, "num_retries": 0}


def check_texts(url: str, expected: dict[str, list]) -> None:
    fields = FIXED | {"api_base": f"{url}/v1", "api_key": "none", "messages": [{"role": "user", "content": PROMPT}]}
    for name, (tokens, text) in expected.items():
        own = fields | {"model": f"openai/{name}", "max_tokens": len(tokens), "extra_body": {"ignore_eos": True}}
        answer = litellm.completion(**own)
        assert answer.choices[0].message.content == text, (answer, text)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == len(tokens)
        chunks = list(litellm.completion(**own, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert [usage.completion_tokens for chunk in chunks if (usage := getattr(chunk, "usage", None))] == [
            len(tokens)
        ]
    raises(litellm.NotFoundError, "nobody", **fields | {"model": "openai/nobody"})
    raises(litellm.NotFoundError, "nobody", **fields | {"model": "openai/nobody", "stream": True})
    raises(litellm.ContextWindowExceededError, "512 tokens", **fields | {"model": "openai/dora", "max_tokens": 10_000})


def check_keys(url: str, key: str) -> None:
    fields = FIXED | {"api_base": f"{url}/v1", "model": "openai/own", "messages": [{"role": "user", "content": PROMPT}]}
    assert litellm.completion(**fields, api_key=key, max_tokens=2).choices[0].message.content is not None
    raises(litellm.AuthenticationError, "API key", **fields, api_key="lmx_wrong")
    raises(litellm.AuthenticationError, "API key", **fields, api_key="lmx_wrong", stream=True)


def raises(kind: type, words: str, **fields) -> None:
    try:
        answer = litellm.completion(**fields)
        list(answer if fields.get("stream") else ())
    except Exception as error:
        if type(error) is not kind or words not in str(error):
            raise
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    check_texts(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    check_keys(sys.argv[3], sys.argv[4])
    print("fine")
