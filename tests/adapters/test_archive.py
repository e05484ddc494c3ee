"""Uploaded archives: what tools make is read, what attackers make is refused, by name and within bounds."""

import gzip
import io
import os
import random
import resource
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from server.adapters.archive import ArchiveLimits, read_adapter_archive
from server.adapters.archive_source import Budget
from server.errors import InvalidAdapterError, StorageFullError, TooLargeError
from tests.adapters.archives import (
    BUILDERS,
    CONFIG,
    FILES,
    PLAIN,
    WEIGHTS,
    Entries,
    entries,
    gzipped,
    read,
    refused,
    tarred,
    zipped,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


# What tools make


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    "members",
    [
        pytest.param(PLAIN, id="top"),
        pytest.param(PLAIN[::-1], id="other order"),
        pytest.param(entries("my-adapter/"), id="folder"),
        pytest.param(entries("./"), id="dot"),
        pytest.param(entries("./my-adapter/"), id="dot folder"),
        pytest.param([("my-adapter/", b""), *entries("my-adapter/")], id="folder member"),
        pytest.param([("./", b""), *entries("./")], id="dot member"),
        pytest.param(entries("out/french/"), id="deep folder"),
        pytest.param(entries(**{"README.md": b"x", "tokenizer.json": b"{}", "sub/notes.txt": b"y"}), id="more files"),
        pytest.param(entries("a/", **{"a/._adapter_config.json": b"x", "__MACOSX/a/x": b"y"}), id="macOS"),
        pytest.param(entries(**{"training_args.bin": b"x", "optimizer.pt": b"y"}), id="pickles beside"),
        pytest.param(entries(**{"all.zip": zipped(PLAIN), "all.tar": tarred(PLAIN)}), id="nested"),
        pytest.param(entries(**{"zip.zip": zipped(PLAIN, zipfile.ZIP_STORED)}), id="nested stored"),
        pytest.param(entries("é" * 60 + "/" + "ü" * 90 + "/"), id="long names"),
        pytest.param(entries(**{f"{i}": b"" for i in range(14)}), id="as many members as allowed"),
    ],
)
def test_archives_of_tools_are_read(kind: str, members: Entries, target: Path) -> None:
    assert read(BUILDERS[kind](members), target) == FILES


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("folder", ["", "mine/", "initial/"])
def test_the_adapter_before_its_training_is_read_too(kind: str, folder: str, target: Path) -> None:
    before = [(f"{folder}initial/{name}", data[::-1]) for name, data in PLAIN]
    target.mkdir()
    read_adapter_archive(io.BytesIO(BUILDERS[kind](before + entries(folder))), target, ArchiveLimits())
    assert {name: (target / name).read_bytes() for name in FILES} == FILES
    assert {name: (target / "initial" / name).read_bytes() for name in FILES} == {n: d[::-1] for n, d in PLAIN}
    assert sorted(os.listdir(target)) == sorted([*FILES, "initial"])


@pytest.mark.parametrize("others", ["other/", "mine/sub/initial/", "mine/Initial/"])
def test_files_of_a_second_adapter_are_refused(others: str, target: Path) -> None:
    assert refused(zipped(entries("mine/") + entries(others)), target).code == "archive_unsafe"


def test_half_of_the_adapter_before_its_training_is_refused(target: Path) -> None:
    members = [*entries("mine/"), ("mine/initial/adapter_config.json", b"{}")]
    assert refused(zipped(members), target).code == "adapter_files_missing"


def test_a_folder_as_tar_and_zip_libraries_pack_it(tmp_path: Path, target: Path) -> None:
    """With modes, owners and times of real files, which GNU tar and git write in extended headers."""
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    for name, data in PLAIN:
        (folder / name).write_bytes(data)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", pax_headers={"comment": "of a commit"}) as archive:
        archive.add(folder, "my-adapter")
    assert read(out.getvalue(), target) == FILES
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zip_archive:
        for path in [folder, *folder.iterdir()]:
            zip_archive.write(path, path.relative_to(tmp_path))
        zip_archive.comment = b"a comment"
    assert read(out.getvalue(), tmp_path / "second") == FILES


def test_empty_files_are_files(target: Path) -> None:
    assert read(zipped([(CONFIG, b""), (WEIGHTS, b"")]), target) == {CONFIG: b"", WEIGHTS: b""}


# Names


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    "name",
    [
        f"../{CONFIG}", f"a/../{CONFIG}", f"a/../../{CONFIG}", "..", f"/{CONFIG}", f"//{CONFIG}", f"..\\{CONFIG}",
        f"a\\{CONFIG}", f"C:\\{CONFIG}", f"C:{CONFIG}", f"c:/{CONFIG}", f"\\\\host\\{CONFIG}", f"a\n{CONFIG}",
        "../../etc/passwd", "/etc/passwd", "a/" * 600 + "x", "a\x7fb",
    ],
)  # fmt: skip
def test_unsafe_names(kind: str, name: str, target: Path) -> None:
    assert refused(BUILDERS[kind]([*PLAIN, (name, b"x")]), target).code == "archive_unsafe"


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    "name",
    [
        CONFIG, f"./{CONFIG}", f"other/{CONFIG}", CONFIG.upper(), "Adapter_Config.json", "ａdapter_config.json",
        "adapter_config．json", "adapter\u200b_config.json", "\ufeffadapter_config.json", f"{CONFIG} ", f"{CONFIG}.",
        WEIGHTS, "ADAPTER_MODEL.SAFETENSORS", "adapter_model.ſafetensors", f"{CONFIG}/",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_can_be_taken_for_a_wanted_one(kind: str, name: str, target: Path) -> None:
    for number, members in enumerate(([*PLAIN, (name, b"")], [(name, b""), *PLAIN])):
        assert refused(BUILDERS[kind](members), target.with_name(str(number))).code == "archive_unsafe"


@pytest.mark.parametrize("kind", BUILDERS)
def test_files_in_different_folders(kind: str, target: Path) -> None:
    members = [(f"a/{CONFIG}", FILES[CONFIG]), (f"b/{WEIGHTS}", FILES[WEIGHTS])]
    assert refused(BUILDERS[kind](members), target).code == "archive_unsafe"


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    ("members", "code"),
    [
        ([], "adapter_files_missing"),
        (PLAIN[:1], "adapter_files_missing"),
        (PLAIN[1:], "adapter_files_missing"),
        ([("x.bin", b""), PLAIN[1]], "adapter_files_missing"),
        ([PLAIN[0], ("adapter_model.bin", b"x")], "adapter_pickle"),
        ([PLAIN[0], ("a/Adapter_Model.BIN", b"x")], "adapter_pickle"),
        ([PLAIN[0], ("model.pt", b"x")], "adapter_pickle"),
        ([("adapter_model.pkl", b"x")], "adapter_pickle"),
        ([(f"a/{CONFIG}.txt", b"")], "adapter_files_missing"),
    ],
)
def test_missing_files(kind: str, members: Entries, code: str, target: Path) -> None:
    error = refused(BUILDERS[kind](members), target)
    assert error.code == code
    assert code != "adapter_pickle" or "safe_serialization=True" in error.message


# No archive


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"PK", b"\x1f\x8b", b"\x1f\x8b\x08", b"\x80\x04\x95", b"{}" * 1000, b"\0" * 100, b"\x28\xb5\x2f\xfd",
     gzip.compress(b"", mtime=0), gzip.compress(b"no tar", mtime=0), b"BZh91AY", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c",
     b"Rar!\x1a\x07"],
)  # fmt: skip
def test_other_files(data: bytes, target: Path) -> None:
    assert refused(data, target).code == "archive_invalid"


GZIPPED = gzipped(PLAIN)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GZIPPED[:-1], id="cut in the trailer"),
        pytest.param(GZIPPED[:-8], id="no trailer"),
        pytest.param(GZIPPED[:100], id="cut"),
        pytest.param(GZIPPED[:-8] + bytes(8), id="wrong checksum"),
        pytest.param(GZIPPED + b"x", id="trailing byte"),
        pytest.param(GZIPPED + GZIPPED, id="two streams"),
        pytest.param(GZIPPED + gzip.compress(b"") * 1000, id="many streams"),
        pytest.param(b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 1_000_000, id="endless file name"),
    ],
)
def test_broken_gzip(data: bytes, target: Path) -> None:
    assert refused(data, target).code == "archive_invalid"


# Sizes


BOMB = 48 << 20


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md"])
@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        pytest.param(ArchiveLimits(), None, id="ratio"),
        pytest.param(ArchiveLimits(max_ratio=10_000, max_inflated_bytes=4 << 20), 4 << 20, id="inflated"),
        pytest.param(ArchiveLimits(max_ratio=10_000, max_weights_bytes=4 << 20), 4 << 20, id="file"),
    ],
)
def test_bombs(
    kind: str, name: str, limits: ArchiveLimits, allowed: int | None, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [member for member in PLAIN if member[0] != name]
    data = BUILDERS[kind]([*others, (name, bytes(BOMB))])
    allowed = allowed or 100 * len(data)
    inflated = 0
    spend = Budget.spend

    def counted(self: Budget, num_bytes: int) -> None:
        nonlocal inflated
        inflated += num_bytes
        spend(self, num_bytes)

    monkeypatch.setattr(Budget, "spend", counted)
    tracemalloc.start()
    try:
        if name == "README.md" and (kind == "zip" or limits.max_weights_bytes < BOMB):
            assert read(data, target, limits) == FILES  # not inflated at all, or within the limits
            assert kind == "tar.gz" or inflated < 64 << 10
        else:
            assert isinstance(refused(data, target, limits), TooLargeError)
            assert inflated <= allowed + sum(map(len, FILES.values())) + (68 << 10)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", BUILDERS)
def test_file_limits_are_exact(kind: str, tmp_path: Path) -> None:
    sizes = {f"max_{part}_bytes": len(FILES[name]) for part, name in (("config", CONFIG), ("weights", WEIGHTS))}
    data = BUILDERS[kind](PLAIN)
    assert read(data, tmp_path / "fits", ArchiveLimits(**sizes)) == FILES
    for number, limit in enumerate(sizes):
        error = refused(data, tmp_path / str(number), ArchiveLimits(**sizes | {limit: sizes[limit] - 1}))
        assert error.code == "too_large"


def test_small_archives_may_inflate_more(target: Path) -> None:
    """Below 1 MiB the ratio says nothing: a small adapter of zeros is no bomb."""
    files = [(CONFIG, b"{}"), (WEIGHTS, bytes(900_000))]
    assert read(gzipped(files), target)[WEIGHTS] == bytes(900_000)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("num_more", [15, 5000])
def test_too_many_members(kind: str, num_more: int, target: Path) -> None:
    members = entries(**{f"m{i}": b"" for i in range(num_more)})
    assert refused(BUILDERS[kind](members), target).code == "too_large"


def test_a_full_disk_is_no_fault_of_the_archive(target: Path) -> None:
    target.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageFullError):
            read_adapter_archive(io.BytesIO(zipped(PLAIN)), target, ArchiveLimits())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(target)


# Anything


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_cut_is_refused(kind: str, tmp_path: Path) -> None:
    data = BUILDERS[kind](PLAIN)
    needed = len(data.rstrip(b"\0")) if kind == "tar" else len(data)
    for end in [*range(0, needed, 97), needed - 1]:
        refused(data[:end], tmp_path / f"{kind}{end}")


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("seed", range(4))
def test_mutations_never_escape(kind: str, seed: int, tmp_path: Path) -> None:
    """Random damage is refused with a typed error, or leaves exactly two files."""
    rng = random.Random(f"{kind} {seed}")
    whole = BUILDERS[kind]([("a/", b""), *entries("a/", **{"a/README.md": b"x" * 50, "n" * 120: b"y"})])
    for number in range(250):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif rng.random() < 0.5:
                del data[at : at + rng.randrange(1, 600)]
            else:
                data[at:at] = data[:at][-rng.randrange(1, 600) :]
            data = data or bytearray(1)
        target = tmp_path / str(number)
        target.mkdir()
        try:
            read_adapter_archive(io.BytesIO(data), target, ArchiveLimits())
        except (InvalidAdapterError, TooLargeError):
            assert not os.listdir(target)
        else:
            assert sorted(os.listdir(target)) == sorted(FILES)


def test_random_deflate_streams_never_escape(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(200):
        packer: Callable[[bytes], bytes] = rng.choice((zlib.compress, gzip.compress))
        data = bytearray(packer(tarred(PLAIN)))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        target = tmp_path / str(number)
        try:
            read(bytes(data), target)
        except (InvalidAdapterError, TooLargeError):
            assert not os.listdir(target)
