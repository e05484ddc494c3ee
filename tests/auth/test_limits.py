"""How much a key may ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth.caller import ANYBODY, Caller
from server.auth.keys import KeyLimits, Scope
from server.auth.limits import Limiter
from server.errors import OverloadedError


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def caller(key_id: str = "k", **limits: int) -> Caller:
    return Caller(key_id, "", frozenset({Scope.GENERATE}), None, KeyLimits(**limits))


def test_requests_a_minute() -> None:
    clock = Clock()
    limiter, mine, other = Limiter(clock), caller(requests_per_minute=3), caller("other", requests_per_minute=3)
    for _ in range(3):
        with limiter.request(mine):
            pass
    with pytest.raises(OverloadedError) as refused, limiter.request(mine):
        pass
    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limited", 20)
    with limiter.request(other):
        pass
    clock.now_s += 20
    with limiter.request(mine):
        pass
    with pytest.raises(OverloadedError), limiter.request(mine):
        pass


def test_tokens_a_minute_may_go_into_debt_and_are_paid_off() -> None:
    clock = Clock()
    limiter, mine = Limiter(clock), caller(tokens_per_minute=60)
    with limiter.request(mine):
        limiter.charge(mine, 90)
    with pytest.raises(OverloadedError) as refused, limiter.request(mine):
        pass
    assert refused.value.retry_after_s == 31
    clock.now_s += 31
    with limiter.request(mine):
        pass


def test_requests_at_once() -> None:
    limiter, mine = Limiter(Clock()), caller(max_concurrent=2)
    with limiter.request(mine), limiter.request(mine):
        with pytest.raises(OverloadedError) as refused, limiter.request(mine):
            pass
        assert refused.value.code == "concurrency_limited"
    with pytest.raises(RuntimeError), limiter.request(mine):
        raise RuntimeError
    with limiter.request(mine), limiter.request(mine):
        pass


def test_without_limits_nothing_is_kept() -> None:
    limiter = Limiter(Clock())
    for _ in range(100):
        with limiter.request(ANYBODY):
            limiter.charge(ANYBODY, 10**9)
    assert not limiter._requests
    assert not limiter._tokens
    assert not limiter._num_running


@given(
    gaps_s=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=200),
    per_minute=st.integers(1, 50),
)
def test_never_more_than_the_bucket_and_what_flowed_in(gaps_s: list[float], per_minute: int) -> None:
    clock = Clock()
    limiter, mine = Limiter(clock), caller(requests_per_minute=per_minute)
    start_s, num_admitted = clock.now_s, 0
    for gap_s in gaps_s:
        clock.now_s += gap_s
        try:
            with limiter.request(mine):
                num_admitted += 1
        except OverloadedError as refused:
            wait_s = refused.retry_after_s
            assert wait_s is not None
            assert 1 <= wait_s <= 61
    assert num_admitted <= per_minute + (clock.now_s - start_s) * per_minute / 60 + 1e-6
