"""From stored rankings to matrices."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.rankings.labelled import (
    JUDGE,
    LEARN,
    LabelSplits,
    halves_are_disjoint,
    judging_queries,
    labelled_set,
    teacher_family,
)
from byline.rankings.store import LabelledQuery


def _ranking(ids, tau, halves=None, number=0) -> LabelledQuery:
    tau = np.asarray(tau, dtype=np.float32)
    return LabelledQuery(
        query_id=uuid.UUID(int=number),
        prompt="a cat",
        split="train",
        near_duplicate_group=1,
        image_sha256="0" * 64,
        item_ids=np.asarray(ids, dtype=np.int64),
        tau=tau,
        standard_error=np.zeros_like(tau),
        tau_halves=None if halves is None else np.asarray(halves, dtype=np.float32),
        seed=0,
        candidate_set="corpus",
        draws=8,
    )


def test_a_student_never_learns_from_the_noise_it_is_judged_by():
    ranking = _ranking([5, 7], [2.0, 3.0], halves=[[1.0, 2.0], [3.0, 4.0]])
    ids, features = np.array([7, 5]), np.zeros((2, 3), np.float32)
    learn = labelled_set([ranking], features[:1], ids, features, LEARN)
    assess = labelled_set([ranking], features[:1], ids, features, JUDGE)
    assert learn.tau.tolist() == [[2.0, 1.0]] and assess.tau.tolist() == [[4.0, 3.0]]


@pytest.mark.parametrize(("teacher", "disjoint"), [
    ("abu_plus_linear+output_norm/13fc/kv/item", True), ("abu_plus", True),
    ("sketch+output_norm/13fc/kv/shared", False), ("sketch", False), ("d_trak/13fc/kv", False),
])  # fmt: skip
def test_halves_that_share_the_items_noise_are_not_disjoint(teacher: str, disjoint: bool):
    halves = _ranking([5, 7], [2.0, 3.0], halves=[[1.0, 2.0], [3.0, 4.0]])
    assert halves_are_disjoint([halves], teacher) is disjoint
    assert not halves_are_disjoint([halves, _ranking([5, 7], [2.0, 3.0])], teacher)


def test_the_error_of_a_half_is_that_of_half_as_many_draws():
    ids, features = np.array([7, 5, 9]), np.zeros((3, 3), np.float32)
    halved, whole = _ranking([5, 7], [2.0, 3.0], halves=[[1.0, 2.0], [3.0, 4.0]]), _ranking([5, 7], [2.0, 3.0])
    for ranking, factor in ((halved, 2.0**0.5), (whole, 1.0)):
        known = replace(ranking, standard_error=np.array([0.5, 0.25], np.float32))
        made = labelled_set([known], features[:1], ids, features, LEARN, errors=True)
        assert made.standard_error is not None
        np.testing.assert_allclose(made.standard_error, [[0.25 * factor, 0.5 * factor, np.nan]], rtol=1e-6)
    assert labelled_set([whole], features[:1], ids, features, LEARN).standard_error is None


def test_rankings_without_halves_give_all_of_tau():
    features = np.zeros((2, 3), np.float32)
    made = labelled_set([_ranking([5, 7], [2.0, 3.0])], features[:1], np.array([5, 7]), features, JUDGE)
    assert made.tau.tolist() == [[2.0, 3.0]]


def test_rankings_of_few_items_do_not_judge_when_wide_ones_exist():
    narrow, wide = _ranking(range(10), np.zeros(10)), _ranking(range(40), np.zeros(40))
    assert judging_queries([narrow, wide], 20) == (wide,)
    assert judging_queries([narrow], 20) == (narrow,)
    corpus = _ranking(range(100), np.zeros(100))
    assert judging_queries([wide, corpus], 20) == (corpus,)


def test_the_digest_changes_with_the_labels_only():
    one, other = _ranking([1], [1.0]), _ranking([1], [2.0])
    assert LabelSplits((one,), (), ()).digest == LabelSplits((one,), (), (other,)).digest
    assert LabelSplits((one,), (), ()).digest != LabelSplits((other,), (), ()).digest


def test_teachers_of_one_method_are_a_family_whatever_their_settings():
    assert teacher_family("abu_plus_linear/1a2b/cross") == teacher_family("abu_plus_linear/9") == "abu_plus_linear"
    assert teacher_family("abu_plus_linear+output_norm/1a2b") != "abu_plus_linear", "another objective is another thing"
    assert teacher_family("abu_plus/1a2b") != "abu_plus_linear"


def test_no_rankings_is_an_error_with_words():
    with pytest.raises(LabelsNotUsable):
        labelled_set([], np.zeros((0, 3), np.float32), np.array([1]), np.zeros((1, 3), np.float32), LEARN)
