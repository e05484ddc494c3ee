"""How far prompts are cut beside running streams, on machines of known speed."""

import random

import pytest

from server.engine.pacing import MIN_PROMPT_TOKENS, MIN_SHARE, Pace

TARGET_S = 0.3
BUDGET = 496


def simulate(streams_s: float, token_s: float, noise: float) -> list[tuple[int, float]]:
    """Prompts of 2,048 tokens in all, the first 512 with nobody streaming: the later steps' tokens and seconds."""
    pace = Pace(TARGET_S)
    pace.note(0, 512, streams_s + 512 * token_s)
    left, steps = 2048 - 512, []
    while left:
        count = min(left, pace.max_prompt_tokens(4, BUDGET))
        seconds = (streams_s + count * token_s) * random.uniform(1 - noise, 1 + noise)
        pace.note(4, count, seconds)
        left -= count
        steps.append((count, seconds))
    return steps


@pytest.mark.parametrize("streams_s", [0.02, 0.04, 0.11])
@pytest.mark.parametrize("token_s", [0.0004, 0.0008, 0.0016])
def test_steps_take_what_they_are_meant_to(streams_s: float, token_s: float) -> None:
    for noise, most, least in ((0.0, 1.05, 0.9), (0.1, 2.2, 0.3)):  # a line through few noisy points leans far
        steps = simulate(streams_s, token_s, noise)
        for count, seconds in steps[1:]:
            assert seconds < most * TARGET_S
            assert count == BUDGET or count > least * (TARGET_S - streams_s) / token_s or (count, seconds) == steps[-1]


def test_a_machine_that_cannot_reach_the_target_still_moves_prompts_forward() -> None:
    """Streams alone take longer than a step should; prompts get their share all the same."""
    steps = simulate(streams_s=0.4, token_s=0.0016, noise=0.05)
    for count, _ in steps[1:-1]:
        assert count >= min(BUDGET, 0.5 * MIN_SHARE * 0.4 / 0.0016)


def test_long_decoding_does_not_make_it_forget_what_prompts_cost() -> None:
    pace = Pace(TARGET_S)
    pace.note(0, 512, 0.45)
    pace.note(4, 300, 0.28)
    for _ in range(1_000):
        pace.note(16, 0, random.uniform(0.035, 0.045))
    assert 200 < pace.max_prompt_tokens(16, BUDGET) <= BUDGET


def test_without_an_aim_or_streams_prompts_take_the_budget() -> None:
    for pace, num_streams in ((Pace(None), 4), (Pace(TARGET_S), 0), (Pace(TARGET_S), 4)):
        assert pace.max_prompt_tokens(num_streams, BUDGET) == BUDGET
    pace = Pace(0.001)
    pace.note(0, 512, 0.4)
    pace.note(4, 64, 0.001)
    assert pace.max_prompt_tokens(4, BUDGET) >= MIN_PROMPT_TOKENS
