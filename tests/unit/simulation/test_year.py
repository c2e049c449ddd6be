"""The simulated year on made-up labels with the services' own rules: same worlds, explained releases, clean splits."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.catalog.items import Item
from byline.drift.windows import DriftRule
from byline.errors import ReleaseCorrupt
from byline.evaluation.study_data import StudyData
from byline.releases.manifest import ReleaseManifest
from byline.simulation.figures import draw, markdown
from byline.simulation.heads import HeadMaker, Label
from byline.simulation.life import Year
from byline.simulation.settings import ACTIVE, RANDOM, SIZES, Subject
from byline.simulation.shelf import Shelf
from byline.simulation.summary import labels_to_reach, labels_to_target, summarise, timeline
from byline.simulation.world import GATE, LIVE, POOL, VALIDATION, Corpus, World
from byline.teachers.ranking import TeacherItem, TeacherQuery
from studies.refresh import pieces

SETTINGS = replace(
    SIZES["tiny"], subjects=(Subject(("minilm",), (ACTIVE, RANDOM), 1),), shadows=20, new_artists=0.2,
    withdrawn_artists=0.1, drift=DriftRule(timedelta(weeks=2), 3, 0.02, 8),
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Two topics far apart; the teacher's order is the text's, noisily, so that a head can learn and can be wrong."""
    rng = np.random.default_rng(0)
    n, q, d = 90, 80, 12
    topic = np.arange(q) % 2
    centres = 4 * rng.normal(size=(2, d))
    items = rng.normal(size=(n, d)) + centres[rng.integers(0, 2, n)]
    queries = rng.normal(size=(q, d)) * np.where(topic, 1.0, 0.5)[:, None] + centres[topic]
    taste = np.stack([rng.normal(size=(d, d)) + 2 * np.eye(d), np.eye(d)])
    truth = np.stack([query @ taste[t] @ items.T for query, t in zip(queries, topic, strict=True)])
    tau = np.stack([truth + rng.normal(size=truth.shape) for _ in range(2)])
    gradient = [table @ rng.normal(size=(d, 4)) for table in (items, queries)]
    picture = Image.new("RGB", (2, 2))
    data = StudyData(
        [TeacherItem(100 + i, picture, f"item {i}") for i in range(n)],
        [TeacherQuery(picture, f"prompt {i}") for i in range(q)], ("train",) * q, (("minilm", d), ("gradient", 4)),
        np.concatenate([items, gradient[0]], 1).astype(np.float32),
        np.concatenate([queries, gradient[1]], 1).astype(np.float32), tau.astype(np.float32), "made-up/1", "d" * 16,
        True,
    )  # fmt: skip
    catalogue = [Item(100 + i, f"item {i}", creator=f"artist {i % 30}") for i in range(n)]
    return Corpus(data, catalogue, np.arange(q, dtype=np.int64) // 2 * 2 + topic % 2)


def year(corpus: Corpus, arm: str, root: Path, seed: int = 0) -> Year:
    """An arm's year, not lived yet."""
    world, rules = World(corpus, SETTINGS, seed), pieces()
    return Year(world, HeadMaker(world, ("minilm",), rules.make_head), rules, arm, root)


@pytest.fixture(scope="module")
def lived(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    torch.set_num_threads(1)
    roots = {arm: tmp_path_factory.mktemp(arm) for arm in (ACTIVE, RANDOM)}
    return {arm: year(corpus, arm, root).run() | {"root": root} for arm, root in roots.items()}


def test_roles_share_no_query_and_no_near_duplicates(corpus: Corpus) -> None:
    world = World(corpus, SETTINGS, 3)
    groups = [set(corpus.groups[np.concatenate([world.rows(role, 0), world.rows(role, 1)])].tolist())
              for role in (POOL, VALIDATION, GATE, LIVE)]  # fmt: skip
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(set(corpus.groups.tolist()))


def test_prompts_of_the_second_topic_wait_only_after_the_shift_but_for_the_few_that_traffic_brings(corpus: Corpus):
    world = World(corpus, SETTINGS, 0)
    second = len(world.rows(POOL, 1))
    before, after = (world.topics[world.waiting(week, POOL)].sum() for week in (0, SETTINGS.shift_week))
    assert before == round(0.1 * second) and after == second
    shadows = np.concatenate([world.topics[world.shadows(week)] for week in range(SETTINGS.shift_week)])
    assert shadows.mean() < 0.3
    assert set(world.shadows(1).tolist()) <= {*world.rows(LIVE, 0).tolist(), *world.rows(LIVE, 1).tolist()}


def test_arms_differ_in_the_training_queries_they_choose_and_in_nothing_given(lived: dict[str, dict]) -> None:
    active, random = lived[ACTIVE]["weeks"], lived[RANDOM]["weeks"]
    assert [row["labels"] for row in active] == [row["labels"] for row in random]
    assert active[0]["map"] == random[0]["map"] and active[-1]["map"] != random[-1]["map"]
    assert lived[ACTIVE]["world"] == lived[RANDOM]["world"]
    assert set(lived[RANDOM]["reasons"]) == {"start", "random"}
    assert {"far", "disagreement"} & set(lived[ACTIVE]["reasons"])


def test_a_year_is_repeated_by_its_seed(corpus: Corpus, lived: dict[str, dict], tmp_path: Path) -> None:
    again, first = year(corpus, ACTIVE, tmp_path).run(), lived[ACTIVE]
    # Not the digests of files: the last bit of a sum may depend on where its memory lies.
    for mine, theirs in zip(again["weeks"], first["weeks"], strict=True):
        assert mine["map"] == pytest.approx(theirs["map"], abs=1e-3) and mine["alarm"] == theirs["alarm"]
    assert again["reasons"] == first["reasons"]
    said = [[(r["week"], r["accepted"], r["labels_digest"]) for r in each["releases"]] for each in (again, first)]
    assert said[0] == said[1]


def test_every_release_is_explained_by_its_files(lived: dict[str, dict]) -> None:
    for found in lived.values():
        accepted = None
        assert found["releases"]
        for row in found["releases"]:
            assert row["unexplained"] == []
            manifest = ReleaseManifest.read(found["root"] / row["release_id"])
            assert manifest.parent == accepted and manifest.digest == row["manifest_digest"]
            assert manifest.metrics["triggers"] and manifest.metrics["gate"]["passed"] is row["accepted"]
            accepted = row["release_id"] if row["accepted"] else accepted
        assert found["weeks"][-1]["release"] == accepted
        assert any("corpus" in text for row in found["releases"] for text in row["metrics"]["triggers"])


def test_a_release_that_says_too_little_or_something_else_is_found(corpus: Corpus, tmp_path: Path) -> None:
    world, rules = World(corpus, SETTINGS, 0), pieces()
    maker = HeadMaker(world, ("minilm",), rules.make_head)
    train, validation = ([Label(int(row), 0) for row in world.rows(role, 0)[:4]] for role in (POOL, VALIDATION))
    head = maker.fit(train, validation, 0, 0, None, True).report.head
    shelf = Shelf(tmp_path, world, maker)
    silent = shelf.build(head, train, validation, 0, None, {"gate": {"passed": False, "reasons": []}})
    wrong = shelf.unexplained(silent.release_id, "another", train[1:], validation, 1)
    assert {"triggers", "why it was refused", "parent", "labels", "corpus"} <= set(wrong)
    file = tmp_path / silent.release_id / "calibrator.json"
    file.chmod(0o644)
    file.write_text("{ }\n")
    with pytest.raises(ReleaseCorrupt):
        shelf.unexplained(silent.release_id, None, train, validation, 0)


def test_labels_know_nothing_of_artists_who_came_later_and_releases_nothing_of_those_who_left(
    corpus: Corpus, lived: dict[str, dict],
) -> None:  # fmt: skip
    world = World(corpus, SETTINGS, 0)
    maker = HeadMaker(world, ("minilm",), pieces().make_head)
    row = int(world.rows(POOL, 0)[0])
    early, late = (maker.labelled([Label(row, week)], 0, 7) for week in (0, 7))
    assert np.isnan(early.tau[0, world.joining[world.present(7)]]).all() and not np.isnan(late.tau).any()
    gone = {item.item_id for item, left in zip(corpus.catalogue, world.leaving, strict=True) if left}
    assert gone and not gone & set(late.item_ids.tolist())
    last = lived[ACTIVE]["releases"][-1]
    assert last["week"] >= SETTINGS.withdraw_week and last["items"] == len(corpus.catalogue) - len(gone)


def test_a_fall_of_overlap_raises_one_alarm_and_brings_a_refresh(lived: dict[str, dict]) -> None:
    weeks = lived[RANDOM]["weeks"]
    raised = [row["week"] for row in weeks if row["alarm"]]
    assert len(raised) == 1 and raised[0] >= SETTINGS.shift_week
    [release] = [r for r in lived[RANDOM]["releases"] if r["week"] == raised[0]]
    assert any(text.startswith("drift:") for text in release["metrics"]["triggers"])


def test_tables_and_figure_say_which_arm_needs_fewer_labels(lived: dict[str, dict], tmp_path: Path) -> None:
    years = {arm: [{k: v for k, v in found.items() if k != "root"}] for arm, found in lived.items()}
    found = {"cutoff": 8, "subjects": {"minilm": {"years": years, "summary": summarise(years, SETTINGS)}}}
    assert "| active (the planner) |" in markdown(json.loads(json.dumps(found)))
    if draw(found, SETTINGS, tmp_path / "a.png"):
        assert (tmp_path / "a.png").stat().st_size > 10_000


def test_labels_to_reach_a_level_counts_the_first_week_from_which_it_holds() -> None:
    rows = {"weeks": [{"labels": 10 + week} for week in range(8)]}
    quality = np.asarray([0.1, 0.9, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5])
    assert labels_to_reach(rows, quality, 0.5, 0, 8) == 14
    assert labels_to_reach(rows, quality, 0.6, 2, 8) is None


def test_the_result_file_has_the_weeks_of_every_arm_and_the_labels_to_reach_randoms_level(lived: dict[str, dict]):
    years = {arm: [{k: v for k, v in found.items() if k != "root"}] for arm, found in lived.items()}
    subjects = {"minilm": {"years": years, "summary": summarise(years, SETTINGS)}}
    rows = timeline(subjects)
    assert [(row["arm"], row["week"]) for row in rows] == [(arm, week) for arm in (ACTIVE, RANDOM)
                                                           for week in range(SETTINGS.weeks)]  # fmt: skip
    assert rows[0]["map"] == years[ACTIVE][0]["weeks"][0]["map"]
    target = labels_to_target(subjects)
    curve = subjects["minilm"]["summary"]["against_random"][ACTIVE]["levels"]["end"]["on_mean_curve"]
    assert (target["active"], target["random"], target["head"]) == (curve["own"], curve["random"], "minilm")
    assert target["random"] is not None
    json.dumps([rows, target])
