"""Ratios: the best rounds of two cells, or the median of those that were measured in turns."""

from typing import Any

from tests.bench import report


def cell(*rates: float) -> dict[str, Any]:
    runs = [{report.RATE: rate, "ttft_p50_s": 1 / rate, "itl_p99_ms": 1 / rate} for rate in rates]
    return {"runs": runs, "start_s": 9.0, "memory_bytes": 1, "other_cpu_share": [0.0], "run": "now"}


def found(**changes: Any) -> dict[str, Any]:
    cells = {
        "loramux/W3": cell(200.0, 300.0),
        "peft/W3": cell(60.0, 50.0),
        "loramux/W2": cell(300.0),
        "loramux/W6": cell(150.0),
    }
    return {"cells": cells} | changes


def by_label(what: dict[str, Any]) -> dict[str, float | None]:
    return {label: ratio for label, ratio, *_ in report.ratios(what)}


def test_the_best_rounds_of_two_cells_are_compared() -> None:
    ratios = by_label(found())
    assert ratios["W3 / PEFT mixed batch"] == 5.0
    assert ratios["W6 (DoRA) / W3"] == 0.5
    assert ratios["W3 / vLLM"] is None


def test_of_those_in_turns_the_median_counts() -> None:
    pairs = {
        "loramux/W6 loramux/W3": [[cell(a)["runs"][0], cell(b)["runs"][0]] for a, b in ((9, 10), (50, 100), (4, 4))]
    }
    ratios = by_label(found(turns={"pairs": pairs}))
    assert ratios["W6 (DoRA) / W3"] == 0.9
    assert ratios["W3 / PEFT mixed batch"] == 100 / 60, "the median of W3's five rounds, and PEFT's best"
    assert ratios["W3 / own W2"] == 100 / 300, "this pair was not measured in turns"


def test_each_pair_is_measured_in_turns_once() -> None:
    pairs = report.pairs_in_turns()
    assert len(set(pairs)) == len(pairs)
    assert {"loramux/W6 loramux/W3", "loramux/W5 peft/W5", "loramux/W3 llama.cpp-q4/W3"} <= {" ".join(p) for p in pairs}
    assert not any("vllm" in name for pair in pairs for name in pair), "which has two forms, the better one counts"
    ratios = by_label({"cells": {}, "turns": {"pairs": {" ".join(pair): [[cell(2)["runs"][0]] * 2] for pair in pairs}}})
    assert sum(ratio == 1.0 for ratio in ratios.values()) >= len(pairs)


def test_the_fastest_start_counts() -> None:
    cells = {"loramux/W1": cell(1.0), "loramux/W2": cell(1.0) | {"start_s": 7.5}}
    text = report.render({"cells": cells})
    assert "start without adapters in s, the fastest     7.50  (goal <= 8.0) met" in text
