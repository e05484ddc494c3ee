"""`/tokenize`, `/detokenize`, `/chat_tokenize`."""

import httpx

from tests.api.conftest import Live
from tests.api.test_chat import MESSAGES

TEXT = "Grüße aus Köln: 10 € 🎉"


def test_tokens_of_a_text_with_their_places(live: Live, client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"inputs": TEXT}).json()
    assert [token["id"] for token in tokens] == live.tokenizer(TEXT).input_ids
    assert all(TEXT[token["start"] : token["stop"]] == token["text"] for token in tokens)
    assert {i for token in tokens for i in range(token["start"], token["stop"])} == set(range(len(TEXT)))


def test_vllms_form_and_back(live: Live, client: httpx.Client) -> None:
    answer = client.post("/tokenize", json={"model": "x", "prompt": TEXT, "return_token_strs": True}).json()
    ids = live.tokenizer(TEXT).input_ids
    assert answer == {
        "count": len(ids),
        "max_model_len": 512,
        "tokens": ids,
        "token_strs": live.tokenizer.convert_ids_to_tokens(ids),
    }
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT}


def test_a_conversation(live: Live, client: httpx.Client) -> None:
    text = live.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = live.tokenizer(text).input_ids
    answer = client.post("/chat_tokenize", json={"messages": MESSAGES}).json()
    assert answer["templated_text"] == text
    assert [token["id"] for token in answer["tokenize_response"]] == ids
    assert client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == ids
    shorter = client.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert ids[: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < len(ids)


def test_bad_requests(client: httpx.Client) -> None:
    both = client.post("/tokenize", json={"inputs": "a", "prompt": "b"})
    assert (both.status_code, both.json()["code"]) == (422, "invalid_value")
    unknown = client.post("/detokenize", json={"tokens": [1, 5000]})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "token_unknown")
