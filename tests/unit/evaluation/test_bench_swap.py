"""The rules of the swap bench: what is mixed, what counts as during a swap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byline.evaluation.bench_swap import AFTERMATH_S, Answered, Expected, SwapTime, draw, mixed_reason, summary

SCORES = {"a": {1: 0.9, 2: 0.8, 3: 0.1}, "b": {1: 0.7, 2: 0.2, 3: 0.6}}


def _expected(release: str, mark: str) -> Expected:
    return Expected(lambda items: np.array([SCORES[release][item] for item in items], dtype=np.float32), mark)


EXPECTED = {"a": _expected("a", "[0]"), "b": _expected("b", "[1]")}
WHOLE = [(1, 0.9, "cat [0]"), (2, 0.8, "dog [0]")]


def test_an_answer_of_one_release_is_not_mixed() -> None:
    assert mixed_reason("a", "a", WHOLE, EXPECTED) == ""
    assert mixed_reason("a", "a", [(1, 0.9001, "cat [0]"), (2, 0.8, "dog [0]")], EXPECTED) == ""


@pytest.mark.parametrize(
    ("release", "job", "found", "says"),
    [
        ("a", "b", WHOLE, "its job b"),
        ("c", "c", WHOLE, "never active"),
        ("b", "b", WHOLE, "scores"),
        ("a", "a", [(1, 0.7, "cat [0]"), (2, 0.8, "dog [0]")], "scores"),
        ("a", "a", [(1, 0.9, "cat [1]"), (2, 0.8, "dog [0]")], "caption"),
        ("a", "a", [(1, 0.9, "cat [0]"), (3, 0.8, "dog [0]")], "scores"),
        ("a", "a", [], "empty"),
    ],
)
def test_any_part_of_another_release_is_seen(release, job, found, says) -> None:
    assert says in mixed_reason(release, job, found, EXPECTED)


def _asked(due: float, ms: float, **more: str) -> Answered:
    return Answered(due, due + ms / 1e3, release="a", **more)


def test_quiet_is_what_is_outside_of_all_swaps_and_their_aftermath() -> None:
    swaps = [SwapTime("b", 10.0, 12.0), SwapTime("a", 20.0, 21.0)]
    answers = [_asked(5.0, 10), _asked(11.0, 40), _asked(12.0 + AFTERMATH_S / 2, 40), _asked(15.0, 20),
               _asked(30.0, 10), _asked(31.0, 5, failed="UNAVAILABLE: x"), _asked(32.0, 10, mixed="items")]  # fmt: skip
    found = summary(answers, swaps, rate=50.0)
    assert {name: rows["jobs"] for name, rows in found["phases"].items()} == {
        "before": 1, "during": 2, "between": 1, "after": 3, "quiet": 4,
    }  # fmt: skip
    assert (found["failed"], found["mixed"], found["swaps"]) == (1, 1, 2)
    assert found["p99_ratio"] == pytest.approx(4.0) and found["swap_seconds"] == [2.0, 1.0]
    assert found["why"] == ["UNAVAILABLE: x", "items"]
    assert replace(answers[0], ended=6.0).latency_ms == pytest.approx(1000.0)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    swaps = [SwapTime("b", 10.0, 12.0)]
    if draw([_asked(5.0, 10), _asked(11.0, 40)], swaps, [(5.0, 100.0), (12.0, 200.0)], tmp_path / "swap.png"):
        assert (tmp_path / "swap.png").stat().st_size > 1000
