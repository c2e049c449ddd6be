"""Whether a failed stage is worth another attempt, and after how long.

Why it exists: both questions are pure policy, asked by the runner and the store, and tested without either.
"""

from __future__ import annotations

import random

from byline.errors import BylineError

#: Trying again cannot help: the request, the model or the release is at fault, or nobody waits any more.
_PERMANENT = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "CANCELLED"})

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may succeed. Unknown errors may; the attempts are counted."""
    return not (isinstance(error, BylineError) and error.code in _PERMANENT)


def retry_delay_s(attempt: int, rng: random.Random) -> float:
    """Seconds to wait after attempt number ``attempt`` (from 1): doubling from 1 s to 60 s, half of it jitter."""
    ceiling = min(FIRST_DELAY_S * 2.0 ** min(max(attempt - 1, 0), 16), LONGEST_DELAY_S)
    return ceiling * rng.uniform(0.5, 1.0)
