"""A sketch set loses withdrawn items, and a kill between any two steps loses neither the set nor the withdrawal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from byline.failpoints import VARIABLE, FailpointReached
from byline.releases.purge_sketches import cut_sketches, settle_cuts, sketch_sets
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.packed_directions import PackedDirections
from byline.teachers.sketch_basis import Coordinates, SketchBasis
from byline.teachers.sketch_set import SketchSet

GONE = np.array([102, 104], np.int64)
STEPS = ("corpus.purge_sketches_saved", "corpus.purge_sketches_hidden", "corpus.purge_sketches_shown")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directions = PackedDirections.pack([torch.randn(8, 4, generator=torch.Generator().manual_seed(0))], 16)
    settings = UnlearningSettings(corpus_size=5, query_draws=8, item_draws=8)
    basis = SketchBasis(Coordinates({"layer": torch.arange(8)}), directions, "rev1", "all", "curvature", settings)
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    place = tmp_path / "teachers-rev1" / "sketches-all"
    SketchSet(basis, np.arange(101, 106), rows, {"map100": 0.9}, "sketch/1").save(place)
    return place


def _held(folder: Path) -> list[int]:
    return [int(item_id) for item_id in SketchSet.load(folder, "rev1").item_ids]


def test_a_cut_set_lacks_the_items_and_keeps_the_others_as_they_were(folder: Path) -> None:
    before = SketchSet.load(folder, "rev1")
    assert cut_sketches(folder, GONE) == 2 and cut_sketches(folder, GONE) == 0
    after = SketchSet.load(folder, "rev1")
    assert after.item_ids.tolist() == [101, 103, 105]
    np.testing.assert_allclose(after.sketches, before.sketches[[0, 2, 4]], rtol=2e-3)
    assert [path.name for path in folder.parent.iterdir()] == ["sketches-all"]


@pytest.mark.parametrize("step", STEPS)
def test_a_cut_that_was_killed_leaves_a_set_under_its_name_and_nothing_hidden(
    folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"{step}=raise")
    with pytest.raises(FailpointReached):
        cut_sketches(folder, GONE)
    monkeypatch.delenv(VARIABLE)
    settle_cuts(folder.parents[1])
    assert sketch_sets(folder.parents[1]) == [folder]
    cut_sketches(folder, GONE)
    assert _held(folder) == [101, 103, 105]
    assert [path.name for path in folder.parent.iterdir()] == ["sketches-all"]


def test_what_a_killed_removal_left_half_removed_goes_whatever_is_left_of_it(folder: Path) -> None:
    hidden = folder.with_name(".sketches-all-gone")
    folder.rename(hidden)
    (hidden / "manifest.json").unlink()
    settle_cuts(folder.parents[1])
    assert list(folder.parent.iterdir()) == []


def test_a_set_of_withdrawn_items_alone_and_one_that_cannot_be_read_are_removed(folder: Path) -> None:
    assert cut_sketches(folder, np.arange(100, 110)) == 5
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert cut_sketches(folder, GONE) == 0
    assert list(folder.parent.iterdir()) == []
