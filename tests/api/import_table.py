"""The table of server/adapters/README.md: what each kind of adapter that PEFT saves becomes here, found by doing it.

`python -m tests.api.import_table` writes it anew.
"""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.jobs.conversion import ConversionProcess
from tests import peft_adapters
from tests.architecture.source_tree import ROOT
from tests.import_variants import BASES, VARIANTS, Variant, make, make_base
from tests.jobs.conftest import InlineProcess
from tests.live_server import running_server, tiny_settings
from tests.tiny_folder import tiny_tokenizer

__all__ = ["PAGE", "Row", "find_rows", "table_of", "with_table"]

PAGE = ROOT / "server/adapters/README.md"
START, END = "<!-- made by tests.api.import_table -->\n", "<!-- end -->\n"
# Asked in turn, until PEFT's answer is not the base's: a small random model may repeat itself whatever is added to it.
PROMPTS = ("What is the capital of France?", "Hello", "The quick brown fox", "1 2 3 4", "jumps over the lazy dog", "Z?")
NUM_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """What became of a variant.

    Attributes:
        status, body: of the answer to the upload.
        found, wanted: greedy tokens by the server and by PEFT; none if it was refused.
        of_base: those of the base, by PEFT.
    """

    variant: Variant
    status: int
    body: dict[str, Any]
    found: list[int]
    wanted: list[int]
    of_base: list[int]


def find_rows(root: Path) -> dict[str, Row]:
    """Make every variant, upload it, and ask both sides."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rows = {}
    for name in BASES:
        base = make_base(name, seed, root / name)
        with (
            running_server(tiny_settings(root / name, root / f"{name}-store", max_slots=2)) as (url, server),
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            # Saves a start of Python for each; that a process does it is tested elsewhere.
            server.adapters._intake._convert = ConversionProcess(root / name, InlineProcess)
            for i, (title, variant) in enumerate(VARIANTS.items()):
                if variant.base == name:
                    rows[title] = _row(client, variant, base, seed + i, root / f"adapter{i}")
    return {title: rows[title] for title in VARIANTS}


def _row(client: httpx.Client, variant: Variant, base: Any, seed: int, folder: Path) -> Row:
    made = make(variant, base, seed, folder)
    folders = {"files": folder} | ({"initial": folder / "initial"} if variant.sends_initial else {})
    files = [
        (field, (path.name, path.read_bytes()))
        for field, part in folders.items()
        for path in sorted(part.iterdir())
        if path.name.startswith("adapter_")
    ]
    answer = client.post("/admin/adapters", data={"name": "variant"}, files=files)
    if answer.status_code != 201:
        return Row(variant, answer.status_code, answer.json(), [], [], [])
    for prompt in PROMPTS:
        ids = tiny_tokenizer()(prompt).input_ids
        wanted, of_base = (peft_adapters.greedy(model, ids, NUM_TOKENS)[0] for model in (made.reference, base))
        if wanted != of_base:
            break
    parameters = {"adapter_id": "variant", "max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "details": True}
    generated = client.post("/generate", json={"inputs": prompt, "parameters": parameters}).json()
    found = [token["id"] for token in generated["details"]["tokens"]]
    return Row(variant, answer.status_code, answer.json(), found, wanted, of_base)


def table_of(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    lines = ["| saved by PEFT with | base | | its tensors |", "| --- | --- | --- | --- |"]
    for title, row in rows.items():
        outcome = "answers like PEFT" if row.status == 201 else f"refused: `{row.body['error']['code']}`"
        lines.append(f"| {title} | {row.variant.base} | {outcome} | {_fates(row)} |")
    return "\n".join(lines) + "\n"


def _fates(row: Row) -> str:
    groups: dict[str, list[str]] = {}
    for group in row.body.get("details", {}).get("report", ()):
        groups.setdefault(f"{group['outcome']} ({group['reason']})", []).append(group["tensors"])
    return "; ".join(f"{', '.join(tensors)}: {fate}" for fate, tensors in groups.items())


def with_table(page: str, table: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(START)
    return before + START + table + END + rest.partition(END)[2]


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as root:
        table = table_of(find_rows(Path(root)))
    PAGE.write_text(with_table(PAGE.read_text(), table))


if __name__ == "__main__":
    main()
