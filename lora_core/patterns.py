"""Regular expressions from adapter files, matched in bounded time and memory.

PEFT matches the regular expressions of a config against every module name, with `re`. An adapter is a stranger's data,
some expressions take exponential time, and a config may hold thousands; so each one gets a fixed allowance for its
whole life, and all keys of a config together get another. `re` cannot be stopped, so they run on the package `regex`.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import regex

from lora_core.errors import ConfigError

__all__ = ["Allowance", "BoundedPattern", "pattern_fields"]

MAX_PATTERN_CHARS = 4_000
MAX_WRITTEN_OUT = 100_000
MAX_MATCHING_S = 0.5
MAX_CONFIG_S = 2.0

COUNT = re.compile(r"\{\d*,?\d*\}")
# `(?` with anything but what `re` has after it: the library also knows recursion, which fills memory without end.
FOREIGN_GROUP = re.compile(r"\(\?(?!:|=|!|<[=!]|>|#|P[<=]|\(|[aiLmsux]+(?:-[imsx]+)?[:)]|-[imsx]+:)")


class Allowance:
    """Seconds of compiling and matching that some expressions may spend together."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds


class BoundedPattern:
    """A regular expression that may spend `MAX_MATCHING_S` seconds of matching in all.

    Args:
        shared: a further allowance, of several expressions together.

    Raises:
        ConfigError: when it is malformed, too large, or out of time.
    """

    def __init__(self, pattern: str, shared: Allowance | None = None) -> None:
        _check_form(pattern)
        self._pattern = pattern
        self._allowances = (Allowance(MAX_MATCHING_S), shared or Allowance(MAX_MATCHING_S))
        start = time.thread_time()
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ConfigError(f"{pattern[:80]!r} is not a regular expression: {error}") from None
        self._spend(time.thread_time() - start)

    @classmethod
    def of_suffix(cls, key: str, shared: Allowance | None = None) -> "BoundedPattern":
        """A key of `rank_pattern` or `alpha_pattern`: must match up to the end of a name, from its start or a dot."""
        return cls(rf"(?:.*\.)?(?:{key})", shared)

    def fullmatch(self, text: str) -> bool:
        start = time.thread_time()
        try:
            found = self._compiled.fullmatch(text, timeout=self._left_s()) is not None
        except TimeoutError:
            self._spend(math.inf)  # raises
        self._spend(time.thread_time() - start)
        return found

    def _left_s(self) -> float:
        return max(min(allowance.left_s for allowance in self._allowances), 1e-6)

    def _spend(self, seconds: float) -> None:
        for allowance in self._allowances:
            allowance.left_s -= seconds
        if min(allowance.left_s for allowance in self._allowances) < 0:
            raise ConfigError(f"the regular expression {self._pattern[:80]!r} takes too long")


def pattern_fields(
    modules: Mapping[str, tuple[int, float]], default: tuple[int, float] | None = None
) -> dict[str, Any]:
    """The fields of a LoraConfig that give every module its (r, lora_alpha): those two and the two patterns.

    Args:
        default: the config's own r and lora_alpha; those of most modules if None.
    """
    r, alpha = default or Counter(modules.values()).most_common(1)[0][0]
    keys = {name: _exact_key(name, modules) for name in modules}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: own for name, (own, _) in modules.items() if own != r},
        "alpha_pattern": {keys[name]: own for name, (_, own) in modules.items() if own != alpha},
    }


def _exact_key(name: str, names: Mapping[str, Any]) -> str:
    """A key that matches this name and no other of them; the bare name, as PEFT writes it, wherever that will do."""
    key = name if re.fullmatch(r"[\w.-]*", name) else re.escape(name)
    return f"^{key}" if any(other.endswith(f".{name}") for other in names) else key


def _check_form(pattern: str) -> None:
    """Refuse what would take much memory, and what has no meaning in `re` or another one."""
    shown = f"the regular expression {pattern[:80]!r}"
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ConfigError(f"a regular expression in the config is longer than {MAX_PATTERN_CHARS} characters")
    if any(char.isspace() for char in pattern):  # no module's name has one, and `(?x)` could hide a count with them
        raise ConfigError(f"{shown} holds white space")
    if "{" in COUNT.sub("", pattern) or FOREIGN_GROUP.search(pattern):
        raise ConfigError(f"{shown} has a form that Python's `re` does not know")
    counts = re.findall(r"\d+", "".join(COUNT.findall(pattern)))
    # The library writes counted repeats out when it compiles: `(.{1000}){1000}` is a million nodes.
    if len(pattern) * math.prod(int(count) or 1 for count in counts) > MAX_WRITTEN_OUT:
        raise ConfigError(f"{shown} repeats too often")
