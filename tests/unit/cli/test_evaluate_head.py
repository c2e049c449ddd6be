"""``byline evaluate head`` and ``make bench-head`` from label files, without a server: tiny, but the real path."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from byline.cli.bench_head import main as bench_head
from byline.cli.evaluate import app
from byline.errors import FeatureMismatch, InvalidRequest, LabelsNotUsable
from byline.ranker.head import FeatureBlock, Head, HeadConfig, load_head, save_head
from byline.rankings.label_files import FileLabels, read_label_files
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, write_snapshot

ITEMS, QUERIES = 60, 36
ANIMALS = ("cat", "dog", "horse", "fish", "bird", "cow")
PLACES = ("beach", "kitchen", "forest", "street", "office", "desert")


def _png(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of animals in places; the same animal influences most, then the same place."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    what = [(n % 6, rng.integers(0, 6)) for n in range(ITEMS)]
    ids = np.arange(1000, 1000 + ITEMS)
    pq.write_table(pa.table({
        "item_id": ids, "caption": [f"a {ANIMALS[a]} in a {PLACES[p]} {n}" for n, (a, p) in enumerate(what)],
        "creator": [f"creator {n % 3}" for n in range(ITEMS)], "image": [_png(rng) for _ in range(ITEMS)],
    }), place / "items.parquet")  # fmt: skip
    queries = []
    for n in range(QUERIES):
        animal, spot = n % 6, rng.integers(0, 6)
        tau = np.array([2.0 * (a == animal) + (p == spot) for a, p in what], dtype=np.float32)
        halves = np.stack([tau + 0.2 * rng.normal(size=ITEMS) for _ in range(2)]).astype(np.float32)
        split = "train" if n < 18 else "validation" if n < 24 else "test"
        queries.append(SnapshotQuery(
            prompt=f"{ANIMALS[animal]} at the {PLACES[spot]}", seed=n, split=split, near_duplicate_group=n,
            source="corpus", candidate_set="corpus", draws=8, image=_png(rng), item_ids=ids, tau=halves.mean(0),
            standard_error=np.full(ITEMS, 0.1, np.float32), tau_halves=halves,
        ))  # fmt: skip
    write_snapshot(place / "labels", SnapshotHeader("m", "r", "c", "t"), queries)
    return place


@pytest.fixture(autouse=True)
def configured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CORPUS_SOURCE": place / "items.parquet", "CACHE_DIR": place / "cache",
                        "FEATURE_SPEC": "minilm", "STATE_DIR": place / "state"}.items():  # fmt: skip
        monkeypatch.setenv(f"BYLINE_{name}", str(value))


@pytest.fixture(scope="module")
def labels(place: Path) -> FileLabels:
    return read_label_files(place / "labels", place / "items.parquet", place / "none", "minilm", place / "cache")


def evaluate(place: Path, *arguments: str) -> dict:
    out = place / "out" / "head.json"
    done = CliRunner().invoke(app, ["head", "--labels", str(place / "labels"), "--out", str(out), "-L", "10",
                                    "--cutoffs", "5,20,500", *arguments])  # fmt: skip
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    assert out.with_suffix(".png").stat().st_size > 1000
    return json.loads(out.read_text())


def test_training_queries_come_from_the_half_to_learn_from_and_all_others_from_the_half_that_judges(labels, place):
    assert [labels.labelled(split).queries for split in ("train", "validation", "test")] == [18, 6, 12]
    train, test = labels.labelled("train"), labels.labelled("test")
    for split, found, half in (("train", train, 0), ("test", test, 1)):
        expected = np.stack([query.tau_halves[half] for query in labels.of(split)])
        assert np.array_equal(found.tau, expected)
    assert np.array_equal(train.item_features, test.item_features)
    with pytest.raises(LabelsNotUsable, match="test, train, validation"):
        labels.labelled("holdout")


def test_features_are_encoded_once(labels, place, monkeypatch):
    from byline.features.extractor import FeatureExtractor

    def never(*_: object) -> None:
        raise AssertionError("the cache has these rows")

    monkeypatch.setattr(FeatureExtractor, "extract", never)
    again = read_label_files(place / "labels", place / "items.parquet", place / "none", "minilm", place / "cache")
    assert np.array_equal(again.query_features, labels.query_features)


def test_a_head_fitted_here_stands_beside_its_baselines_and_by_kind_of_query(place):
    found = evaluate(place)
    assert found["head"] == "fitted here" and found["map"]["L"] == 10 and found["map"]["queries"] == 12
    assert [order["kind"] for order in found["orders"]] == ["head", "raw", "no_image", "no_image", "ceiling"]
    measures = found["orders"][0]["measures"]
    assert set(measures) == {"map_5", "map_10", "map_20", "top1_1", "top1_10", "ndcg"}
    assert found["map"]["head"] == measures["map_10"]["mean"] >= found["orders"][1]["measures"]["map_10"]["mean"]
    assert "head_gain" in found["orders"][1]["measures"]["ndcg"]
    cuts = {part["cut"] for part in found["slices"]}
    assert cuts == {"prompt", "creator of the teacher's first item", "distance to the training queries"}
    for cut in cuts:
        assert sum(part["queries"] for part in found["slices"] if part["cut"] == cut) == 12


def test_two_heads_are_compared_query_by_query(place, labels):
    rows = labels.labelled("train")
    for name, seed in (("a", 0), ("b", 1)):
        head = Head(HeadConfig(384, (FeatureBlock("minilm", 384),), (8,), 4, residual=False))
        head.initialise(rows.item_features, rows.query_features, torch.Generator().manual_seed(seed))
        save_head(head, place / f"{name}.safetensors")
    shutil.copy(place / "a.safetensors", place / "same.safetensors")
    found = evaluate(place, "--head", str(place / "a.safetensors"), "--against", str(place / "b.safetensors"))
    assert (found["head"], found["against"]) == ("a", "b") and found["orders"][1]["kind"] == "other_head"
    first, second = (order["measures"]["map_10"] for order in found["orders"][:2])
    assert second["head_gain"]["mean"] == pytest.approx(first["mean"] - second["mean"])
    same = evaluate(place, "--head", str(place / "a.safetensors"), "--against", str(place / "same.safetensors"))
    assert same["orders"][1]["measures"]["map_10"]["head_gain"]["mean"] == 0.0
    test = labels.labelled("test")
    scores = load_head(place / "a.safetensors").scores(test.query_features, test.item_features)
    from byline.evaluation.map import mean_average_precision

    assert same["map"]["head"] == pytest.approx(mean_average_precision(scores, test.tau, 10).mean)


def test_what_cannot_be_judged_is_said(place):
    with pytest.raises(InvalidRequest, match="named by its path"):
        evaluate(place, "--head", "rel-1")
    with pytest.raises(InvalidRequest, match="--split"):
        evaluate(place, "--split", "train")
    with pytest.raises(InvalidRequest, match="--cutoffs"):
        evaluate(place, "--cutoffs", "10,x")
    save_head(Head(HeadConfig(6, (FeatureBlock("image", 6),), (4,), 4)), place / "narrow.safetensors")
    with pytest.raises(FeatureMismatch, match=r"image\(6\).*minilm\(384\)"):
        evaluate(place, "--head", str(place / "narrow.safetensors"))


def test_the_benchmark_of_trainers_runs_from_label_files(place):
    out = place / "bench"
    arguments = ["--labels", str(place / "labels"), "--out", str(out), "--pairs", "nearest:40", "--passes", "2",
                 "--batch", "128", "--small-batch", "64", "--tower", "16", "--steps", "12", "--hidden", "16",
                 "--out-dim", "8", "--width", "6", "--evaluate-at", "10", "--cutoffs", "5", "20", "--shares", "0.5",
                 "--published-shares", "0.5",
                 "--features", "minilm", "--ours", "minilm", "--published", "minilm"]  # fmt: skip
    bench_head([*arguments, "--only", "small steps"])
    assert not (out / "head.json").exists()  # a part of the runs: kept, and no result
    bench_head(arguments)
    found = json.loads((out / "head.json").read_text())
    ours, half = "ours, minilm", "ours, minilm @ 0.5"
    theirs = ["published, minilm", "published, sign kept, small steps, minilm"]
    assert {row["trainer"] for row in found["rows"]} == {ours, half, *theirs, f"{theirs[1]} @ 0.5"}
    assert [(c["ours"], c["published"]) for c in found["comparisons"]] == [(ours, name) for name in theirs]
    assert set(found["by_L"]) == {"5", "10", "20"} and set(found["map"]) == {"ours", "published", "L", "queries"}
    assert found["map"]["published"] == max(found["by_L"]["10"]["trainers"][name]["map"] for name in theirs)
    assert found["time_ratio"] > 0 and found["settings"]["pairs"] == "nearest:40"
    assert {"command", "seconds", "machine", "commit", "seed"} <= set(found) and (out / "head.png").exists()
    slopes = {row["trainer"]: row["slope"] for row in found["rows"]}
    assert slopes[theirs[1]] < 0
    curve = found["learning_curve"]
    assert [point["queries"] for point in curve[ours]] == [9, 18] and (out / "head-curve.png").exists()
    assert curve[ours][1]["map"]["10"] == found["map"]["ours"]
