"""The package's guide is true."""

import doctest
from pathlib import Path

import pytest

import lora_core


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = Path(lora_core.__file__).parent / "README.md"
    result = doctest.testfile(str(guide), module_relative=False)
    assert result.attempted > 25
    assert result.failed == 0
