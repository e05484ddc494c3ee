"""`loramux serve`: how it loads what it is made of."""

import gc

import pytest

from server.cli.serve import _keeping_all


def test_the_garbage_collector_leaves_what_is_loaded_alone_and_comes_back() -> None:
    before = gc.get_freeze_count()
    try:
        with _keeping_all():
            assert not gc.isenabled()
            loaded: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(loaded)
        with pytest.raises(ImportError), _keeping_all():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
