"""The fixture with which a test runs on C for this processor, on C as it is for wider ones, and without C."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_core import native

__all__ = ["native_kind", "without_native"]

WIDE = ("-DWIDE", "-O0", "-Wno-psabi")


@functools.cache
def _wide_libraries() -> str:
    """A folder of libraries with vectors of 16 floats and tiles of 12 rows, as with AVX-512, that run everywhere."""
    folder = tempfile.mkdtemp(prefix="loramux-wide-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kind = native.processor()
    assert kind is not None
    for dtype in native.DTYPES:
        native.build(dtype, kind, Path(folder) / native.library_name(dtype, kind), *WIDE)
    return folder


@pytest.fixture(params=["own", "wide", "off"])
def native_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kind: str = request.param
    if kind != "off" and native.processor() is None:
        pytest.skip("there is no library for this processor")
    if kind != "own":
        monkeypatch.setenv(native.VARIABLE, "off" if kind == "off" else _wide_libraries())
    native.library.cache_clear()
    yield kind
    native.library.cache_clear()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's operators alone: the stand-ins for devices see no others."""
    monkeypatch.setenv(native.VARIABLE, "off")
    native.library.cache_clear()
    yield
    native.library.cache_clear()
