"""How many prompt tokens a step may take, so that running streams wait no longer than they are meant to.

A step's time is that of its running streams, plus a time per prompt token. Both are followed from step to step; nothing
is known before the first prompts have run.
"""

__all__ = ["Pace"]

# Weight of the newest measurement.
NEWEST = 0.3
# Prompts always advance by so many tokens, if there are as many: smaller pieces cost nearly as much.
MIN_PROMPT_TOKENS = 64
# They always get so much time, in times of what the streams alone take: a step that reads all weights for a few prompt
# tokens keeps everybody waiting for longer in the end.
MIN_SHARE = 1.5


class Pace:
    """Follows what steps cost.

    Args:
        target_step_s: how long a step should take while requests stream; None for no such aim.
    """

    def __init__(self, target_step_s: float | None) -> None:
        self.target_step_s = target_step_s
        self._decode_s = 0.0
        self._prompt_token_s = 0.0

    def note(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that has run."""
        if not num_prompt_tokens:
            self._decode_s = _follow(self._decode_s, seconds)
        elif num_prompt_tokens >= MIN_PROMPT_TOKENS // 2:
            streams_s = min(self._decode_s, seconds) if num_streams else 0.0
            self._prompt_token_s = _follow(self._prompt_token_s, (seconds - streams_s) / num_prompt_tokens)

    def max_prompt_tokens(self, num_streams: int, budget: int) -> int:
        """Prompt tokens for a step with so many streams; at most `budget`, which is what is left for them."""
        if self.target_step_s is None or not num_streams or not self._prompt_token_s:
            return budget
        room_s = max(self.target_step_s - self._decode_s, MIN_SHARE * self._decode_s)
        return min(budget, max(MIN_PROMPT_TOKENS, int(room_s / self._prompt_token_s)))


def _follow(old: float, new: float) -> float:
    return new if not old else old + NEWEST * (new - old)
