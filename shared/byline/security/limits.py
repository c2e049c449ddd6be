"""Token buckets: how many calls a key or a project may make.

Why it exists: one client in a loop must not take the service from the others. The buckets live in each gateway's
memory, so with n gateways a client gets up to n times its rate; what a project may have *waiting* is counted in the
database instead (admission control).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

#: A bucket holds what its rate gives in so many seconds, so that a burst after a pause is let through.
BURST_S = 5.0
_REMEMBERED = 10_000


@dataclass(slots=True)
class TokenBucket:
    """``rate`` tokens a second, at most ``burst`` of them. ``now`` are monotonic seconds."""

    rate: float
    burst: float
    tokens: float
    at: float

    def wait_s(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` tokens are there; 0 if they are. A cost above the burst needs a full bucket only."""
        self.tokens = min(self.burst, self.tokens + max(0.0, now - self.at) * self.rate)
        self.at = now
        missing = min(cost, self.burst) - self.tokens
        return max(0.0, missing / self.rate)

    def take(self, cost: float) -> None:
        """Take tokens; a cost above the burst leaves a debt that is waited for."""
        self.tokens -= cost


class RateLimits:
    """The buckets of many names; those not used for longest are forgotten, which forgives them at most a burst."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def admit(self, wanted: dict[str, float], cost: float, now: float) -> tuple[str, float] | None:
        """Take ``cost`` from the bucket of every name in ``wanted`` (with its rate; 0 is unlimited), or from none.

        None if all had enough, else the name that has not and the seconds until it will.
        """
        buckets = {name: self._bucket(name, rate, now) for name, rate in wanted.items() if rate > 0}
        for name, bucket in buckets.items():
            wait_s = bucket.wait_s(cost, now)
            if wait_s > 0:
                return name, wait_s
        for bucket in buckets.values():
            bucket.take(cost)
        return None

    def _bucket(self, name: str, rate: float, now: float) -> TokenBucket:
        burst = max(1.0, rate * BURST_S)
        bucket = self._buckets.get(name)
        if bucket is None or bucket.rate != rate:
            bucket = self._buckets[name] = TokenBucket(rate, burst, burst, now)
            if len(self._buckets) > _REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket
