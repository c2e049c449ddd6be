"""Prompts beside the corpus never leak across splits, and a chooser prefers what is new."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from byline.errors import SettingsInvalid
from services.curation.chooser import Chooser, Labelled
from services.curation.plan import PlannedQuery, normalised, split_of
from services.curation.prompts import (
    PromptGroups,
    interleaved,
    live_seed,
    plan_of_file,
    read_prompts,
    without_leaks,
)


def letters(prompts: Sequence[str]) -> np.ndarray:
    """Unit rows of how often each letter comes: prompts of nearly the same letters are near."""
    rows = np.array([[prompt.lower().count(chr(97 + n)) for n in range(26)] for prompt in prompts], dtype=np.float32)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)


def test_a_prompt_in_other_words_takes_the_group_and_split_of_the_one_it_repeats() -> None:
    groups = PromptGroups(letters, {"a red kite": (7, "test"), "blue boxes": (8, "train")})
    assert groups.of("A red kite!") == (7, "test")
    assert groups.of("kite, a red") == (7, "test")  # same letters
    fresh = groups.of("zzz jumping wolves")
    assert fresh is not None and fresh[1] == split_of(fresh[0])
    assert groups.of("jumping wolves zzz") == fresh  # known from then on
    assert PromptGroups(letters, {}).of("zzz jumping wolves") == fresh  # by its text, whoever asks


def test_a_prompt_that_repeats_prompts_of_two_splits_is_left_out() -> None:
    groups = PromptGroups(letters, {"a red kite": (7, "test"), "kite a red": (8, "train")})
    assert groups.of("red a kite") is None
    assert PromptGroups(letters, {"Kite": (1, "test"), "kite!": (2, "train")}).of("kite") is None


def test_a_file_is_visited_round_after_round_with_seeds_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red kite\n\n# a remark\nblue boxes\na red kite\n")
    prompts = read_prompts(path)
    assert prompts == ["a red kite", "blue boxes"]
    planned = list(itertools.islice(plan_of_file(prompts, PromptGroups(letters, {}), 3), 6))
    assert {one.prompt for one in planned[:2]} == set(prompts) and {one.source for one in planned} == {"file"}
    assert len({(one.prompt, one.seed) for one in planned}) == 6 and min(one.seed for one in planned) > 1e9
    clashing = PromptGroups(letters, {"x": (1, "test"), "x!": (2, "train")})
    assert list(plan_of_file(["x"], clashing, 0)) == []
    with pytest.raises(SettingsInvalid):
        read_prompts(tmp_path / "nothing.txt")


def test_no_source_starves_another() -> None:
    plans = [[PlannedQuery(f"{name}{n}", n, n, "train") for n in range(count)] for name, count in (("a", 3), ("b", 1))]
    assert [one.prompt for one in interleaved(*plans)] == ["a0", "b0", "a1", "a2"]


def test_one_picture_is_one_query_and_its_seed_fits_the_column() -> None:
    assert live_seed("f" * 64) == live_seed("f" * 64) < 2**63
    assert live_seed("0" * 64) != live_seed("1" * 64)
    assert normalised("  A_red   Kite! ") == "a red kite"


POOL = [PlannedQuery(prompt, n, n, "train") for n, prompt in enumerate(["aaa", "aab", "zzz", "zzy"])]


def test_the_chooser_takes_what_is_far_from_the_labelled_and_says_why() -> None:
    chooser = Chooser(letters, lambda: Labelled(("aaaa", "baaa"), {}), lambda: 0, 0)
    taken = chooser(POOL, POOL[:2], 2, 0.0)
    assert taken[0].prompt[0] == "z" or taken[1].prompt[0] == "z"
    assert {one.chosen_for for one in taken} == {"far"}
    assert chooser(POOL, [], 2, 0.0) == taken  # the same database chooses the same
    assert chooser([], [], 2, 0.5) == []


def test_the_uniform_share_is_taken_in_the_order_that_chance_drew() -> None:
    chooser = Chooser(letters, lambda: Labelled(("aaaa", "baaa"), {}), lambda: 0, 0)
    drawn = [PlannedQuery("aaa", 90, 0, "train"), PlannedQuery("aab", 91, 1, "train")]  # near what is labelled
    assert [(one.seed, one.chosen_for) for one in chooser(POOL, drawn, 2, 1.0)] == [(90, "uniform"), (91, "uniform")]
    both = chooser(POOL, drawn, 2, 0.5)
    assert [one.chosen_for for one in both] == ["uniform", "far"] and both[0].seed == 90
    assert both[1].near_duplicate_group != 0  # not one group twice in a batch


def test_with_nothing_labelled_everything_is_equally_far() -> None:
    chooser = Chooser(letters, lambda: Labelled((), {}), lambda: 0, 0)
    assert len(chooser(POOL, POOL[:1], 4, 0.25)) == 4


def test_queries_like_those_that_student_and_teacher_dispute_are_preferred() -> None:
    labelled = Labelled(("aabb", "zzyy"), {"aabb": 0.05, "zzyy": 0.95})
    votes = 0
    for number in range(20):
        chooser = Chooser(letters, lambda: labelled, lambda number=number: number, 0)  # type: ignore[misc]
        disputed = [one for one in chooser(POOL, [], 2, 0.0) if one.chosen_for == "disagreement"]
        votes += sum(1 if one.prompt[0] == "z" else -1 for one in disputed)
    assert votes > 5


def test_a_caption_that_nearly_repeats_a_stored_query_of_another_split_is_left_out() -> None:
    plan = [PlannedQuery(prompt, n, n, "train") for n, prompt in enumerate(["kite red a", "a blue box", "kites"] * 40)]
    stored = {"a red kite": {"test"}, "box blue a": {"train"}, "zzz": {"test"}}
    found = list(without_leaks(plan, letters, stored))
    assert {one.prompt for one in found} == {"a blue box", "kites"} and len(found) == 80
    assert list(without_leaks(plan, letters, {"a red kite": {"train"}})) == plan
    assert list(without_leaks(plan, letters, {})) == plan
    assert list(without_leaks(plan[:1], letters, {"a red kite": {"train", "test"}})) == []
