"""Sketches travel in a release whole, verified and of its very items, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index import FlatIndex
from byline.releases.loader import load_release
from byline.releases.manifest import EMBEDDINGS, SKETCH_BASIS, SKETCH_FILES, SKETCH_TOKENS, SKETCHES, ReleaseManifest
from byline.releases.sketches import SketchParts, section_of

from .test_build_and_load import rewrite

Build = Callable[..., Path]
WIDTH = 5


class Basis:
    """What the sketches stand in."""

    def save(self, path: Path) -> None:
        path.write_bytes(b"a basis")


@pytest.fixture
def parts(build: Build) -> SketchParts:
    """Sketches of the items every release here has, in another order than the catalogue's."""
    ids = load_release(build(release_id="plain")).index.ids[::-1].copy()
    sketches = 1e-4 * np.random.default_rng(1).standard_normal((len(ids), WIDTH)).astype(np.float32)
    section = section_of(
        teacher_id="sketch/1", dimensions=WIDTH, selection="cross_attention_kv", query_draws=64,
        fidelity={"map100": 0.98, "spearman": float("nan"), "ok": True},
    )  # fmt: skip
    return SketchParts(ids, sketches, Basis(), section)


def test_a_release_carries_sketches_basis_and_what_they_are_worth(build: Build, parts: SketchParts) -> None:
    directory = build(sketches=parts)
    release = load_release(directory, expected=ReleaseManifest.read(directory))
    assert release.sketches is not None
    assert release.sketches.section.index is not None and release.sketches.section.index.factory == "Flat"
    assert release.sketches.section.model_copy(update={"index": None}) == parts.section
    assert parts.section.fidelity == {"map100": 0.98}
    assert release.sketches.basis.read_bytes() == b"a basis"
    np.testing.assert_array_equal(release.sketches.index.vectors(parts.item_ids), parts.sketches)
    scores, ids = release.sketches.index.search(parts.sketches[:1], 3, np.array([int(parts.item_ids[0])]))
    order = np.argsort(-(parts.sketches[1:] @ parts.sketches[0]))
    assert ids[0].tolist() == parts.item_ids[1:][order[:3]].tolist()


def test_a_release_without_sketches_is_whole(build: Build) -> None:
    directory = build()
    assert load_release(directory).sketches is None
    assert not [name for name in SKETCH_FILES if (directory / name).exists()]


class Tokens:
    """Token gradients as a release sees them: whose, and a file."""

    def __init__(self, item_ids: np.ndarray) -> None:
        self.item_ids = item_ids

    def save(self, path: Path) -> None:
        path.write_bytes(b"token gradients")


def test_token_gradients_travel_with_their_sketches_and_are_of_the_same_items(build: Build, parts: SketchParts) -> None:
    section = parts.section.model_copy(update={"token_rank": 7})
    directory = build(sketches=replace(parts, section=section, tokens=Tokens(parts.item_ids)))
    release = load_release(directory, expected=ReleaseManifest.read(directory))
    assert release.sketches is not None and release.sketches.tokens is not None
    assert release.sketches.tokens.read_bytes() == b"token gradients"
    (directory / SKETCH_TOKENS).write_bytes(b"other gradients")
    with pytest.raises(ReleaseCorrupt):
        load_release(directory)
    with pytest.raises(FeatureMismatch, match="other items"):
        build(release_id="others", sketches=replace(parts, section=section, tokens=Tokens(parts.item_ids[1:])))
    with pytest.raises(ValueError, match="token_rank"):
        build(release_id="unsaid", sketches=replace(parts, tokens=Tokens(parts.item_ids)))


@pytest.mark.parametrize("name", SKETCH_FILES)
def test_a_sketch_file_that_is_altered_or_gone_is_noticed(build: Build, parts: SketchParts, name: str) -> None:
    directory = build(sketches=parts)
    data = bytearray((directory / name).read_bytes())
    data[-2] ^= 0x10
    (directory / name).chmod(0o644)
    (directory / name).write_bytes(bytes(data))
    with pytest.raises(ReleaseCorrupt, match=name):
        load_release(directory)
    (directory / name).unlink()
    with pytest.raises(ReleaseCorrupt, match=name):
        load_release(directory)


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lambda ids, rows: (ids, rows[::-1].copy()), "golden"),
        (lambda ids, rows: (ids[1:], rows[1:]), "sketch index rows"),
        (lambda ids, rows: (ids, rows[:, 1:].copy()), "sketch index width"),
    ],
)
def test_an_index_of_other_sketches_is_noticed(build: Build, parts: SketchParts, change: Any, noticed: str) -> None:
    directory = build(sketches=parts)
    rewrite(directory, SKETCHES, FlatIndex.build(*change(parts.item_ids, parts.sketches)).save)
    with pytest.raises(ReleaseCorrupt, match=noticed):
        load_release(directory)


def test_sketches_of_an_item_the_catalogue_lacks_are_noticed(build: Build, parts: SketchParts) -> None:
    rows = parts.sketches.copy()
    rows[7] = 0.0  # in no golden answer, so that only the ids can tell
    directory = build(sketches=replace(parts, sketches=rows))
    ids = parts.item_ids.copy()
    ids[7] = ids[7] + 1
    rewrite(directory, SKETCHES, FlatIndex.build(ids, rows).save)
    with pytest.raises(ReleaseCorrupt, match="sketch index and catalogue"):
        load_release(directory)


def test_the_embeddings_index_does_not_pass_for_the_sketches(build: Build, parts: SketchParts) -> None:
    directory = build(sketches=parts)
    data = (directory / EMBEDDINGS).read_bytes()
    rewrite(directory, SKETCHES, lambda path: path.write_bytes(data))
    with pytest.raises(ReleaseCorrupt, match="sketch index width"):
        load_release(directory)


def test_sketches_of_other_items_or_of_another_width_build_no_release(
    build: Build, parts: SketchParts, tmp_path: Path
) -> None:
    wrong_items = replace(parts, item_ids=parts.item_ids + 1)
    wrong_width = replace(parts, sketches=parts.sketches[:, 1:])
    for wrong in (wrong_items, wrong_width):
        with pytest.raises(FeatureMismatch):
            build(release_id="wrong", sketches=wrong)
    assert not (tmp_path / "releases" / "wrong").exists()


def test_a_section_without_its_files_is_no_manifest(build: Build, parts: SketchParts) -> None:
    document = ReleaseManifest.read(build(sketches=parts)).to_json()
    del document["files"][SKETCH_BASIS]
    with pytest.raises(ReleaseCorrupt, match="together or not at all"):
        ReleaseManifest.from_json(document)
    with pytest.raises(ReleaseCorrupt, match="together or not at all"):
        ReleaseManifest.from_json({**document, "sketches": None})
