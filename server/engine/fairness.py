"""Whose request starts next: virtual token counters.

Source: Sheng et al., OSDI 2024, "Fairness in Serving Large Language Models".

Two levels: tenants share the engine by their weights; within a tenant its flows, which are its adapters, share equally.
Whoever has got least so far, for its weight, comes first. A counter rises with every token that is computed, an output
token twice as fast as a prompt's. Who comes back after a pause does not find it saved up: the counter is lifted to the
lowest of those that are there.

Counters alone do not bound a wait, as newcomers may always have lower ones. So every `oldest_every`-th start is the
oldest waiting request's, whosever it is: behind n older ones it waits for (n + 1)·oldest_every starts at most.

Plain Python, no clock.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from server.engine.request import GenerationRequest

__all__ = ["Fairness"]

OUTPUT_TOKEN_COST = 2.0
PROMPT_TOKEN_COST = 1.0
MAX_IDLE_ACCOUNTS = 4096


@dataclass(slots=True)
class _Account:
    """What one tenant, or one flow of a tenant, has got; for a tenant, its flows too."""

    counter: float = 0.0
    num_open: int = 0
    flows: "_Accounts | None" = None


@dataclass(slots=True)
class _Accounts:
    """Accounts that share something."""

    by_key: dict[Hashable, _Account] = field(default_factory=dict)
    last_left: float = 0.0  # counter of the account that was the last to have a request

    def arrive(self, key: Hashable) -> _Account:
        account = self.by_key.setdefault(key, _Account())
        if not account.num_open:
            present = [other.counter for other in self.by_key.values() if other.num_open]
            account.counter = max(account.counter, min(present, default=self.last_left))
        account.num_open += 1
        return account

    def leave(self, key: Hashable) -> None:
        account = self.by_key[key]
        account.num_open -= 1
        if account.num_open:
            return
        self.last_left = account.counter
        if len(self.by_key) > MAX_IDLE_ACCOUNTS:  # the debts of idle ones are forgotten, all at once and rarely
            self.by_key = {key: one for key, one in self.by_key.items() if one.num_open}


class Fairness:
    """Orders waiting requests.

    Args:
        weight_of: a tenant's share, above 0; asked whenever it counts, so that it may change.
        oldest_every: every so manieth start is the oldest request's.

    Raises:
        ValueError: `oldest_every` is below 1.
    """

    def __init__(self, weight_of: Callable[[str], float] = lambda _: 1.0, *, oldest_every: int = 8) -> None:
        if oldest_every < 1:
            raise ValueError("oldest_every must be at least 1")
        self._weight_of = weight_of
        self._oldest_every = oldest_every
        self._tenants = _Accounts()
        self._num_started = 0

    def arrive(self, request: GenerationRequest) -> None:
        """A request has come."""
        tenant = self._tenants.arrive(request.tenant)
        if tenant.flows is None:
            tenant.flows = _Accounts()
        tenant.flows.arrive(request.flow)

    def leave(self, request: GenerationRequest) -> None:
        """A request that came is gone, finished or not."""
        flows = self._tenants.by_key[request.tenant].flows
        assert flows is not None
        flows.leave(request.flow)
        self._tenants.leave(request.tenant)

    def start(self) -> None:
        """A waiting request has been started."""
        self._num_started += 1

    def charge(self, request: GenerationRequest, start: int, stop: int) -> None:
        """Tokens [start, stop) of a request are computed; those that were computed before are free."""
        start = max(start, request.num_charged)
        if stop <= start:
            return
        request.num_charged = stop
        num_prompt = max(min(stop, len(request.prompt_ids)) - start, 0)
        cost = PROMPT_TOKEN_COST * num_prompt + OUTPUT_TOKEN_COST * (stop - start - num_prompt)
        tenant = self._tenants.by_key[request.tenant]
        tenant.counter += cost / self._weight_of(request.tenant)
        assert tenant.flows is not None
        tenant.flows.by_key[request.flow].counter += cost

    def order(self, waiting: Iterable[GenerationRequest]) -> Iterator[GenerationRequest]:
        """The waiting requests, who is next first. What is charged while this runs counts for those that follow.

        Args:
            waiting: in order of arrival.
        """
        queues: dict[str, dict[Hashable, list[GenerationRequest]]] = {}
        requests = list(waiting)
        first = requests[:1] if self._num_started % self._oldest_every == self._oldest_every - 1 else []
        yield from first
        for request in reversed(requests[len(first) :]):  # so that the oldest is at the end, where it is cheap to take
            queues.setdefault(request.tenant, {}).setdefault(request.flow, []).append(request)
        while queues:
            tenant = min(queues, key=lambda one: (self._tenants.by_key[one].counter, _oldest(queues[one])))
            flows, accounts = queues[tenant], self._tenants.by_key[tenant].flows
            assert accounts is not None
            flow = min(flows, key=lambda one: (accounts.by_key[one].counter, flows[one][-1].arrival))
            yield flows[flow].pop()
            if not flows[flow]:
                del flows[flow]
            if not flows:
                del queues[tenant]


def _oldest(flows: Mapping[Hashable, list[GenerationRequest]]) -> int:
    return min(queue[-1].arrival for queue in flows.values())
