"""Health, metrics, facts and the list of models."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import MODEL_ID, Live


def _metrics(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def test_health_is_empty_and_fine(client: httpx.Client) -> None:
    response = client.get("/health")
    assert (response.status_code, response.content) == (200, b"")


def test_models_lists_the_base_first_and_adapters_with_their_parent(live: Live, client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert cards[0]["id"] == MODEL_ID
    assert cards[0]["parent"] is None
    assert {card["id"] for card in cards[1:]} == set(live.folders)
    assert {card["parent"] for card in cards[1:]} == {MODEL_ID}
    assert all(card["object"] == "model" and card["max_model_len"] == 512 for card in cards)
    assert client.get("/v1/models/dora").json() == next(card for card in cards if card["id"] == "dora")
    missing = client.get("/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_info_has_the_limits(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert info["model_id"] == MODEL_ID
    assert info["max_total_tokens"] == 512
    assert info["model_dtype"] == "float32"


FOUND_IN = ("slot", "host", "store")


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    before = _metrics(client)
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5, "ignore_eos_token": True, "adapter_id": "rank4"}}
    assert client.post("/generate", json=body).status_code == 200
    assert client.post("/generate", json=body | {"inputs": "x" * 3000}).status_code == 422
    after = _metrics(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grown("loramux_generated_tokens_total") == 5
    assert grown("loramux_requests_total", outcome="length") == 1
    assert grown("loramux_time_to_first_token_seconds_count") == 1
    assert grown("loramux_tier_hits_total", tier="slot") + grown("loramux_tier_misses_total", tier="slot") == 1
    assert sum(grown("loramux_adapter_requests_total", adapter="rank4", found_in=w) for w in FOUND_IN) == 1
    loaded = ("vllm:lora_adapter_loaded", (("adapter_name", "rank4"), ("level", "gpu"), ("pinned", "false")))
    assert after[loaded] == 1
    assert after["vllm:num_gpu_loaded_lora_adapters", ()] >= 1
    used = after["loramux_tier_bytes", (("tier", "slot"),)]
    assert 0 < used <= after["loramux_slot_allocated_bytes", ()]
    assert used <= after["loramux_tier_max_bytes", (("tier", "slot"),)]
    resident = [dict(labels) for name, labels in after if name == "vllm:lora_requests_info"]
    assert len(resident) == 1
    assert "rank4" in resident[0]["running_lora_adapters"].split(",")
    assert resident[0]["max_lora"] == "4"
    assert after["vllm:num_requests_running", (("model_name", MODEL_ID),)] == 0
