"""A refused adapter's report: over HTTP, in the client's error, and in that of a job; whatever it was refused for."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from lora_core import TensorGroup
from loramux_client import Client, InvalidRequestError, JobFailedError
from server.adapters.report import MAX_GROUPS, import_report
from tests.api.conftest import Live
from tests.jobs.conftest import InlineProcess

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def setting(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def tensor(name: str, value: torch.Tensor) -> Change:
    return lambda config, tensors: tensors.update({f"base_model.model.{name}": value})


def first_missing(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if ".lora_B." in key)]


def not_a_number(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).fill_(torch.nan)


# What is changed, the code, how many of the tensors are at fault themselves (None: all), and why.
CASES: dict[str, tuple[Change, str, int | None, str]] = {
    "another kind": (setting(peft_type="LOHA"), "adapter_unsupported", None, "only LORA adapters"),
    "unsupported": (setting(layer_replication=[[0, 2]]), "adapter_unsupported", None, "layer_replication"),
    "wrong value": (setting(lora_dropout=2), "adapter_config_invalid", None, "lora_dropout"),
    "a changed base": (setting(init_lora_weights="corda"), "adapter_needs_conversion", None, "starting values"),
    "unknown tensor": (tensor("stray", torch.zeros(2)), "adapter_unsupported", 1, "not supported"),
    "no float": (tensor("x.lora_A.weight", torch.zeros(4, 4).int()), "adapter_file_invalid", 1, "dtype I32"),
    "half a module": (first_missing, "adapter_file_invalid", 1, "lacks lora_B"),
    "other rank": (setting(r=3, rank_pattern={}), "adapter_mismatch", None, "configuration says rank 3"),
    "NaN": (not_a_number, "adapter_not_finite", 2, "NaN"),  # a module's A and B
}


def changed(folder: Path, out: Path, change: Change) -> int:
    """A copy with something wrong; returns its number of tensors."""
    out.mkdir()
    config, tensors = json.loads((folder / CONFIG).read_text()), load((folder / WEIGHTS).read_bytes())
    change(config, tensors)
    (out / CONFIG).write_text(json.dumps(config))
    (out / WEIGHTS).write_bytes(save(tensors))
    return len(tensors)


def posted(client: httpx.Client, folder: Path) -> dict[str, Any]:
    files = [("files", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]
    answer = client.post("/admin/adapters", data={"name": "refused"}, files=files)
    assert answer.status_code == 422
    return answer.json()["error"]


def check(report: list[Mapping[str, Any]], num_tensors: int, num_at_fault: int | None, reason: str) -> None:
    assert {group["outcome"] for group in report} == {"refused"}
    assert sum(group["num_tensors"] for group in report) == num_tensors
    at_fault = sum(group["num_tensors"] for group in report if reason in group["reason"])
    assert at_fault == (num_tensors if num_at_fault is None else num_at_fault)


@pytest.mark.parametrize("case", CASES)
def test_every_way_in_tells_the_same(
    live: Live, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, code, num_at_fault, reason = CASES[case]
    monkeypatch.setattr(live.server.adapters._intake._convert, "_make_process", InlineProcess)
    num_tensors = changed(live.folders["rank4"], tmp_path / "bad", change)
    error = posted(client, tmp_path / "bad")
    assert error["code"] == code, error
    check(error["report"], num_tensors, num_at_fault, reason)
    monkeypatch.setattr(live.server.imports, "_root", tmp_path)
    monkeypatch.setattr(live.server.jobs, "_make_process", InlineProcess)
    with Client(live.url) as mux:
        with pytest.raises(InvalidRequestError) as caught:
            mux.adapters.upload(tmp_path / "bad", name="refused")
        assert (caught.value.code, caught.value.report) == (code, error["report"])
        with pytest.raises(JobFailedError) as failed:
            mux.jobs.wait(mux.jobs.create("import", name="refused", path="bad").job_id)
        check(failed.value.report, num_tensors, num_at_fault, reason)
        assert failed.value.code == code
    assert client.get("/admin/adapters/refused").status_code == 404


def test_a_file_without_tensors_is_one_group(live: Live, client: httpx.Client, tmp_path: Path) -> None:
    shutil.copytree(live.folders["rank4"], tmp_path / "bad")
    (tmp_path / "bad" / WEIGHTS).write_bytes(b"\x80\x02 nothing of the kind")
    (group,) = posted(client, tmp_path / "bad")["report"]
    assert (group["tensors"], group["num_tensors"], group["outcome"]) == ("file", 1, "refused")


def test_a_broken_conversion_has_the_report(
    live: Live, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tensors = changed(live.folders["rank4"], tmp_path / "bad", first_missing)
    shutil.copytree(live.folders["rank4"], tmp_path / "bad" / "initial")
    monkeypatch.setattr(live.server.imports, "_root", tmp_path)
    with Client(live.url) as mux, pytest.raises(JobFailedError) as failed:  # by its real process
        mux.jobs.wait(mux.jobs.create("import", name="refused", path="bad").job_id)
    check(failed.value.report, num_tensors, 1, "lacks lora_B")


def test_a_report_has_its_bounds() -> None:
    groups = [TensorGroup("other", "refused", f"reason {i}", ("n" * 1000,)) for i in range(10_000)]
    report = import_report(groups)
    assert len(report) == MAX_GROUPS + 1
    assert sum(group["num_tensors"] for group in report) == len(groups)
    assert len(json.dumps(report)) < 100_000
