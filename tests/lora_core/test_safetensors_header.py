"""A safetensors header has one meaning or is refused; what is accepted, the library reads alike."""

import json
import struct
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lora_core import CheckpointError
from lora_core.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header

ONE = '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (text, bytes, or an object for JSON) and a length that may be a lie."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape: Any, offsets: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def one(**changes: Any) -> bytes:
    """A file with one good float, but for `changes` of its entry."""
    return file({"a": tensor([1], [0, 4]) | changes}, b"1234")


FLOAT = tensor([1], [0, 4])
MALFORMED: dict[str, bytes] = {
    "no bytes": b"",
    "length only": struct.pack("<Q", 0),
    "empty header": file(b"", b"12345678"),
    "length 2^63": file(ONE, b"1234", length=1 << 63),
    "length 2^64-1": file(ONE, b"1234", length=(1 << 64) - 1),
    "length past the end": file(ONE, b"1234", length=len(ONE) + 5),
    "length inside the header": file(ONE, b"1234", length=len(ONE) - 1),
    "header over the cap": file("{" + " " * MAX_HEADER_BYTES + ONE[1:], b"1234"),
    "leading space": file(" " + ONE, b"1234"),
    "leading byte order mark": file("\ufeff" + ONE, b"1234"),
    "trailing NUL": file(ONE + "\0", b"1234"),
    "two objects": file(ONE + ONE, b"1234"),
    "array": file(f"[{ONE}]", b"1234"),
    "no JSON": file("{nothing}"),
    "UTF-16": file(ONE.encode("utf-16-le"), b"1234"),
    "not UTF-8": file(ONE.replace("a", "\ud800", 1).encode("utf-8", "surrogatepass"), b"1234"),
    "escaped lone surrogate": file(ONE.replace('"a"', r'"\ud800"'), b"1234"),
    "control character": file(ONE.replace('"a"', '"\1"'), b"1234"),
    "deep arrays": file('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects": file('{"a":' * 100_000 + "1" + "}" * 100_000),
    "number of 5,000 digits": file(ONE.replace("[1]", "[" + "1" * 5_000 + "]"), b"1234"),
    "no tensors": file({}),
    "no tensors, but data": file({}, b"1234"),
    "metadata only": file({"__metadata__": {"format": "pt"}}),
    "metadata a number": file({"__metadata__": 5, "a": FLOAT}, b"1234"),
    "metadata a list": file({"__metadata__": ["x"], "a": FLOAT}, b"1234"),
    "metadata of numbers": file({"__metadata__": {"x": 1}, "a": FLOAT}, b"1234"),
    "metadata nested": file({"__metadata__": {"x": {"y": "z"}}, "a": FLOAT}, b"1234"),
    "metadata with a lone surrogate": file({"__metadata__": {"x": "\udfff"}, "a": FLOAT}, b"1234"),
    "metadata NaN": file(ONE[:-1] + ', "__metadata__": {"x": NaN}}', b"1234"),
    "name twice": file(ONE[:-1] + ", " + ONE[1:], b"1234"),
    "name twice, once escaped": file(ONE[:-1] + ", " + ONE[1:].replace('"a"', r'"\u0061"'), b"1234"),
    "field twice": file(ONE.replace('"shape": [1]', '"shape": [2], "shape": [1]'), b"1234"),
    "entry null": file({"a": None}),
    "entry a list": file({"a": [FLOAT]}, b"1234"),
    "field missing": file({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "field too many": one(stride=[1]),
    "dtype unknown": one(dtype="F31"),
    "dtype lower case": one(dtype="f32"),
    "dtype of 4 bits": one(dtype="F4", shape=[8]),
    "dtype null": one(dtype=None),
    "dtype a list": one(dtype=["F32"]),
    "shape a number": one(shape=1),
    "shape null": one(shape=None),
    "shape a text": one(shape="1"),
    "dimension true": one(shape=[True]),
    "dimension negative": one(shape=[-1, -1]),
    "dimension minus zero": file('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'),
    "dimension a float": one(shape=[1.0]),
    "dimension huge": one(shape=[1 << 62]),
    "dimensions that overflow to nothing": file({"a": tensor([1 << 32, 1 << 32, 0], [0, 0])}),
    "dimensions that overflow 64 bits": file({"a": tensor([1 << 33, 1 << 33], [0, 4])}, b"1234"),
    "too many dimensions": one(shape=[1] * 6),
    "offsets reversed": one(data_offsets=[4, 0]),
    "offsets of three": one(data_offsets=[0, 4, 4]),
    "offset true": one(shape=[], dtype="U8", data_offsets=[0, True]),
    "offset a float": one(data_offsets=[0, 4.0]),
    "offset negative": one(data_offsets=[-4, 0]),
    "offsets past the end": file({"a": tensor([2], [0, 8])}, b"1234"),
    "size too small": one(shape=[2]),
    "size too large": file({"a": tensor([1], [0, 8])}, b"12345678"),
    "trailing bytes": file(ONE, b"1234" + b"PK\5\6"),
    "missing bytes": file(ONE, b"123"),
    "gap at the start": file({"a": tensor([1], [4, 8])}, b"12345678"),
    "gap": file({"a": FLOAT, "b": tensor([1], [8, 12])}, b"123456789012"),
    "overlap": file({"a": FLOAT, "b": tensor([1], [2, 6])}, b"123456"),
    "same bytes twice": file({"a": FLOAT, "b": FLOAT}, b"1234"),
    "too many tensors": file({f"{i}": tensor([0], [0, 0]) for i in range(10_001)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(name: str) -> None:
    data = MALFORMED[name]
    with pytest.raises(CheckpointError) as caught:
        read_header(data, len(data))
    assert caught.value.code == "adapter_file_invalid"
    assert len(str(caught.value)) < 500


WELL_FORMED: dict[str, bytes] = {
    "one": file(ONE, b"1234"),
    "padded": file(ONE + " \n\r\t ", b"1234"),
    "any order": file({"b": tensor([1], [4, 8]), "a": FLOAT}, b"12345678"),
    "metadata": file({"__metadata__": {"format": "pt"}, "a": FLOAT}, b"1234"),
    "metadata null": file({"__metadata__": None, "a": FLOAT}, b"1234"),
    "scalar": file({"a": tensor([], [0, 4])}, b"1234"),
    "empty tensors": file({"a": tensor([0, 9], [4, 4]), "b": FLOAT, "c": tensor([0], [0, 0])}, b"1234"),
    "odd names": file({"": FLOAT, "\U0001f600\0": tensor([2, 1], [4, 8], "F16")}, b"12345678"),
    "every dtype": save(
        {str(t): torch.ones(2, 3).to(t) for t in (torch.float64, torch.bfloat16, torch.int8, torch.bool)}
    ),
}


def assert_read_like_the_library(data: bytes, header: dict[str, TensorInfo]) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    ours = {i.name: (i.dtype, list(i.shape), data[start + i.start : start + i.end]) for i in header.values()}
    theirs = {name: (v["dtype"], v["shape"], bytes(v["data"])) for name, v in safetensors.deserialize(data)}
    assert ours == theirs
    assert list(header) == [info.name for info in header.values()]


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_files_are_read_like_the_library(name: str) -> None:
    data = WELL_FORMED[name]
    assert_read_like_the_library(data, read_header(data, len(data)))


def test_the_header_alone_is_enough() -> None:
    data = file(ONE, b"1234")
    assert read_header(memoryview(data)[:-4], len(data)) == {"a": TensorInfo("a", "F32", (1,), 0, 4)}


def check(data: bytes) -> None:
    try:
        header = read_header(data, len(data))
    except CheckpointError:
        return
    assert_read_like_the_library(data, header)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=64))
def test_random_bytes(data: bytes) -> None:
    check(data)
    check(file(b"{" + data, data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.sampled_from(["F32", "U8", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list("ab")), inner, max_size=2),
    max_leaves=6,
)
SIZE = st.integers(0, 8)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL"]),
        "shape": st.lists(SIZE, max_size=3) | JSON,
        "data_offsets": st.tuples(SIZE, SIZE) | JSON,
    }
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON, max_size=3), st.binary(max_size=16))
@example({"a": tensor([0], (0, 0)), "b": tensor([2], (0, 2), "U8")}, b"12")
def test_random_headers(header: dict[str, Any], data: bytes) -> None:
    check(file(header, data))


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(sorted(WELL_FORMED)),
    st.lists(
        st.tuples(
            st.integers(0, 250),
            st.integers(0, 3),
            st.sampled_from([b"0", b"-", b" ", b"9", b",", b'"', b"\\u0061", b"}", b"]", b"[", b"1.", b"e1"])
            | st.binary(max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_random_mutations(name: str, edits: list[tuple[int, int, bytes]], fix_length: bool) -> None:
    data = WELL_FORMED[name]
    header_bytes = int.from_bytes(data[:8], "little")
    header, rest = data[: 8 + header_bytes], data[8 + header_bytes :]
    for position, num_removed, added in edits:
        header = header[:position] + added + header[position + num_removed :]
    if fix_length:
        header = struct.pack("<Q", max(len(header) - 8, 0)) + header[8:]
    check(header + rest)
