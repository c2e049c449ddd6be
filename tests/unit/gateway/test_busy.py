"""A gateway that cannot keep up says so at once instead of letting callers wait in vain."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from byline.errors import ServerBusy
from services.gateway.context import MOST_WAITING, refuse_if_busy


def test_new_work_is_refused_while_too_many_calls_wait_and_taken_again_after() -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        context: Any = SimpleNamespace(pool=pool)
        running = threading.Event()
        pool.submit(lambda: (running.set(), gate.wait(60)))
        assert running.wait(60)
        waiting = [pool.submit(int) for _ in range(MOST_WAITING - 1)]
        refuse_if_busy(context)
        waiting.append(pool.submit(int))
        with pytest.raises(ServerBusy) as refused:
            refuse_if_busy(context)
        assert refused.value.retry_after_s
        gate.set()
        assert [one.result(60) for one in waiting] == [0] * MOST_WAITING
        refuse_if_busy(context)
