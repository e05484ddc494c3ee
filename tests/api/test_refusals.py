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
from tests.adapters.archives import zipped
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


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def malformed_config(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def initial_pickled(folder: Path) -> None:
    shutil.copytree(folder, folder / "before")
    pickled(folder / "before")


# What is wrong with a folder as a whole, the code, and the file that the report's one group is (None: its tensors).
Spoil = Callable[[Path], None]
FOLDERS: dict[str, tuple[Spoil, str, str | None]] = {
    "no configuration": (without_config, "adapter_files_missing", None),
    "a pickle": (pickled, "adapter_pickle", "adapter_model.bin"),
    "no weights": (without_weights, "adapter_files_missing", WEIGHTS),
    "cut off": (cut_off, "adapter_file_invalid", WEIGHTS),
    "malformed configuration": (malformed_config, "adapter_file_invalid", None),
    "a pickle before training": (initial_pickled, "adapter_pickle", None),
}


def check_group(report: list[Mapping[str, Any]], message: str, example: str | None, num_tensors: int) -> None:
    """One file that is refused for the reason, or all tensors for it."""
    assert {group["outcome"] for group in report} == {"refused"}
    assert {group["reason"] for group in report} == {message}
    if example is None:
        assert sum(group["num_tensors"] for group in report) == num_tensors
    else:
        assert [(group["tensors"], group["num_tensors"], group["example"]) for group in report] == [
            ("file", 1, example)
        ]


@pytest.mark.parametrize("kind", ["convert", "import"])
@pytest.mark.parametrize("case", FOLDERS)
def test_jobs_report_on_folders_that_are_no_adapters(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, case: str
) -> None:
    spoil, code, example = FOLDERS[case]
    num_tensors = len(load((live.folders["dora"] / WEIGHTS).read_bytes()))
    shutil.copytree(live.folders["dora"], tmp_path / "bad")
    spoil(tmp_path / "bad")
    monkeypatch.setattr(live.server.imports, "_root", tmp_path)
    monkeypatch.setattr(live.server.jobs, "_make_process", InlineProcess)
    initial = {"initial_path": "bad/before"} if spoil is initial_pickled else {}
    with Client(live.url) as mux:
        job = mux.jobs.create(kind, name="refused", path="bad", **initial)
        with pytest.raises(JobFailedError) as failed:
            mux.jobs.wait(job.job_id)
        error = mux.jobs.get(job.job_id).error  # as HTTP has it
    assert failed.value.code == error["code"] == code
    assert failed.value.report == error["report"]
    assert str(tmp_path) not in json.dumps(error)
    check_group(error["report"], error["message"], example, num_tensors)


def test_a_conversion_by_its_real_process_has_the_report(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tensors = changed(live.folders["dora"], tmp_path / "bad", first_missing)
    monkeypatch.setattr(live.server.imports, "_root", tmp_path)
    with Client(live.url) as mux, pytest.raises(JobFailedError, match="lacks its B") as failed:
        mux.jobs.wait(mux.jobs.create("convert", name="refused", path="bad").job_id)
    assert failed.value.code == "adapter_file_invalid"
    check(failed.value.report, num_tensors, 2, "lacks lora_B")  # the module's A and magnitude


def archived(**members: bytes) -> bytes:
    return zipped([(name.replace("__", "."), data) for name, data in members.items()])


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "no archive": (b"nothing of the kind", "archive_invalid"),
    "cut off": (archived(a=b"x" * 1000)[:-30], "archive_invalid"),
    "a broken gzip": (b"\x1f\x8b" + b"x" * 50, "archive_invalid"),
    "a name that climbs": (zipped([("../adapter_config.json", b"{}")]), "archive_unsafe"),
    "a pickle": (archived(adapter_config__json=b"{}", adapter_model__bin=b"x"), "adapter_pickle"),
    "nothing in it": (archived(readme=b"x"), "adapter_files_missing"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_refused_archives_have_a_report(client: httpx.Client, live: Live, tmp_path: Path, case: str) -> None:
    data, code = ARCHIVES[case]
    answer = client.post("/admin/adapters", data={"name": "refused"}, files=[("file", ("a.zip", data))])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, code), error
    check_group(error["report"], error["message"], "archive", 0)
    (tmp_path / "a.zip").write_bytes(data)
    with Client(live.url) as mux, pytest.raises(InvalidRequestError) as caught:
        mux.adapters.upload(tmp_path / "a.zip", name="refused")
    assert (caught.value.code, caught.value.report) == (code, error["report"])


@pytest.mark.parametrize(
    ("names", "code", "example"),
    [
        ((CONFIG, "adapter_model.bin"), "adapter_pickle", "adapter_model.bin"),
        ((CONFIG,), "adapter_files_missing", WEIGHTS),
        ((CONFIG, WEIGHTS, "README.md"), "adapter_files_missing", "README.md"),
    ],
)
def test_forms_without_the_two_files_have_a_report(
    client: httpx.Client, names: tuple[str, ...], code: str, example: str
) -> None:
    files = [("files", (name, b"{}")) for name in names]
    answer = client.post("/admin/adapters", data={"name": "refused"}, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, code), error
    check_group(error["report"], error["message"], example, 0)


def test_a_report_has_its_bounds() -> None:
    groups = [TensorGroup("other", "refused", f"reason {i}", ("n" * 1000,)) for i in range(10_000)]
    report = import_report(groups)
    assert len(report) == MAX_GROUPS + 1
    assert sum(group["num_tensors"] for group in report) == len(groups)
    assert len(json.dumps(report)) < 100_000
