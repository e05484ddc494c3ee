"""How many prompt tokens a step may take, so that running streams wait no longer than they are meant to.

A step's time is taken to be that of its streams plus a time per prompt token: a straight line through the last steps,
newer ones weighing more. Nothing is known before the first prompts have run.
"""

__all__ = ["Pace"]

# Weight of a step in terms of the one after it.
DECAY = 0.8
# Two steps whose prompts differ by less tell nothing of the time per token.
MIN_SPREAD_TOKENS = 8
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
        self._weight = 0.0
        self._tokens = self._tokens_squared = 0.0  # weighted sums over the last steps
        self._seconds = self._tokens_seconds = 0.0
        self._token_s = 0.0

    def note(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that has run; one without streams tells of prompts only."""
        self._weight = DECAY * self._weight + 1
        self._tokens = DECAY * self._tokens + num_prompt_tokens
        self._tokens_squared = DECAY * self._tokens_squared + num_prompt_tokens**2
        self._seconds = DECAY * self._seconds + seconds
        self._tokens_seconds = DECAY * self._tokens_seconds + num_prompt_tokens * seconds
        spread = self._weight * self._tokens_squared - self._tokens**2
        if spread > (self._weight * MIN_SPREAD_TOKENS) ** 2:
            slope = (self._weight * self._tokens_seconds - self._tokens * self._seconds) / spread
            self._token_s = max(slope, 0.0)
        elif num_prompt_tokens and not num_streams:
            self._token_s = seconds / num_prompt_tokens

    def max_prompt_tokens(self, num_streams: int, budget: int) -> int:
        """Prompt tokens for a step with so many streams; at most `budget`, which is what is left for them."""
        if self.target_step_s is None or not num_streams or not self._token_s:
            return budget
        streams_s = max((self._seconds - self._token_s * self._tokens) / self._weight, 0.0)
        room_s = max(self.target_step_s - streams_s, MIN_SHARE * streams_s)
        return min(budget, max(MIN_PROMPT_TOKENS, int(room_s / self._token_s)))
