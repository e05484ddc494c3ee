"""The plot says what the cells say."""

import random
from xml.etree import ElementTree

from tests.bench.plot import COLORS, plot
from tests.bench.report import RATE

SVG = "{http://www.w3.org/2000/svg}"


def test_each_cell_that_can_be_compared_has_a_bar_of_its_length() -> None:
    rates = {f"{peer}/{name}": random.uniform(1, 400) for name in ("W1", "W3") for peer in COLORS}
    cells = {key: {"runs": [{RATE: rate / 2}, {RATE: rate}]} for key, rate in rates.items()}
    alone = {"loramux/W6": {"runs": [{RATE: 9.0}]}}
    root = ElementTree.fromstring(plot({"cells": cells | alone}))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("fill") in COLORS.values()]
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert len(bars) == len(rates)
    for name in ("W1", "W3"):
        own = [rates[f"{peer}/{name}"] for peer in COLORS]
        lengths = [float(bar.get("width", 0)) for bar in bars[: len(COLORS)]]
        del bars[: len(COLORS)]
        for rate, length in zip(own, lengths, strict=True):
            assert f"{rate:.1f} tok/s" in texts
            assert abs(length / max(lengths) - rate / max(own)) < 0.01
    assert not any(text.startswith("W6") for text in texts)
