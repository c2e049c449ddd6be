"""The index benchmark at its smallest: rows are reproducible, every tier is measured, ratios are of what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from byline.cli import bench_index as command
from byline.diffusion.model import directory_revision
from byline.evaluation import bench_index_data as data
from byline.evaluation.bench_index import TIERS, Plan, bandwidth, factory_of, marked, measure_scans, measure_tier
from byline.evaluation.bench_index_report import draw, table

GENERATOR = Path(__file__).resolve().parents[3] / "data/generator"


class Network:
    """Stands in for the encoder: a fixed projection of the pixels."""

    def extract_features(self, pixels: torch.Tensor) -> torch.Tensor:
        weights = torch.randn(3 * 16, 1280, generator=torch.Generator().manual_seed(0))
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)  # [n, 48]
        return (small @ weights)[..., None, None]


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.ImageFeatures:
    monkeypatch.setattr(data.EfficientNetLite0, "load", lambda device: SimpleNamespace(_network=Network()))
    monkeypatch.setattr(data, "SHARD", 64)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 28, 28, 3), dtype=np.uint8)
    return data.ImageFeatures(data.Views([pixels[:10], pixels[10:]], 3), tmp_path / "features")


def rows_of(count: int, dim: int, seed: int) -> data.Rows:
    rng = np.random.default_rng(seed)
    spread = (1 + np.arange(dim)) ** -0.5
    vectors = (rng.standard_normal((count, dim)) * spread).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:200] + 0.05 * rng.standard_normal((200, dim)).astype(np.float32)
    return data.Rows("cosine", vectors, queries, "random numbers")


def test_later_views_differ_from_the_image_and_are_the_same_again(features) -> None:
    views = features._views
    plain, first = views.pixels(np.array([7, 47]), 0)
    again = views.pixels(np.array([7, 47]), 0)
    assert not torch.allclose(plain, first)
    torch.testing.assert_close(again, torch.stack([plain, first]))
    assert first.min() >= 0 and first.max() <= 1


def test_features_are_kept_and_a_longer_run_begins_with_the_shorter_ones(features, monkeypatch) -> None:
    short = features.rows(100)
    long = features.rows(150)
    np.testing.assert_array_equal(long[:100], short)
    monkeypatch.setattr(data.ImageFeatures, "_encode", None)
    np.testing.assert_array_equal(features.rows(150), long)


def test_cosine_rows_are_of_unit_norm_and_grown_ones_come_last(features) -> None:
    rows = data.cosine_rows(features, 40, 200, 6, 32, 0, real=120)
    assert rows.vectors.shape == (200, 32) and rows.queries.shape == (6, 32)
    np.testing.assert_allclose(np.linalg.norm(rows.vectors, axis=1), 1, atol=1e-3)
    np.testing.assert_array_equal(rows.vectors[:120], data.cosine_rows(features, 40, 120, 6, 32, 0, 120).vectors)
    assert "120 rows, and 80 grown" in rows.what


def test_product_rows_keep_directions_and_have_norms_of_the_given_kind() -> None:
    cosine = rows_of(3_000, 24, 1)
    norms = np.array([1.0, 50.0], dtype=np.float32)
    rows = data.product_rows(cosine, norms, 0)
    found = np.linalg.norm(rows.vectors, axis=1)
    np.testing.assert_allclose(rows.vectors / found[:, None], cosine.vectors, atol=1e-5)
    assert (np.abs(np.log(found[:, None] / norms)).min(axis=1) < 0.6).all() and 0.4 < (found > 10).mean() < 0.6
    np.testing.assert_array_equal(rows.vectors, data.product_rows(cosine, norms, 0).vectors)


def test_sketch_rows_begin_with_the_corpus_own() -> None:
    rows = data.sketch_rows(GENERATOR / "sketches", directory_revision(GENERATOR), 3000, 9, 0)
    own = data.sketch_rows(GENERATOR / "sketches", directory_revision(GENERATOR), 100, 9, 0)
    np.testing.assert_array_equal(rows.vectors[:100], own.vectors)
    assert rows.vectors.shape[0] == 3000 and len(rows.queries) == 9
    assert not (rows.queries[:, None] == rows.vectors[None]).all(-1).any()
    np.testing.assert_array_equal(own.queries, rows.queries)


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_is_measured_and_finds_what_it_should(tier: str) -> None:
    rows = rows_of(6_000, 24, 1)
    row = measure_tier(rows, tier, Plan(timed=10, batches=1))
    assert row["factory"] == factory_of(tier, 6_000, 24)
    assert row["recall100"] >= 0.97 and row["removed99_recall100"] == 1.0 and row["removed50_recall100"] >= 0.95
    assert 0 < row["p50_ms"] <= row["p99_ms"] and row["faiss_p50_ms"] > 0
    assert row["ratio_to_faiss"] == pytest.approx(row["p50_ms"] / row["faiss_p50_ms"], rel=1e-2)
    assert tier == "flat" or row["bytes_per_item"] < row["stored_bytes_per_item"] or tier == "hnsw"


def test_the_scans_and_the_limit_of_the_memory_stand_beside() -> None:
    rows = rows_of(3_000, 24, 2)
    found = {row["tier"]: row for row in measure_scans(rows, Plan(timed=5, batches=1))}
    assert set(found) == {"numpy_scan", "torch_scan", "memory_bandwidth"}
    assert found["memory_bandwidth"]["p50_ms"] > 0 and bandwidth(rows.vectors) > 0


def test_the_star_stands_at_the_least_work_of_those_that_reach_the_target() -> None:
    big = {"set": "cosine", "n": 10**6, "dim": 768}
    rows = [
        big | {"tier": "flat", "accepted": False, "work_ms": None},
        big | {"tier": "sq8", "accepted": True, "work_ms": 5.0},
        big | {"tier": "ivf_sq8", "accepted": True, "work_ms": 4.0},
        big | {"tier": "ivf_rabitq", "accepted": False, "work_ms": 1.0},
        big | {"tier": "hnsw", "accepted": True, "work_ms": 0.1},  # not tried: too many to link
        {"set": "cosine", "n": 1000, "dim": 768, "tier": "flat", "accepted": False, "work_ms": None},
        {"set": "cosine", "n": 1000, "dim": 768, "tier": "sq8", "accepted": True, "work_ms": 0.1},
    ]
    assert [row["chosen"] for row in marked(rows)] == [False, False, True, False, False, True, False]
    middle = [row | {"n": 100_000} for row in rows[:5]]
    assert [row["chosen"] for row in marked(middle)] == [False, False, False, False, True]


def test_the_command_writes_rows_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--sets", "sketch", "--sizes", "5000", "--queries", "40", "--timed", "40", "--tiers", "flat", "sq8",
                 "--out", str(tmp_path)]  # fmt: skip
    command.main(arguments)
    result = json.loads((tmp_path / "index.json").read_text())
    assert {row["tier"] for row in result["rows"]} == {"numpy_scan", "torch_scan", "memory_bandwidth", "flat", "sq8"}
    assert result["machine"] and result["command"].startswith("python -m byline.cli.bench_index")
    shown = capsys.readouterr().out
    assert "| flat *" in shown and "sketch, 5,000" in shown
    assert draw(result["rows"], tmp_path / "figure.png") == (tmp_path / "index.png").exists()
    before = (tmp_path / "index.json").read_text()
    command.main(arguments)  # nothing is measured again
    assert json.loads(before)["rows"] == json.loads((tmp_path / "index.json").read_text())["rows"]
    assert table([]) == ""
