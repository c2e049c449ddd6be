"""A release says which index it got and why; one from before that still opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byline.errors import ReleaseCorrupt
from byline.index import refined
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


def test_a_release_from_before_the_choice_was_recorded_still_opens(build: Build) -> None:
    directory = edited(build(), lambda manifest: manifest.pop("index"))
    assert load_release(directory).manifest.index is None


def test_a_section_of_another_index_than_the_manifest_names_is_refused(build: Build) -> None:
    directory = edited(build(), lambda manifest: manifest.update(index_factory="SQ8,RFlat"))
    with pytest.raises(ReleaseCorrupt, match="section index"):
        load_release(directory)
