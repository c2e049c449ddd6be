"""Studies and retrainings: subsets by whole groups, one row per run, nothing lost or repeated after a kill."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import LabelsNotUsable
from byline.evaluation.retraining import Retraining, RetrainingStore, half_corpus, nothing_removed, without
from byline.evaluation.retraining_study import SIZES, Study, StudySettings, choose_items

SETTINGS = replace(SIZES["tiny"], channels=(8, 8), items=12, batch=4, steps=3, queries=3, loss_draws=6)


class Killed(Exception):
    """Stands for a kill between two training steps."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "items.parquet"
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(20):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    pq.write_table(pa.table({
        "item_id": list(range(100, 120)), "caption": [f"cat {n}" for n in range(20)], "image": pictures,
        "source_path": [f"x/{'animals' if n < 14 else 'tools'}/{n}.png" for n in range(20)],
        "near_duplicate_group": [100 + n - n % 2 for n in range(20)],
    }), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("model"), channels=8)


def study(corpus: Path, source: Path, root: Path, settings: StudySettings = SETTINGS) -> Study:
    made = Study(settings, corpus, source, root)
    made.prepare()
    return made


@pytest.fixture(scope="module")
def made(corpus: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study(corpus, source, tmp_path_factory.mktemp("study"))


def test_a_subset_takes_whole_groups_and_themes_in_turn() -> None:
    paths = ["a/big/1"] * 30 + ["a/small/1"] * 6 + ["a/none/1"] * 10
    groups = [n // 3 for n in range(46)]
    rows = choose_items(paths, groups, ("a/big", "a/small"), 12, seed=0)
    assert len(rows) == 12
    assert sum(r >= 30 for r in rows) == 6  # as many of the small theme as of the large one
    assert max(rows) < 36
    kept = {groups[r] for r in rows}
    assert all(groups[r] not in kept or r in rows for r in range(36))


def test_first_weights_come_from_other_themes_only(corpus: Path, source: Path, tmp_path: Path) -> None:
    themed = replace(SETTINGS, themes=("animals",), items=8, pretraining_steps=2)
    made = Study(themed, corpus, source, tmp_path)
    assert {i.item_id for i in made.outsiders} == set(range(114, 120))
    assert {i.item_id for i in made.items} < set(range(100, 114))


def test_a_corpus_without_enough_of_the_themes_is_refused(corpus: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelsNotUsable, match="--size"):
        study(corpus, source, tmp_path, replace(SETTINGS, themes=("absent",)))


def test_a_killed_run_resumes_and_gives_the_rows_of_an_uninterrupted_one(
    made: Study, corpus: Path, source: Path, tmp_path: Path
) -> None:
    wanted = [half_corpus(made.item_ids.tolist(), n, 0) for n in range(3)]
    whole = RetrainingStore(made).run(wanted)

    other = study(corpus, source, tmp_path)
    seen: list[float] = []

    def check() -> None:
        if seen and seen[-1] > 1:  # in the middle of the second run
            raise Killed

    store = RetrainingStore(other)
    with pytest.raises(Killed):
        store.run(wanted, lambda done, total: seen.append(done), check)
    assert len(store.rows()) == 1
    with store.rows_file.open("a") as handle:
        handle.write('{"key": "cut sho')  # a kill in mid-write
    trained = []
    resumed = store.run(wanted, lambda done, total: trained.append(done))
    assert min(trained) == 1  # the first was not run again
    for a, b in zip(whole, resumed, strict=True):
        assert (a.removed, a.seed) == (b.removed, b.seed)
        assert a.losses == b.losses
        assert a.pixel_mse == b.pixel_mse
    assert len(store.rows()) == 3


def test_equal_runs_share_a_row_and_others_do_not(made: Study) -> None:
    assert without([103, 101]) == without([101, 103, 101])
    keys = {r.key("s") for r in (without([1]), without([2]), without([1], 1), nothing_removed(0), nothing_removed(1))}
    assert len(keys) == 5
    assert without([1]).key("s") != without([1]).key("other study")
    store = RetrainingStore(made)
    before = len(store.rows())
    twice = store.run([nothing_removed(7), Retraining((), nothing_removed(7).seed)])
    assert twice[0] == twice[1]
    assert len(store.rows()) == before + 1


def test_halves_are_halves_and_differ(made: Study) -> None:
    halves = [half_corpus(made.item_ids.tolist(), n, 0) for n in range(4)]
    assert {len(h.removed) for h in halves} == {len(made.items) - len(made.items) // 2}
    assert len({h.removed for h in halves}) == 4
    assert len({h.seed for h in halves}) == 4


def test_what_is_left_out_is_not_trained_on(made: Study) -> None:
    """Training on the rest alone gives the same weights: the removed items' latents play no part."""
    rows = np.arange(4, 12)
    first = made.train(rows, 5)
    spoilt = replace(made.training_set, latents=made.training_set.latents.clone())
    spoilt.latents[:4] = 1e3
    made.__dict__["training_set"], good = spoilt, made.training_set
    try:
        second = made.train(rows, 5)
    finally:
        made.__dict__["training_set"] = good
    assert all(bool((first[k] == second[k]).all()) for k in first)


def test_rows_are_json_lines_one_each(made: Study) -> None:
    store = RetrainingStore(made)
    store.run([nothing_removed(3)])
    rows = [json.loads(line) for line in store.rows_file.read_text().splitlines()]
    assert all(len(r["losses"]) == 3 and r["seconds"] > 0 for r in rows)
