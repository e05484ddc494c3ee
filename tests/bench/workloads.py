"""The workloads: how many streams, how long, and which request wants which adapters. Everything is seeded."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["RANKS", "WORKLOADS", "Request", "Workload"]

# Ranks of the adapters a0, a1, ...
RANKS = (8, 16, 32, 64)
NUM_SHORT_LENGTHS, MAX_MIXED_PROMPT = 16, 1_024


@dataclass(frozen=True)
class Request:
    """One request of a workload; adapters by name with their weights, none for the base model."""

    num_prompt: int
    num_new: int
    adapters: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`num_requests` requests over `num_streams` streams, each stream sending its next one when the last has ended.

    Attributes:
        num_adapters: adapters that take part; 0 for the base model only.
        kind: prefix of the adapters' names: "a" for LoRA of ranks 8 to 64 in turn, "r" for rank 8, "d" for DoRA.
        choice: "turn", "zipf" or "mix" (two adapters each, weight 0.5).
        max_slots: adapters that the server may have in use at once, where it has such a limit.
        is_open: requests arrive as they like, at 70% of what the closed form sustains.
    """

    what: str
    num_streams: int = 16
    num_requests: int = 16
    num_prompt: int = 128
    num_new: int = 128
    num_adapters: int = 8
    kind: str = "a"
    choice: str = "turn"
    max_slots: int = 16
    is_open: bool = False

    def requests(self) -> list[Request]:
        """The same ones every time."""
        rng = random.Random(self.what)
        out = []
        for i in range(self.num_requests):
            num_prompt = self.num_prompt or round(2 ** rng.uniform(4, 10))  # 16 to 1,024, log-uniform
            out.append(Request(num_prompt, self.num_new, self._adapters(i, rng)))
        return out

    def names(self) -> list[str]:
        return [f"{self.kind}{i}" for i in range(self.num_adapters)]

    def _adapters(self, i: int, rng: random.Random) -> dict[str, float]:
        names: Sequence[str] = self.names()
        if not names:
            return {}
        if self.choice == "zipf":
            return {rng.choices(names, [1 / (1 + k) for k in range(len(names))])[0]: 1.0}
        if self.choice == "mix":
            return {names[i % len(names)]: 0.5, names[(i + 3) % len(names)]: 0.5}
        return {names[i % len(names)]: 1.0}


WORKLOADS = {
    "W1": Workload(what="one stream, base", num_streams=1, num_requests=3, num_adapters=0),
    "W2": Workload(what="16 at once, base", num_adapters=0),
    "W3": Workload(what="16 at once on 8 adapters, ranks 8 to 64"),
    "W3r8": Workload(what="W3 with rank 8 everywhere", kind="r"),
    # So many that its end, when few streams are left, weighs little: of 48 requests it is an eighth of the time.
    "W4": Workload(
        what="16 at once, Zipf over 16 adapters, 8 slots", num_requests=128, num_adapters=16, choice="zipf", max_slots=8
    ),
    "W5": Workload(
        what="8 at once, 1,024 + 32 tokens, 8 adapters", num_streams=8, num_requests=8, num_prompt=1024, num_new=32
    ),
    "W5B": Workload(what="W5, base", num_streams=8, num_requests=8, num_prompt=1024, num_new=32, num_adapters=0),
    "W6": Workload(what="W3 with DoRA", kind="d"),
    "W7": Workload(what="W3, each request a mix of two adapters", choice="mix"),
    "W8": Workload(
        what="up to 32 at once, 16 to 1,024 + 64 tokens, Zipf over 16 adapters, Poisson arrivals at 70% of capacity",
        num_streams=32,
        num_requests=64,
        num_prompt=0,
        num_new=64,
        num_adapters=16,
        choice="zipf",
        is_open=True,
    ),
    "W9": Workload(
        what="8 at once, 512 of 576 prompt tokens shared + 32, base",
        num_streams=8,
        num_requests=16,
        num_prompt=576,
        num_new=32,
        num_adapters=0,
    ),
}
