"""Commands that talk to a server: what they show people and scripts, and what they end with."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import native
from server.cli.bench import percentile
from server.cli.console import plain
from tests.api.conftest import Live
from tests.cli.conftest import Run
from tests.jobs.conftest import InlineProcess

PROMPT = "What is the capital of France?"


def test_generate_shows_the_text_and_nothing_else(live: Live, run: Run) -> None:
    for flags, name in ((), None), (("-a", "dora"), "dora"), (("-a", "dora=1"), "dora"):
        text = json.loads(run("generate", PROMPT, "-n", 12, "--json", *flags).stdout)["text"]
        assert live.expected(name, PROMPT, 12)[1].startswith(text)
        assert run("generate", PROMPT, "-n", 12, *flags).stdout == plain(text) + "\n"
    assert run("generate", "-", "-n", 3, text=PROMPT).stdout == run("generate", PROMPT, "-n", 3).stdout
    one, other = (run("generate", PROMPT, "--temperature", 1, "--seed", seed, "-n", 20).stdout for seed in (1, 2))
    assert one != other


def test_an_adapters_life(live: Live, run: Run) -> None:
    upload = ("adapters", "upload", live.folders["rank4"], "--name", "cli")
    uploaded = json.loads(run(*upload, "--label", "stage=one", "--note", "[red]first", "--json").stdout)
    assert (uploaded["name"], uploaded["generation"], uploaded["labels"]) == ("cli", 1, {"stage": "one"})
    table = run("adapters", "ls").stdout
    assert table.splitlines()[0].split()[:3] == ["NAME", "GEN", "TYPE"]
    assert "[red]first" in table
    assert {one["name"] for one in json.loads(run("adapters", "ls", "--json").stdout)} == {*live.folders, "cli"}
    other = run("adapters", "upload", live.folders["rank8"], "--name", "cli", "--expected-generation", 1)
    assert "cli@2" in other.stderr
    assert other.stdout == ""
    run(*upload, "--expected-generation", 1, status=1)
    shown = run("adapters", "show", "cli").stdout
    assert "label.stage" not in shown
    assert "details.rank" in shown
    assert json.loads(run("adapters", "rollback", "cli", "--json").stdout)["generation"] == 1
    assert json.loads(run("adapters", "rollback", "cli", "--to", 2, "--json").stdout)["generation"] == 2
    assert json.loads(run("adapters", "warm", "cli", "--json").stdout)["residency"] == "slot"
    assert json.loads(run("adapters", "pin", "cli", "--json").stdout)["is_pinned"]
    run("adapters", "evict", "cli", status=1)
    assert not json.loads(run("adapters", "pin", "cli", "--undo", "--json").stdout)["is_pinned"]
    assert json.loads(run("adapters", "evict", "cli", "--json").stdout)["residency"] == "store"
    run("adapters", "rm", "cli@1", "-y")
    assert [one.split()[2] for one in run("adapters", "show", "cli").stdout.splitlines() if one[:2] == "* "] == ["2"]
    run("adapters", "rm", "cli", text="n\n", status=1)
    assert json.loads(run("adapters", "show", "cli", "--json").stdout)["generation"] == 2
    run("adapters", "rm", "cli", text="y\n")
    run("adapters", "show", "cli", status=3)


def test_exit_statuses(live: Live, run: Run, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for arguments, status, word in (
        (("generate", "x", "-a", "nobody"), 3, "adapter_not_found"),
        (("generate", "x", "--top-p", 3), 1, "invalid_value"),
        (("generate", "x", "-a", "a=b"), 2, "NAME=WEIGHT"),
        (("generate",), 2, "prompt"),
        (("adapters", "upload", tmp_path), 1, "adapter_config.json"),
        (("adapters", "upload", live.folders["rank4"], "--name", "a/b"), 1, "adapter_name_invalid"),
        (("keys", "ls"), 1, "keys_disabled"),
        (("adapters", "ls", "--url", nowhere), 5, "no answer"),
    ):
        result = run(*arguments, status=status)
        assert word in result.stderr
        assert result.stdout == ""


def test_a_conversation_that_switches_adapters(live: Live, run: Run) -> None:
    lines = [
        "/set temperature 0",
        "/set max_tokens 6",
        PROMPT,
        "/use dora",
        "again",
        "/mix dora=0.5 rank8=1",
        "again",
        "/use nobody",
        "/set colour red",
        "/adapters",
        "/what",
        "/clear",
        "/base",
        PROMPT,
        "/quit",
        "never said",
    ]
    result = run("chat", text="\n".join(lines))
    prompts = [line.split("> ")[0] for line in result.stderr.splitlines() if "> " in line]
    assert "base" in prompts
    for shown in ("dora>", "0.5 dora + 1 rank8>", "there is no adapter 'nobody'", "no option 'colour'", "/use NAME"):
        assert shown in result.stderr
    assert result.stdout.count("\n") >= 4
    first, last = result.stdout.splitlines()[0], result.stdout.rstrip("\n").splitlines()[-1]
    assert first
    assert last
    assert run("chat", "-a", "rank4", text="").stderr.splitlines()[1].startswith("rank4>")


def test_bench_measures(live: Live, run: Run) -> None:
    flags = ("--requests", 6, "-c", 3, "-n", 5, "--prompt-words", 8)
    figures = json.loads(run("bench", "-a", "dora", "-a", "rank4=0.5", *flags, "--json").stdout)
    assert figures["tokens_per_s"] > 0
    assert 0 < figures["first_token_p50_ms"] <= figures["first_token_p99_ms"]
    assert "tokens_per_s" in run("bench", *flags).stdout
    run("bench", "-a", "nobody", *flags, status=3)


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 50) == 7.0
    assert percentile([], 50) == 0.0


def test_doctor(live: Live, run: Run, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(run("doctor", "--model", tiny[0], "--store", tmp_path / "s", "--json").stdout)
    states = {check["name"]: check["state"] for check in report["checks"]}
    wanted = {"python", "device", "model", "memory", "store", "server", "served model", "adapters"}
    assert states.keys() - {"products"} == wanted
    assert native.processor() is None or states["products"] == ("ok" if native.library(torch.bfloat16) else "warning")
    assert {states[name] for name in ("python", "device", "model", "server", "served model", "adapters")} == {"ok"}
    found = run("doctor", "--model", tmp_path, status=1).stdout
    assert "no config.json" in found
    monkeypatch.setenv("LORAMUX_URL", "http://127.0.0.1:9")
    assert "loramux serve" in run("doctor", "--model", tiny[0], "--store", tmp_path).stdout
    assert "object" in run("doctor", "--failpoints").stdout


def test_nothing_steers_the_terminal() -> None:
    assert plain("a\x1b[2Jb\nc\td\u202ee\x9b") == "a\ufffd[2Jb\nc\td\ufffde\ufffd"


def test_jobs_from_the_command_line(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.server.jobs, "_make_process", InlineProcess)  # tests of the API start real ones
    mixed = json.loads(run("mix", "mixed", "-a", "rank4=1", "-a", "rank8=0.5", "--type", "cat", "--json").stdout)
    assert (mixed["kind"], mixed["state"], mixed["fraction"]) == ("mix", "succeeded", 1.0)
    assert json.loads(run("adapters", "show", "mixed", "--json").stdout)["generation"] == 1
    whole = json.loads(run("generate", PROMPT, "-n", 8, "-a", "mixed", "--json").stdout)["text"]
    assert (
        whole
        == json.loads(run("generate", PROMPT, "-n", 8, "-a", "rank4=1", "-a", "rank8=0.5", "--json").stdout)["text"]
    )
    queued = run("convert", "dora", "converted", "--rank", 8, "--no-wait")
    job_id = json.loads(run("jobs", "ls", "--json").stdout)[0]["job_id"]
    assert job_id in queued.stderr
    assert json.loads(run("jobs", "wait", job_id, "--json").stdout)["state"] == "succeeded"
    assert "succeeded" in run("jobs", "show", job_id).stdout
    assert "convert" in run("jobs", "ls").stdout
    run("jobs", "cancel", job_id, status=1)
    run("jobs", "show", "nothing", status=3)
    run("mix", "worse", "-a", "nobody", status=3)
    whole = json.loads(run("merge", "rank4=0.5", "rank8", "--json").stdout)
    assert (whole["state"], [one["weight"] for one in whole["options"]["adapters"]]) == ("succeeded", [0.5, 1.0])
    for flags, kind in (("--no-judge", "loftq"), ("--compensation", "loftq-compensation")):
        made = run("loftq", kind, "--rank", 2, "--quantization", "int8", flags, "--json")
        assert (json.loads(made.stdout)["kind"], json.loads(made.stdout)["state"]) == (kind, "succeeded")
        assert json.loads(run("adapters", "show", kind, "--json").stdout)["details"]["rank"] == 2
    run("loftq", "wrong", "--compensation", "--adapter", "rank4", status=2)
    for name in ("mixed", "converted", "loftq", "loftq-compensation"):
        run("adapters", "rm", name, "-y")
