"""A release is whole, durable and verified, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byline.errors import FeatureMismatch, ReleaseCorrupt, ReleaseNotEligible
from byline.index import FlatIndex
from byline.ranker.head import Head, HeadConfig, feature_blocks, save_head
from byline.releases.golden import GoldenQueries
from byline.releases.loader import load_release
from byline.releases.manifest import (
    EMBEDDINGS,
    GOLDEN,
    HEAD,
    MANIFEST,
    REQUIRED_FILES,
    ReleaseManifest,
    file_entry,
)

Build = Callable[..., Path]


def rewrite(directory: Path, name: str, write: Callable[[Path], object]) -> None:
    """Replace a file and make the manifest agree: only the golden queries or the cross-checks can notice."""
    path = directory / name
    path.chmod(0o644)
    write(path)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"][name] = file_entry(path).model_dump()
    (directory / MANIFEST).chmod(0o644)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_built_release_answers_like_its_head_and_index(build: Build, mmap: bool) -> None:
    directory = build()
    release = load_release(directory, mmap=mmap)
    assert directory.name == release.release_id
    golden = GoldenQueries.load(directory / GOLDEN)
    hits = release.search(golden.features[0], 10)
    assert [hit.item_id for hit in hits] == golden.ids[0].tolist()
    assert [hit.rank for hit in hits] == list(range(1, 11))
    assert all(hit.item_id in release.catalogue for hit in hits)
    without = release.search(golden.features[0], 10, [hits[0].item_id])
    assert [hit.item_id for hit in without[:9]] == [hit.item_id for hit in hits[1:]]
    assert len(release.search(golden.features[0], 1000)) == release.manifest.items
    assert release.catalogue[hits[0].item_id].creator == "Ada"
    assert release.calibrator == {"noise_floor": 0.1}


@pytest.mark.parametrize("name", [*REQUIRED_FILES, MANIFEST])
def test_a_release_with_a_flipped_byte_is_refused(build: Build, name: str) -> None:
    directory = build()
    expected = ReleaseManifest.read(directory)
    path = directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x04
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    with pytest.raises(ReleaseCorrupt):
        load_release(directory, expected=expected)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_release_that_lacks_a_file_is_refused(build: Build, name: str) -> None:
    directory = build()
    (directory / name).unlink()
    with pytest.raises(ReleaseCorrupt, match=name):
        load_release(directory)


def test_another_heads_index_is_noticed_by_the_golden_queries(build: Build) -> None:
    directory = build()
    release = load_release(directory)
    vectors = np.random.default_rng(9).standard_normal((release.index.ntotal, release.index.dim)).astype(np.float32)
    rewrite(directory, EMBEDDINGS, FlatIndex.build(release.index.ids, vectors).save)
    with pytest.raises(ReleaseCorrupt, match="golden"):
        load_release(directory)


def test_a_head_of_another_width_is_noticed(build: Build) -> None:
    directory = build()
    other = Head(HeadConfig(20, feature_blocks(["minilm"], [20]), hidden=(12,), out_dim=8))
    rewrite(directory, HEAD, lambda path: save_head(other, path))
    with pytest.raises(ReleaseCorrupt, match="head input width"):
        load_release(directory)


def test_an_index_with_other_items_than_the_catalogue_is_noticed(build: Build) -> None:
    directory = build()
    index = load_release(directory, mmap=False).index
    vectors = np.zeros((index.ntotal, index.dim), dtype=np.float32)
    rewrite(directory, EMBEDDINGS, FlatIndex.build(index.ids + 1, vectors).save)
    with pytest.raises(ReleaseCorrupt, match="different items"):
        load_release(directory)


def test_a_release_that_the_registry_does_not_vouch_for_is_refused(build: Build) -> None:
    directory = build()
    registered = ReleaseManifest.read(directory).model_copy(update={"teacher_id": "another"})
    with pytest.raises(ReleaseCorrupt, match="registered"):
        load_release(directory, expected=registered)


def test_a_failed_build_leaves_nothing_behind(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        build(calibrator={"noise_floor": float("nan")})
    with pytest.raises(FeatureMismatch):
        build(catalogue=[])
    with pytest.raises(FeatureMismatch):
        build(golden_features=np.empty((0, 16), dtype=np.float32))
    root = tmp_path / "releases"
    assert not root.exists() or not list(root.iterdir())


def test_an_existing_release_is_never_overwritten(build: Build) -> None:
    directory = build(release_id="r1")
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(ReleaseNotEligible):
        build(release_id="r1", metrics={"map": 0.9})
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert [p.name for p in directory.parent.iterdir()] == ["r1"]


def test_building_the_same_twice_gives_the_same_answers_byte_for_byte(build: Build) -> None:
    first = ReleaseManifest.read(build(release_id="r1")).files
    second = ReleaseManifest.read(build(release_id="r2")).files
    # safetensors orders the two metadata entries of a head as it likes; everything made from it is equal.
    assert {n: f for n, f in first.items() if n != HEAD} == {n: f for n, f in second.items() if n != HEAD}


def test_a_query_of_another_width_is_refused(build: Build) -> None:
    release = load_release(build())
    with pytest.raises(FeatureMismatch):
        release.search(np.zeros(5, dtype=np.float32), 3)
