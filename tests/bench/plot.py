"""The cells of a results file as bars, one group a workload: an SVG for the README."""

from collections.abc import Mapping
from html import escape
from typing import Any

from tests.bench.report import RATE
from tests.bench.workloads import WORKLOADS

__all__ = ["COLORS", "plot"]

COLORS = {
    "loramux": "#2f6fde",
    "loramux-int4": "#8fb4f5",
    "vllm": "#e0a030",
    "vllm-lora": "#c07f18",
    "llama.cpp-q4": "#5aa469",
    "transformers-cb": "#b07cc6",
    "peft": "#8c8c8c",
}
WIDTH, LABEL_WIDTH, BAR, GAP, TITLE = 760, 130, 15, 22, 18
FONT = 'font-family="sans-serif" font-size="12"'


def plot(found: Mapping[str, Any]) -> str:
    """Output tokens a second of each peer, each workload on a scale of its own; returns the SVG's text."""
    groups = {
        name: {
            peer: max(run[RATE] for run in cell["runs"])
            for peer in COLORS
            if (cell := found["cells"].get(f"{peer}/{name}")) is not None
        }
        for name in WORKLOADS
    }
    parts, y = [], 0
    for name, rates in groups.items():
        if len(rates) < 2:  # nobody to compare with
            continue
        y += GAP
        parts.append(
            f'<text x="0" y="{y}" {FONT} font-weight="bold">{escape(f"{name}: {WORKLOADS[name].what}")}</text>'
        )
        y += TITLE - BAR // 2
        scale = (WIDTH - LABEL_WIDTH - 70) / max(rates.values())
        for peer, rate in rates.items():
            length = round(rate * scale, 1)
            parts.append(f'<text x="0" y="{y + BAR - 4}" {FONT}>{escape(peer)}</text>')
            bar = f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length}" height="{BAR - 2}" fill="{COLORS[peer]}"/>'
            parts.append(bar + f'<text x="{LABEL_WIDTH + length + 6}" y="{y + BAR - 4}" {FONT}>{rate:.1f} tok/s</text>')
            y += BAR
    parts.insert(0, '<rect width="100%" height="100%" fill="#fff"/>')
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{y + GAP}" viewBox="0 0 {WIDTH} {y + GAP}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'
