"""The table of a head beside its baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from byline.evaluation.head_report import report_head
from byline.evaluation.result_file import write_result
from byline.ranker.labelled_set import LabelledSet


def _world():
    rng = np.random.default_rng(0)
    items = rng.normal(size=(120, 10)).astype(np.float32)
    queries = rng.normal(size=(40, 10)).astype(np.float32)
    tau = (queries[:, :6] @ items[:, :6].T).astype(np.float32)
    halves = [tau + rng.normal(size=tau.shape).astype(np.float32) for _ in range(2)]
    ids = np.arange(120)
    train = LabelledSet(queries[:25], ids, items, halves[0][:25])
    held_out = LabelledSet(queries[25:], ids, items, halves[1][25:])
    return train, held_out, halves[0][25:], tau[25:]


def test_every_kind_of_row_is_there_and_judged_on_the_same_queries():
    train, held_out, other_half, truth = _world()
    report = report_head(truth, held_out, train, [("image", 6), ("minilm", 4)], cutoff=10, other_half=other_half,
                         seed=0)
    assert {row.name: row.kind for row in report.rows} == {
        "head": "head", "image": "raw", "minilm": "raw", "image+minilm": "raw", "global_mean_rank": "no_image",
        "prompt_neighbours": "no_image", "teacher_other_half": "ceiling",
    }
    assert {row.result.per_query.shape for row in report.rows} == {(15,)}
    best = report.best("raw")
    assert best is not None and best.name == "image" and best.head_gain is not None and best.head_gain.mean > 0
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["map"]["L"] == 10 and figures["map"]["queries"] == 15
    assert figures["map"]["raw"]["minilm"] < figures["map"]["ceiling"] < 1.0


def test_a_block_that_is_an_estimate_by_itself_stands_there_by_its_plain_inner_product_too():
    train, held_out, _, truth = _world()
    report = report_head(truth, held_out, train, [("gradient", 6), ("other", 4)], cutoff=10, other_half=None, seed=0)
    found = {row.name: row for row in report.rows if row.kind in ("raw", "direct")}
    assert list(found) == ["gradient", "other", "gradient+other", "gradient, inner product"]
    # Here tau is that inner product, so that the head, which is the truth, gains nothing over it, but over the cosine.
    gain = found["gradient, inner product"].head_gain
    assert gain is not None and gain.mean == 0.0 and found["gradient, inner product"].kind == "direct"
    best = report.best("raw")
    assert best is not None and best.head_gain is not None and best.head_gain.mean > 0.05


def test_without_halves_there_is_no_ceiling_and_without_text_no_prompt_row():
    train, held_out, _, truth = _world()
    report = report_head(truth, held_out, train, [("image", 10)], cutoff=10, other_half=None, seed=0)
    assert report.best("ceiling") is None
    assert [row.name for row in report.rows] == ["head", "image", "global_mean_rank"]


def test_a_result_file_says_what_was_run_where_and_when_it_fails_keeps_the_old_one(tmp_path: Path):
    path = tmp_path / "evaluate" / "head.json"
    write_result(path, {"map": 1}, command="byline evaluate head", seconds=1.23456, commit="abc", seed=3)
    found = json.loads(path.read_text())
    assert found["machine"].keys() == {"cpu", "cores", "gpu", "torch"}
    assert (found["map"], found["command"], found["seconds"], found["seed"]) == (1, "byline evaluate head", 1.235, 3)
    assert [file.name for file in path.parent.iterdir()] == ["head.json"]
