"""When the client tries again: the core's course, step by step, without a network."""

from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from loramux_client import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    LoraMuxError,
    RateLimitedError,
    RetryPolicy,
    ServerError,
    UnavailableError,
    UnexpectedAnswerError,
)
from loramux_client._operation import Operation, Send, Sleep, exchange

REQUEST = httpx.Request("POST", "http://server/x")
POLICY = RetryPolicy(max_retries=2, first_wait_s=0.5, max_wait_s=8)


def answer(status: int, code: str = "", retry_after: str = "") -> httpx.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return httpx.Response(status, json={"error": {"message": "no", "code": code}}, headers=headers, request=REQUEST)


def run(outcomes: Iterable[Any], *, changes_nothing: bool, policy: RetryPolicy = POLICY) -> tuple[Any, list[float]]:
    """Plays the outcomes of successive attempts; returns the response or the error, and the waits between."""
    operation = Operation(method="POST", path="/x", read=lambda content: content, changes_nothing=changes_nothing)
    course = exchange(operation, policy)
    left, waits, told = list(outcomes), [], None
    try:
        while True:
            step = course.send(told)
            if isinstance(step, Sleep):
                waits.append(step.seconds)
                told = None
            else:
                assert isinstance(step, Send)
                told = left.pop(0)
    except StopIteration as end:
        result = end.value
    except LoraMuxError as error:
        result = error
    assert not left, "attempts that were not made"
    return result, waits


OK = answer(200)
NOT_SENT = [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("full")]
MAY_HAVE_RUN = [httpx.ReadError("reset"), httpx.WriteError("reset"), httpx.RemoteProtocolError("closed")]


@pytest.mark.parametrize("changes_nothing", [True, False])
@pytest.mark.parametrize("failure", [*NOT_SENT, answer(429), answer(503, "draining")], ids=repr)
def test_what_was_not_run_is_repeated(failure: Any, changes_nothing: bool) -> None:
    result, waits = run([failure, failure, OK], changes_nothing=changes_nothing)
    assert result is OK
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1


@pytest.mark.parametrize("failure", [*MAY_HAVE_RUN, answer(503, "storage_unavailable"), answer(503)], ids=repr)
def test_what_may_have_run_is_repeated_only_if_it_changes_nothing(failure: Any) -> None:
    assert run([failure, OK], changes_nothing=True)[0] is OK
    result, waits = run([failure], changes_nothing=False)
    assert isinstance(result, APIConnectionError | UnavailableError)
    assert not waits


@pytest.mark.parametrize("failure", [httpx.ReadTimeout("slow"), httpx.WriteTimeout("slow")], ids=repr)
def test_a_slow_answer_is_not_asked_for_again(failure: Any) -> None:
    result, _ = run([failure], changes_nothing=True)
    assert isinstance(result, APITimeoutError)
    assert result.__cause__ is failure


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 424, 500, 502, 507])
def test_other_refusals_are_final(status: int) -> None:
    result, _ = run([answer(status, "some_code")], changes_nothing=True)
    assert isinstance(result, APIStatusError)
    assert (result.status, result.code) == (status, "some_code")
    assert isinstance(result, ServerError) == (status in {500, 502})


def test_it_gives_up_after_the_last_retry() -> None:
    result, waits = run([answer(429, "overloaded")] * 3, changes_nothing=True)
    assert isinstance(result, RateLimitedError)
    assert len(waits) == 2
    assert run([answer(429)], changes_nothing=True, policy=RetryPolicy(max_retries=0))[1] == []


def test_retry_after_is_honoured_unless_it_is_too_long_or_no_number() -> None:
    result, waits = run([answer(429, retry_after="7"), OK], changes_nothing=False)
    assert result is OK
    assert 7 <= waits[0] <= 7.5
    result, waits = run([answer(503, "draining", retry_after="3600")], changes_nothing=False)
    assert isinstance(result, UnavailableError)
    assert result.retry_after_s == 3600
    result, waits = run([answer(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), OK], changes_nothing=False)
    assert result is OK
    assert waits[0] <= 0.5


def test_waits_grow_to_a_limit_and_differ_between_clients() -> None:
    policy = RetryPolicy(max_retries=12, first_wait_s=0.5, max_wait_s=2)
    waits = [run([answer(429)] * 12 + [OK], changes_nothing=True, policy=policy)[1] for _ in range(2)]
    assert waits[0] != waits[1]
    assert max(waits[0]) <= 2
    assert min(waits[0][4:]) >= 1


def test_answers_from_something_else_than_the_server() -> None:
    result, _ = run([httpx.Response(307, request=REQUEST)], changes_nothing=True)
    assert isinstance(result, UnexpectedAnswerError)
    page = httpx.Response(502, text="<html>bad gateway", headers={"Content-Type": "text/html"}, request=REQUEST)
    result, _ = run([page], changes_nothing=True)
    assert isinstance(result, ServerError)
    assert (str(result), result.code, result.body) == ("the server answered with status 502", "", {})
