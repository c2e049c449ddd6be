"""Build a release directory: complete and durable, or not there at all.

Why it exists: a reader must never meet half a release. Everything is written into a hidden sibling, flushed,
made read-only, and renamed into place with the manifest written last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byline.catalog.blobs import fsync_directory
from byline.catalog.items import Item
from byline.errors import FeatureMismatch, ReleaseNotEligible
from byline.failpoints import failpoint
from byline.index import AUTO, VectorIndex, choose_index
from byline.ranker.head import Head, save_head
from byline.releases.catalogue import write_catalogue
from byline.releases.garbage_files import BUILDING, hold
from byline.releases.golden import GoldenQueries
from byline.releases.labelled import LABELLED, LabelledPlaces
from byline.releases.manifest import (
    CALIBRATOR,
    CATALOGUE,
    EMBEDDINGS,
    GOLDEN,
    HEAD,
    MANIFEST,
    REQUIRED_FILES,
    SKETCH_FILES,
    SKETCH_TOKENS,
    LabelSet,
    RefreshSection,
    ReleaseManifest,
    file_entry,
    make_release_id,
)
from byline.releases.sketches import SketchParts, index_section, write_sketches
from byline.security.signing import NOT_SIGNED, Keyring, sign_manifest

Features = NDArray[np.float32]

#: Queries that an approximate index's recall is measured with.
INDEX_QUERIES = 128


def build_release(
    root: Path,
    *,
    release_id: str | None = None,
    model_id: str,
    model_revision: str,
    corpus_id: str,
    head: Head,
    feature_spec: str,
    preprocessing_hash: str,
    item_ids: Sequence[int] | NDArray[np.int64],
    item_features: Features,
    catalogue: Sequence[Item],
    calibrator: Mapping[str, Any],
    metrics: Mapping[str, Any],
    parent: str | None,
    labels: LabelSet | Mapping[str, Any],
    teacher_id: str,
    golden_features: Features,
    created_at: datetime,
    git_sha: str = "",
    index_factory: str = AUTO,
    index_queries: Features | None = None,
    sketches: SketchParts | None = None,
    refresh: RefreshSection | None = None,
    labelled: LabelledPlaces | None = None,
    keyring: Keyring = NOT_SIGNED,
) -> Path:
    """Embed ``item_features`` [n, d_in] with the head, index them, and write ``root/<release_id>``.

    ``golden_features`` [g, d_in], g ≥ 1, are query features whose answers are recorded. The default id is
    time plus digest of the contents. The index is chosen by size and measured recall unless ``index_factory`` names
    one (``byline.index.choice``; it is then that of the sketches, too); the manifest says how it came out. Recall is
    measured with ``index_queries`` [q, d_in], features of real queries, filled up with the items' own where they are
    few. With ``sketches`` the release serves the ESTIMATED tier, with ``labelled`` it tells queries that are far from
    all labelled ones. With a ``keyring`` the manifest is signed. FeatureMismatch when ids, features, sketches and
    catalogue do not belong together;
    ReleaseNotEligible when the release exists already. Returns the directory.
    """
    ids = np.asarray(item_ids, dtype=np.int64)
    if {item.item_id for item in catalogue} != set(ids.tolist()) or len(catalogue) != len(ids):
        raise FeatureMismatch(f"{len(ids)} item ids and a catalogue of {len(catalogue)} items name different items")
    if item_features.ndim != 2 or len(item_features) != len(ids) or not len(ids):
        raise FeatureMismatch(f"features of shape {item_features.shape} for {len(ids)} items")
    if golden_features.ndim != 2 or not len(golden_features):
        raise FeatureMismatch("a release needs at least one golden query")
    root.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(dir=root, prefix=BUILDING))
    alive = hold(working)
    try:
        asked = _index_queries(index_queries, item_features)
        choice = choose_index(
            ids, head.embed_items(item_features), queries=head.embed_queries(asked), factory=index_factory
        )
        index = choice.index
        _write_parts(working, head, index, catalogue, calibrator, golden_features)
        names: tuple[str, ...] = REQUIRED_FILES
        section = None
        if sketches is not None:
            section = write_sketches(working, sketches, ids, index_factory)
            names += SKETCH_FILES if sketches.tokens is None else (*SKETCH_FILES, SKETCH_TOKENS)
        if labelled is not None:
            labelled.save(working / LABELLED)
            names += (LABELLED,)
        files = {name: file_entry(working / name) for name in names}
        digests = [files[name].sha256 for name in names]
        manifest = ReleaseManifest(
            release_id=release_id or make_release_id(created_at, model_id, model_revision, *digests),
            model_id=model_id,
            model_revision=model_revision,
            corpus_id=corpus_id,
            parent=parent,
            created_at=created_at,
            feature_spec=feature_spec,
            preprocessing_hash=preprocessing_hash,
            feature_dim=item_features.shape[1],
            embedding_dim=index.dim,
            items=len(ids),
            index_factory=index.factory,
            teacher_id=teacher_id,
            labels=LabelSet.model_validate(labels),
            metrics=dict(metrics),
            git_sha=git_sha,
            sketches=section,
            index=index_section(choice),
            refresh=refresh,
            files=files,
        )
        manifest.write(working)
        signature = sign_manifest(working, manifest.digest, keyring)
        return _publish(working, root / manifest.release_id, (*names, MANIFEST, *signature))
    finally:
        if working.exists():
            working.chmod(0o755)
            shutil.rmtree(working)
        os.close(alive)


def _index_queries(real: Features | None, item_features: Features) -> Features:
    """``INDEX_QUERIES`` rows [q, d_in]: real queries, then items spread over the corpus in place of those missing."""
    found = item_features[:0] if real is None else np.asarray(real, dtype=np.float32)[:INDEX_QUERIES]
    missing = min(INDEX_QUERIES - len(found), len(item_features))
    spread = np.linspace(0, len(item_features) - 1, missing).astype(int)
    return np.concatenate([found, item_features[spread]])


def _write_parts(
    working: Path, head: Head, index: VectorIndex, catalogue: Sequence[Item], calibrator: Mapping[str, Any],
    golden_features: Features,
) -> None:  # fmt: skip
    save_head(head, working / HEAD)
    index.save(working / EMBEDDINGS)
    write_catalogue(working / CATALOGUE, catalogue)
    (working / CALIBRATOR).write_text(json.dumps(calibrator, sort_keys=True, allow_nan=False) + "\n")
    golden = GoldenQueries.record(
        golden_features, lambda features, k: index.search(head.embed_queries(features), k), index.ntotal
    )
    golden.save(working / GOLDEN)


def _publish(working: Path, target: Path, names: Sequence[str]) -> Path:
    """Flush, protect and rename. The rename is the moment the release exists."""
    for name in names:
        with (working / name).open("rb") as file:
            os.fsync(file.fileno())
        (working / name).chmod(0o444)
    fsync_directory(working)
    working.chmod(0o755)
    failpoint("releases.before_rename")
    try:
        working.rename(target)
    except OSError as error:
        if target.exists():
            raise ReleaseNotEligible(f"release {target.name} exists already", release_id=target.name) from error
        raise
    fsync_directory(target.parent)
    return target
