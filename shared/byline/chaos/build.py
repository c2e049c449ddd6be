"""The tiny world a chaos run attacks: a corpus of some tens of pictures, a random model, two releases of it.

Why it exists: faults are about processes and rows, not about the quality of answers, so everything is as small as the
real builders allow. The two releases hold *different* items (each lacks some of the other's): an answer that mixes both
is then seen in its items. Those items are moved to another corpus, or else the releases' deltas would soon hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, text

from byline.catalog.blobs import BlobStore
from byline.catalog.ingest import ingest
from byline.catalog.store import CatalogStore, ModelRecord
from byline.evaluation.bench_lookup import synthetic_features
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry

MODEL_ID = CORPUS_ID = "chaos"
APART_CORPUS_ID = "chaos-apart"
#: One encoder: a worker that was killed is back in seconds.
FEATURES = "efficientnet_lite0"
ITEMS = 48
#: Items that only one of the two releases holds.
APART = 8
QUERIES = 64


@dataclass(frozen=True)
class TinyWorld:
    """What may be asked: pictures with prompts, and query embeddings [q, d] of each release."""

    pictures: tuple[tuple[bytes, str], ...]
    embeddings: Mapping[str, NDArray[np.float32]]
    release_items: Mapping[str, frozenset[int]]


def build_world(root: Path, engine: Engine, blobs: BlobStore, corpus: Path, seed: int) -> TinyWorld:
    """Ingest the first pictures of ``corpus`` (parquet), write the model, publish both releases, activate the first.

    Only the first release has sketches (tier ESTIMATED). Needs an empty, migrated database.
    """
    import torch

    from byline.catalog.decode import decode_image
    from byline.diffusion.model import DiffusionModel
    from byline.diffusion.tiny import write_tiny_pipeline
    from byline.features import load_extractor
    from byline.ranker.head import Head, HeadConfig, feature_blocks
    from byline.releases.builder import build_release
    from byline.teachers import TeacherItem
    from byline.teachers.first_order import AbuPlusLinear
    from byline.teachers.natural_gradient import UnlearningSettings
    from byline.teachers.registry import ensure_curvature
    from byline.teachers.sketch_fit import fit_sketches

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    ingest(engine, blobs, _some_of(corpus, root / "items.parquet"), CORPUS_ID)
    model = DiffusionModel.load(write_tiny_pipeline(root / "model"))
    catalog = CatalogStore(engine)
    catalog.add_model(ModelRecord(MODEL_ID, CORPUS_ID, root / "model", model.revision))
    items = catalog.items(CORPUS_ID)
    extractor = load_extractor(FEATURES, model=model)
    data = [blobs.get(item.image_sha256) for item in items]
    images = [decode_image(each) for each in data]
    features = extractor.extract(images, [item.caption for item in items])
    pairs = [TeacherItem(item.item_id, image, item.caption) for item, image in zip(items, images, strict=True)]
    curvature = ensure_curvature(model, pairs, root / "model" / "curvature", samples=128)
    wanted = UnlearningSettings(corpus_size=len(pairs), item_draws=16, noise="shared")
    parts = {"r1": slice(0, len(items) - APART), "r2": slice(APART, len(items))}
    fitted = fit_sketches(
        AbuPlusLinear(model, curvature, wanted), pairs[parts["r1"]], dimensions=16, store=root / "fit"
    )
    fitted.save(root / "model" / "sketches")
    asked = synthetic_features(features, QUERIES, rng)
    registry = ReleaseRegistry(engine)
    embeddings: dict[str, NDArray[np.float32]] = {}
    for number, (release_id, part) in enumerate(parts.items(), start=1):
        head = Head(HeadConfig(extractor.dim, feature_blocks(extractor.spec.encoders, extractor.dims), (32,), 16, 0.0))
        head.initialise(features, features, torch.Generator().manual_seed(seed + number))
        directory = build_release(
            root / "releases", release_id=release_id, model_id=MODEL_ID, model_revision=model.revision,
            corpus_id=CORPUS_ID, head=head, feature_spec=extractor.spec.name,
            preprocessing_hash=extractor.preprocessing_hash,
            item_ids=np.array([item.item_id for item in items[part]], dtype=np.int64), item_features=features[part],
            catalogue=items[part], calibrator={}, metrics={"map": 0.1}, parent="r1" if number == 2 else None,
            labels={"queries": 0, "digest": ""}, teacher_id="none", golden_features=features[:2],
            created_at=datetime.now(UTC), git_sha="",  # young: the trainer's garbage collection must leave it
            sketches=_sketches(fitted) if number == 1 else None,
        )  # fmt: skip
        registry.register(ReleaseManifest.read(directory), directory)
        embeddings[release_id] = head.embed_queries(asked)
    catalog.add_corpus(APART_CORPUS_ID)
    apart = [item.item_id for item in (*items[:APART], *items[len(items) - APART :])]
    with engine.begin() as connection:
        moved = text("UPDATE items SET corpus_id = :corpus WHERE item_id = ANY(:ids)")
        connection.execute(moved, {"corpus": APART_CORPUS_ID, "ids": apart})
    registry.activate(MODEL_ID, "r1")
    return TinyWorld(
        tuple((each, item.caption) for each, item in zip(data, items, strict=True)), embeddings,
        {name: frozenset(item.item_id for item in items[part]) for name, part in parts.items()},
    )  # fmt: skip


def _some_of(corpus: Path, path: Path) -> Path:
    """A parquet file with ``ITEMS`` pictures of ``corpus``, from as many near-duplicate groups."""
    import pyarrow.parquet as pq

    table = pq.read_table(corpus)  # type: ignore[no-untyped-call,unused-ignore]
    first_of = {group: row for row, group in reversed(list(enumerate(table["near_duplicate_group"].to_pylist())))}
    rows = sorted(first_of.values())
    pq.write_table(table.take(rows[:: max(1, len(rows) // ITEMS)][:ITEMS]), path)  # type: ignore[no-untyped-call,unused-ignore]
    return path


def _sketches(fitted: Any) -> Any:
    from byline.releases.sketches import SketchParts, section_of

    section = section_of(
        teacher_id=fitted.teacher_id, dimensions=fitted.basis.dimensions, selection=fitted.basis.selection,
        query_draws=fitted.basis.settings.query_draws, fidelity=fitted.fidelity, token_rank=fitted.tokens.basis.rank,
    )  # fmt: skip
    return SketchParts(fitted.item_ids, fitted.sketches, fitted.basis, section, fitted.tokens)
