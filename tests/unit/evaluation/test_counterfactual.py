"""Grouping, arms and contrasts of the leave-k-out evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.evaluation.counterfactual import (
    SHARES,
    distant_groups,
    paired_difference,
    plan_arm,
    plan_arms,
    relative_change,
    summarise_contrast,
    target_contrast,
    top_items,
)


def test_groups_cover_every_query_once_and_keep_like_queries_apart() -> None:
    kind = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    likeness = (kind[:, None] == kind[None]).astype(float)
    groups = distant_groups(likeness, 3)
    assert sorted(q for g in groups for q in g) == list(range(9))
    assert [sorted(kind[list(g)]) for g in groups] == [[0, 1, 2]] * 3


def test_an_arm_removes_the_union_of_what_its_targets_name() -> None:
    tau = np.array([[3.0, 2, 1, 0], [3.0, 0, 1, 2], [0.0, 1, 2, 3]])
    ids = np.array([40, 30, 20, 10])
    assert top_items(tau[0], ids, 2) == (40, 30)
    assert plan_arm("m", tau, ids, 2, 0, (0, 1)).removed == (10, 30, 40)


def test_what_moves_all_queries_alike_is_no_contrast() -> None:
    assert target_contrast(np.full(6, 7.0), (1, 4)) == {1: 0.0, 4: 0.0}
    change = np.array([1.0, 5.0, 1.0, 1.0])
    assert target_contrast(change, (1,)) == {1: 4.0}


def test_other_targets_of_the_arm_are_no_part_of_the_contrast() -> None:
    assert target_contrast(np.array([9.0, 5.0, 1.0, 1.0]), (0, 1)) == {0: 8.0, 1: 4.0}
    with pytest.raises(LabelsNotUsable, match="queries_per_arm"):
        target_contrast(np.zeros(2), (0, 1))


def test_a_rise_is_counted_from_the_runs_with_nothing_removed() -> None:
    nothing = np.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(relative_change(np.array([2.2, 1.0]), nothing), [10.0, -50.0])
    with pytest.raises(LabelsNotUsable, match="nothing removed"):
        relative_change(np.zeros(2), np.zeros((0, 2)))


def test_errors_are_those_of_a_mean_and_differences_are_paired() -> None:
    a, b = {0: 1.0, 1: 3.0, 2: 9.0}, {1: 2.0, 2: 8.0, 3: 100.0}
    assert summarise_contrast({0: 1.0, 1: 3.0}).error == pytest.approx(1.0)
    difference = paired_difference(a, b)
    assert difference is not None
    assert (difference.mean, difference.error, set(difference.per_target)) == (1.0, 0.0, {1, 2})
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_an_early_stop_leaves_methods_that_can_be_compared() -> None:
    rng = np.random.default_rng(1)
    methods = {name: rng.standard_normal((30, 200)) for name in "abc"}
    arms = plan_arms(methods, np.arange(200), np.eye(30))
    assert [a.method for a in arms] == list("abc") * (len(arms) // 3)
    for start in range(0, len(arms), 3):
        assert len({(a.k, a.group, a.targets) for a in arms[start : start + 3]}) == 1
    assert [a.k for a in arms if a.method == "a"][:4] == [2, 8, 8, 1]
    for share in SHARES:
        asked = [q for a in arms if a.method == "a" and a.k == share.count(200) for q in a.targets]
        assert sorted(asked) == list(range(30))


def test_few_queries_leave_some_for_the_contrast() -> None:
    arms = plan_arms({"a": np.eye(4, 20)}, np.arange(20), np.eye(4))
    assert max(len(a.targets) for a in arms) == 2
    with pytest.raises(LabelsNotUsable, match="at least two"):
        plan_arms({"a": np.eye(1, 20)}, np.arange(20), np.eye(1))
