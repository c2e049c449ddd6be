"""The benchmark of trainers: a tiny run from labels to figures, and the arithmetic on numbers made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from byline.errors import LabelsNotUsable
from byline.evaluation.bench_head import (
    BenchSets,
    Trained,
    chosen_pairs,
    our_trainer,
    published_trainer,
    run_trainers,
)
from byline.evaluation.bench_head_report import against, draw, figures, first_reach, value_at
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.head_report import report_head
from byline.evaluation.published_head import PublishedSettings
from byline.evaluation.stopwatch import Spent
from byline.evaluation.study_student import StudentSettings
from byline.ranker.labelled_set import LabelledSet


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sets() -> BenchSets:
    rng = np.random.default_rng(0)
    item = rng.normal(size=(120, 12)).astype(np.float32)
    query = rng.normal(size=(72, 12)).astype(np.float32)
    tau = (query[:, :4] @ item[:, :4].T).astype(np.float32)
    noisy = [tau + 0.3 * rng.normal(size=tau.shape).astype(np.float32) for _ in range(2)]
    ids = np.arange(120)
    return BenchSets(LabelledSet(query[:40], ids, item, noisy[0][:40]), LabelledSet(query[40:52], ids, item,
                     noisy[1][40:52]), LabelledSet(query[52:], ids, item, noisy[1][52:]))


def test_a_tiny_benchmark_gives_every_figure_and_does_not_train_again(sets: BenchSets, tmp_path: Path):
    student = StudentSettings(max_steps=40, evaluate_at=10, hidden=(16,), out_dim=16)
    trainers = {
        "ours": our_trainer([("image", 12)], student),
        "published": published_trainer(PublishedSettings(width=16, batch=512, passes=2, look_every=2), 10),
    }
    rows, precisions = run_trainers(trainers, sets, (0, 1), (5, 10), RowFile(tmp_path))
    assert [(row["trainer"], row["seed"]) for row in rows] == [("ours", 0), ("ours", 1), ("published", 0),
                                                              ("published", 1)]
    assert rows[0]["pairs"] == 40 * 40 * 120 and rows[2]["pairs"] == 2 * 40 * 120
    for row in rows:
        curve = row["validation_curve"]
        assert curve[0]["pairs"] == 0 and curve[-1]["pairs"] == row["pairs"]
        spent = [point["seconds"] for point in curve]
        assert spent == sorted(spent) and spent[-1] <= row["seconds"]
    reports = {cutoff: report_head(sets.held_out.tau, sets.held_out, sets.train, [("image", 12)], cutoff=cutoff,
                                   other_half=sets.held_out.tau, seed=0) for cutoff in (5, 10)}
    found = figures(rows, precisions, reports, ours=["ours"], published=["published"], main_cutoff=10,
                    seed=0)
    assert found["map"]["ours"] == pytest.approx(np.mean([row["map"]["10"] for row in rows[:2]]))
    assert found["map"]["queries"] == 20 and found["map_ratio"] > 1
    assert found["comparisons"][0]["by_L"]["5"]["gain"]["p_value"] < 0.05
    mine = found["by_L"]["10"]["trainers"]["ours"]
    assert set(mine["gain_over_raw"]) == {"image"} and found["p_value"] == mine["gain_over_raw"]["image"]["p_value"]
    assert found["share_of_ceiling"] == mine["share_of_ceiling"] == pytest.approx(found["map"]["ours"])
    assert draw(found, tmp_path / "head.png") and (tmp_path / "head.png").stat().st_size > 1000

    def never(*_: object) -> Trained:
        raise AssertionError("this run is kept already")

    again, same = run_trainers({"ours": never, "published": never}, sets, (0, 1), (5, 10), RowFile(tmp_path))
    assert again == rows and np.array_equal(same["ours"][10], precisions["ours"][10])
    with pytest.raises(AssertionError, match="kept already"):  # another student: its runs are made anew
        run_trainers({"ours": never}, sets, (0,), (5, 10), RowFile(tmp_path), keys={"ours": "another"})


def test_our_trainer_seen_from_outside_is_the_fit_itself(sets: BenchSets):
    student = StudentSettings(max_steps=20, evaluate_at=10, hidden=(16,), out_dim=16)
    seen: list[tuple[int, int]] = []
    trained = our_trainer([("image", 12)], student)(sets.train, sets.validation, 0,
                                                    lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20) and len(seen) >= 20
    assert trained.scores(sets.held_out).shape == sets.held_out.tau.shape
    assert [look.pairs for look in trained.looks] == [n * 40 * 120 for n in (0, 5, 10, 15, 20, 20)]
    assert isinstance(trained.spent, Spent) and trained.spent.seconds >= trained.looks[-1].spent.seconds


@pytest.mark.parametrize("kind", ["nearest:30", "random:30"])
def test_both_trainers_get_the_same_chosen_pairs(sets: BenchSets, kind: str):
    mean = sets.train.query_features.mean(0)
    chosen = chosen_pairs(sets.train, kind, mean, seed=1)
    assert (chosen.scored().sum(1) == 30).all()
    assert np.array_equal(chosen.tau[chosen.scored()], sets.train.tau[chosen.scored()])
    assert np.array_equal(chosen.scored(), chosen_pairs(sets.train, kind, mean, seed=1).scored())
    assert sets.train.scored().all()  # what was given is as it was


def test_nearest_pairs_hold_more_of_the_teachers_top_than_random_ones(sets: BenchSets):
    best = sets.train.tau.argmax(1)[:, None]
    mean = sets.train.query_features.mean(0)
    kept = {kind: np.take_along_axis(chosen_pairs(sets.train, kind, mean, 0).scored(), best, axis=1).mean()
            for kind in ("nearest:40", "random:40")}
    assert kept["nearest:40"] > kept["random:40"] + 0.2


@pytest.mark.parametrize("kind", ["near:3", "nearest", "random:x", "nearest:1"])
def test_pairs_that_cannot_be_chosen_are_refused(sets: BenchSets, kind: str):
    with pytest.raises(LabelsNotUsable, match="nearest:K"):
        chosen_pairs(sets.train, kind, sets.train.query_features.mean(0), 0)


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"seconds": s, "wall_seconds": s, "pairs": 10 * s, "map": m} for s, m in points]


def test_time_to_equal_quality_is_read_off_the_curves():
    mine = [{"seconds": 4.0, "pairs": 40, "validation_curve": curve((0, 0.1), (1, 0.3), (2, 0.5), (4, 0.6))}]
    other = [{"seconds": 100.0, "pairs": 1000,
              "validation_curve": curve((0, 0.05), (3, 0.1), (50, 0.4), (100, 0.35))}]
    found = against(mine, other)
    assert (found["time_ratio"], found["other_best_validation_map"]) == (25.0, 0.4)
    assert (found["seconds_to_equal"], found["other_seconds_to_best"], found["time_to_equal_ratio"]) == (2, 50, 25)
    assert found["other_at_our_seconds"] == found["other_at_our_pairs"] == 0.1


def test_quality_that_is_never_reached_has_no_time():
    mine = [{"seconds": 4.0, "pairs": 40, "validation_curve": curve((0, 0.1), (4, 0.3))}]
    other = [{"seconds": 9.0, "pairs": 90, "validation_curve": curve((0, 0.0), (9, 0.4))}]
    found = against(mine, other)
    assert found["seconds_to_equal"] is None and found["time_to_equal_ratio"] is None
    assert first_reach(mine[0]["validation_curve"], 0.3) == mine[0]["validation_curve"][1]
    assert value_at(curve((5, 0.7), (6, 0.8)), "seconds", 1.0) == 0.7
