"""Whatever PEFT saves goes in and answers like PEFT, or is refused by name; nothing of it is ignored."""

from collections import Counter

import pytest
from safetensors import safe_open

from tests.api.import_table import PAGE, Row, find_rows, table_of, with_table
from tests.import_variants import VARIANTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    root = tmp_path_factory.mktemp("variants")
    return find_rows(root)


@pytest.mark.parametrize("title", VARIANTS)
def test_it_answers_like_peft_or_is_refused_by_name(rows: dict[str, Row], title: str) -> None:
    row = rows[title]
    if row.variant.code:
        assert (row.status, row.body["error"]["code"]) == (422, row.variant.code), row.body
        return
    assert row.status == 201, row.body
    assert row.found == row.wanted
    assert row.found != row.of_base, "the adapter changes nothing, so nothing is shown"


@pytest.mark.parametrize("title", [title for title, variant in VARIANTS.items() if not variant.code])
def test_no_tensor_is_missing_from_the_report(rows: dict[str, Row], title: str, tmp_path_factory) -> None:
    report = rows[title].body["details"]["report"]
    outcomes = Counter({group["outcome"]: group["num_tensors"] for group in report})
    assert "refused" not in outcomes
    folder = tmp_path_factory.getbasetemp().glob(f"variants*/adapter{list(VARIANTS).index(title)}")
    with safe_open(next(folder) / "adapter_model.safetensors", "pt") as file:
        assert sum(group["num_tensors"] for group in report) == len(file.keys())


def test_the_committed_table_is_what_was_found(rows: dict[str, Row]) -> None:
    page = PAGE.read_text()
    assert page == with_table(page, table_of(rows)), "run `python -m tests.api.import_table`"


def test_a_refusal_names_the_way_out(rows: dict[str, Row]) -> None:
    for title in ("`init_lora_weights=corda`", "`init_lora_weights=pissa_niter_4`"):
        message = rows[title].body["error"]["message"]
        assert "lora_core.convert_to_lora(adapter, initial, out)" in message
        assert "initial/adapter_model.safetensors" in message
    assert "safe_serialization=True" in rows["`adapter_model.bin`"].body["error"]["message"]
