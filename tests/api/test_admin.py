"""Uploading, listing, showing and deleting adapters over HTTP."""

import io
import json
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from tests.api.conftest import Live

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]


def _archive(folder: Path, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in folder.iterdir():
                archive.write(path, f"my-adapter/{path.name}")
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(folder, "my-adapter")
    return out.getvalue()


def _upload(client: httpx.Client, name: str, files: Any) -> httpx.Response:
    return client.post("/admin/adapters", data={"name": name}, files=files)


def _generate(client: httpx.Client, adapter: str) -> httpx.Response:
    parameters = {"adapter_id": adapter, "max_new_tokens": 6, "ignore_eos_token": True}
    return client.post("/generate", json={"inputs": "Hello", "parameters": parameters})


@pytest.mark.parametrize("kind", ["files", "zip", "tar", "tar.gz"])
def test_an_uploaded_adapter_answers_like_peft_until_it_is_deleted(live: Live, client: httpx.Client, kind: str) -> None:
    folder = live.folders["dora"]
    files = _files(folder) if kind == "files" else [("file", (f"x.{kind}", _archive(folder, kind)))]
    response = _upload(client, "mine", files)
    assert response.status_code == 201
    info = response.json()
    assert info["name"] == "mine"
    assert info["details"]["type"] == "dora"
    assert info["details"]["rank"] == 4
    assert _generate(client, "mine").json()["generated_text"] == live.expected("dora", "Hello", 6)[1]
    shown = client.get("/admin/adapters/mine").json()
    assert shown.pop("usage")["requests"] == info.pop("usage")["requests"] + 1
    assert shown == info | {"residency": "slot"}
    listed = client.get("/admin/adapters").json()["adapters"]
    assert shown in [{key: value for key, value in one.items() if key != "usage"} for one in listed]
    assert client.delete("/admin/adapters/mine").status_code == 200
    gone = _generate(client, "mine")
    assert (gone.status_code, gone.json()["code"]) == (404, "adapter_not_found")
    again = client.delete("/admin/adapters/mine")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "adapter_not_found")


def test_the_same_contents_are_the_same_generation_and_new_ones_count_up(live: Live, client: httpx.Client) -> None:
    first = _upload(client, "versions", _files(live.folders["rank4"])).json()
    same = _upload(client, "versions", _files(live.folders["rank4"])).json()
    other = _upload(client, "versions", _files(live.folders["rank8"])).json()
    assert (same["generation"], same["digest"]) == (first["generation"], first["digest"])
    assert (other["generation"], other["digest"] == first["digest"]) == (first["generation"] + 1, False)
    assert _generate(client, "versions").json()["generated_text"] == live.expected("rank8", "Hello", 6)[1]
    client.delete("/admin/adapters/versions")
    back = _upload(client, "versions", _files(live.folders["rank4"])).json()
    assert back["generation"] > other["generation"]
    assert client.delete("/admin/adapters/versions").status_code == 200


def test_requests_that_run_finish_on_the_adapter_they_began_with(live: Live, client: httpx.Client) -> None:
    _upload(client, "moving", _files(live.folders["rank16"]))
    parameters = {"adapter_id": "moving", "max_new_tokens": 300, "ignore_eos_token": True}
    body = {"inputs": "Hello", "parameters": parameters}
    with httpx.stream("POST", f"{live.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        _upload(client, "moving", _files(live.folders["rslora"]))
        assert _generate(client, "moving").json()["generated_text"] == live.expected("rslora", "Hello", 6)[1]
        client.delete("/admin/adapters/moving")
        events = [json.loads(line[6:]) for line in lines if line]
    assert events[-1]["generated_text"] == live.expected("rank16", "Hello", 300)[1]


def _changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    raw = json.loads((folder / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps(raw | config))
    return target


def _with_weights(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (target / WEIGHTS).write_bytes(save(tensors))
    return target


def _first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first(tensors, "lora_B.weight")][0, 0] = float("nan")


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first(tensors, "lora_A.weight")] = torch.zeros(4, 33)


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_first(tensors, "lora_A.weight")]


def _whole_module_missing(tensors: dict[str, torch.Tensor]) -> None:
    prefix = _first(tensors, "lora_A.weight").removesuffix("lora_A.weight")
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def _stray(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)


BAD_ADAPTERS: dict[str, tuple[Any, str]] = {
    "NaN weights": (lambda folder, target: _with_weights(folder, target, _nan), "adapter_not_finite"),
    "wrong shape": (lambda folder, target: _with_weights(folder, target, _huge), "adapter_mismatch"),
    "half a module": (lambda folder, target: _with_weights(folder, target, _missing), "adapter_file_invalid"),
    "a module too few": (
        lambda folder, target: _with_weights(folder, target, _whole_module_missing),
        "adapter_mismatch",
    ),
    "base weights smuggled in": (lambda folder, target: _with_weights(folder, target, _stray), "adapter_unsupported"),
    "another rank": (lambda folder, target: _changed(folder, target, r=5), "adapter_mismatch"),
    "rank zero": (lambda folder, target: _changed(folder, target, r=0), "adapter_config_invalid"),
    "code to import": (
        lambda folder, target: _changed(folder, target, megatron_config={"a": 1}, megatron_core="os.path"),
        "adapter_config_invalid",
    ),
    "another method": (lambda folder, target: _changed(folder, target, peft_type="IA3"), "adapter_unsupported"),
    "a field of the future": (lambda folder, target: _changed(folder, target, use_magic=True), "adapter_unsupported"),
    "trained on a changed base": (
        lambda folder, target: _changed(folder, target, init_lora_weights="pissa"),
        "adapter_needs_conversion",
    ),
    "a regular expression that never ends": (
        lambda folder, target: _changed(folder, target, target_modules=r"((?:[a-z]|[a-z.0-9_]|\w)*)*[^\x00-\xff]"),
        "adapter_config_invalid",
    ),
    "targets that the model lacks": (
        lambda folder, target: _changed(folder, target, target_modules=["q_proj", "nothing"]),
        "adapter_mismatch",
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapters_are_refused_by_name(live: Live, client: httpx.Client, tmp_path: Path, case: str) -> None:
    make, code = BAD_ADAPTERS[case]
    folder = make(live.folders["rank4"], tmp_path / "bad")
    before = client.get("/admin/adapters").json()
    response = _upload(client, "bad", _files(folder))
    assert (response.status_code, response.json()["error"]["code"]) == (422, code), response.text
    assert client.get("/admin/adapters").json() == before
    live.server.store.check_integrity()
    assert _generate(client, "rank4").status_code == 200


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "é", "a" * 129, "base:x", "a,b", "x\n", "tiny"])
def test_bad_names(live: Live, client: httpx.Client, name: str) -> None:
    response = _upload(client, name, _files(live.folders["rank4"]))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_name_invalid"), response.text


def test_bad_forms(live: Live, client: httpx.Client) -> None:
    folder = live.folders["rank4"]
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"json": {"name": "x"}}, 422, "not_multipart"),
        ({"files": _files(folder)}, 422, "missing_field"),
        ({"data": {"name": "x", "nmae": "y"}, "files": _files(folder)}, 422, "multipart_invalid"),
        ({"data": {"name": ["x", "y"]}, "files": _files(folder)}, 422, "multipart_invalid"),
        ({"data": {"name": "x", "expected_generation": "-1"}, "files": _files(folder)}, 422, "invalid_value"),
        ({"data": {"name": "x", "promote": "perhaps"}, "files": _files(folder)}, 422, "invalid_value"),
        ({"data": {"name": "x", "labels": "[]"}, "files": _files(folder)}, 422, "label_invalid"),
        ({"data": {"name": "x", "labels": '{"a": 1}'}, "files": _files(folder)}, 422, "label_invalid"),
        ({"data": {"name": "x"}, "files": _files(folder)[:1]}, 422, "adapter_files_missing"),
        ({"data": {"name": "x"}, "files": [("f", ("adapter_model.bin", b"\x80\x02"))]}, 422, "adapter_pickle"),
        ({"data": {"name": "x"}, "files": [("f", ("x.zip", b"PK\x03\x04nonsense"))]}, 422, "archive_invalid"),
        ({"data": {"name": "x"}, "files": [("f", ("x", b""))]}, 422, "archive_invalid"),
        ({"data": {"name": "x"}, "files": [("f", (f"{i}", b"")) for i in range(20)]}, 422, "multipart_invalid"),
        (
            {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "missing_field",
        ),
        ({"content": b"junk", "headers": {"Content-Type": "multipart/form-data"}}, 422, "multipart_invalid"),
    ]
    for arguments, status, code in cases:
        response = client.post("/admin/adapters", **arguments)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


def test_an_upload_above_the_limit(client: httpx.Client) -> None:
    files = [("files", (CONFIG, b"{}")), ("files", (WEIGHTS, b"x" * (3 << 20)))]
    response = _upload(client, "big", files)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_an_archive_that_would_leave_its_folder(live: Live, client: httpx.Client, tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../adapter_config.json", "{}")
        archive.writestr("adapter_model.safetensors", b"x")
    response = _upload(client, "evil", [("f", ("x.zip", out.getvalue()))])
    assert (response.status_code, response.json()["error"]["code"]) == (422, "archive_unsafe")


def test_races_for_one_name_have_one_outcome(live: Live, client: httpx.Client) -> None:
    folders = [live.folders[name] for name in ("rank4", "rank8", "rank16", "rslora")]
    statuses: list[int] = []

    def upload(folder: Path) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as own:
            while (status := _upload(own, "raced", _files(folder)).status_code) == 429:
                pass
            statuses.append(status)

    threads = [threading.Thread(target=upload, args=[folder]) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [201] * 4
    listed = [a for a in client.get("/admin/adapters").json()["adapters"] if a["name"] == "raced"]
    assert len(listed) == 1
    assert listed[0]["generation"] >= 4
    text = _generate(client, "raced").json()["generated_text"]
    assert text in {live.expected(name, "Hello", 6)[1] for name in ("rank4", "rank8", "rank16", "rslora")}
    assert client.delete("/admin/adapters/raced").status_code == 200
