"""The clock that training is measured with."""

from __future__ import annotations

import pytest

from byline.evaluation.stopwatch import Spent, Stopwatch


def test_pauses_do_not_count_even_when_what_is_inside_fails():
    now = [0.0]
    watch = Stopwatch(cpu=lambda: now[0], wall=lambda: 2 * now[0])
    now[0] = 3.0
    assert watch.read() == Spent(3.0, 6.0)
    with watch.paused():
        now[0] = 10.0
    with pytest.raises(ValueError, match="inside"), watch.paused():
        now[0] = 20.0
        raise ValueError("inside")
    now[0] = 21.0
    assert watch.read() == Spent(4.0, 8.0)
