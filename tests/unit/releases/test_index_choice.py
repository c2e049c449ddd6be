"""A release says which index it got and why; one from before that still opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from byline.config import Settings
from byline.errors import ReleaseCorrupt
from byline.index import build_index, refined
from byline.releases import builder
from byline.releases.golden import GoldenQueries
from byline.releases.loader import load_release
from byline.releases.manifest import MANIFEST, ReleaseManifest

Build = Callable[..., Path]


def edited(directory: Path, change: Callable[[dict], None]) -> Path:
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).chmod(0o644)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


def test_a_small_release_is_searched_exactly_and_says_so(build: Build) -> None:
    manifest = ReleaseManifest.read(build())
    assert manifest.index is not None
    assert (manifest.index_factory, manifest.index.factory, manifest.index.recall) == ("Flat", "Flat", 1.0)
    assert not manifest.index.forced and "exact search" in manifest.index.reason


@pytest.mark.parametrize("factory", ["SQ8,RFlat", "IVF4,SQ8,RFlat", "RR9,IVF4,RaBitQ,RFlat", "HNSW8,Flat"])
def test_a_forced_tier_is_built_opened_and_its_recall_recorded(
    build: Build, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refined, "EXACT_ROWS", 1)
    directory = build(index_factory=factory)
    release = load_release(directory, expected=ReleaseManifest.read(directory))
    section = release.manifest.index
    assert section is not None and section.forced and section.queries > 0 and section.tried[0].factory == factory
    assert release.index.factory == release.manifest.index_factory == factory
    exact = load_release(build(index_factory="Flat"))
    query = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    assert [h.score for h in release.search(query, 2)] == [h.score for h in exact.search(query, 2)]


def test_a_release_answers_from_milvus_as_from_exact_search(build: Build, tmp_path: Path) -> None:
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    release = load_release(build(index_factory=f"Milvus:{tmp_path / 'lite.db'}"))
    exact = load_release(build(index_factory="Flat"))
    assert release.index.factory == release.manifest.index_factory == "Milvus"
    query = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    first = exact.search(query, 5)
    assert release.search(query, 5) == first
    gone = [first[0].item_id]
    assert release.search(query, 5, gone) == exact.search(query, 5, gone)
    release.index.close()


def test_a_release_from_before_the_choice_was_recorded_still_opens(build: Build) -> None:
    directory = edited(build(), lambda manifest: manifest.pop("index"))
    assert load_release(directory).manifest.index is None


def test_a_section_of_another_index_than_the_manifest_names_is_refused(build: Build) -> None:
    directory = edited(build(), lambda manifest: manifest.update(index_factory="SQ8,RFlat"))
    with pytest.raises(ReleaseCorrupt, match="section index"):
        load_release(directory)


def test_an_approximate_index_may_miss_one_golden_answer_an_exact_one_none() -> None:
    rng = np.random.default_rng(0)
    scores = np.sort(rng.uniform(1, 9, (2, 12)), axis=1)[:, ::-1].astype(np.float32)
    ids = np.arange(24).reshape(2, 12)
    golden = GoldenQueries(np.zeros((2, 4), dtype=np.float32), scores[:, :10], ids[:, :10])

    def without(*places: int):
        return lambda features, k: (np.delete(scores, places, 1)[:, :k], np.delete(ids, places, 1)[:, :k])

    golden.check(without(10))
    golden.check(without(3), exact=False)
    with pytest.raises(ReleaseCorrupt):
        golden.check(without(3))
    with pytest.raises(ReleaseCorrupt):
        golden.check(without(3, 4), exact=False)
    with pytest.raises(ReleaseCorrupt):
        golden.check(lambda features, k: (scores[:, :k] * 1.1, ids[:, :k]), exact=False)


def test_recall_is_measured_with_real_queries_first() -> None:
    items = np.arange(600, dtype=np.float32).reshape(300, 2)
    real = -np.ones((100, 2), dtype=np.float32)
    asked = builder._index_queries(real, items)
    assert asked.shape == (128, 2) and (asked[:100] == -1).all() and (asked[100:] >= 0).all()
    assert builder._index_queries(None, items[:9]).shape == (9, 2)
    assert (builder._index_queries(np.concatenate([real, real]), items) == -1).all()


def test_every_factory_that_can_be_forced_by_a_setting_can_be_built() -> None:
    for factory in ("Flat", "SQ8,RFlat", "IVF4,SQ8,RFlat", "RR9,IVF4,RaBitQ,RFlat", "IVF4,RaBitQ,RFlat", "HNSW8,Flat"):
        assert Settings(index_factory=factory).index_factory == factory
        build_index(np.arange(50), np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32), factory)
    with pytest.raises(ValidationError):
        Settings(index_factory="PQ9")
