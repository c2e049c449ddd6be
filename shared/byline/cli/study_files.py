"""The studies' data from files: corpus, label snapshot, and features kept beside those of the services.

Why it exists: a study must run on a fresh checkout without a server, and the method packages read no snapshots.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from byline.config import Settings
from byline.diffusion.model import DiffusionModel
from byline.errors import LabelsNotUsable
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.study_data import FloatArray, Progress, StudyData
from byline.features.extractor import FeatureExtractor, load_extractor
from byline.features.store import FeatureStore, fill_store
from byline.ranker.labelled_set import dense_tau
from byline.rankings.features import query_key
from byline.rankings.labelled import half_error, halves_are_disjoint
from byline.rankings.snapshot import SnapshotQuery, read_snapshot
from byline.teachers.ranking import TeacherQuery


def load_data(
    settings: Settings, model: DiffusionModel, encoders: Sequence[str], progress: Progress, *,
    items: int = 0, queries: int = 0,
) -> StudyData:  # fmt: skip
    """Corpus, label snapshot and features. The first ``items`` and ``queries`` of each split alone; 0: all.

    LabelsNotUsable when a file is missing or the labels are not of this corpus.
    """
    corpus = read_corpus(settings.corpus_source)[: items or None]
    header, labelled = read_snapshot(settings.labels_dir)
    kept = _some_of_each(labelled, queries)
    ids = np.asarray([item.item_id for item in corpus], dtype=np.int64)
    halves = [[q.tau if q.tau_halves is None else q.tau_halves[half] for q in kept] for half in (0, 1)]
    tau = np.stack([dense_tau(ids, [q.item_ids for q in kept], values) for values in halves])
    error = dense_tau(ids, [q.item_ids for q in kept], [half_error(q) for q in kept])
    if np.isnan(tau).any():
        raise LabelsNotUsable("the studies need rankings of the whole corpus, such as the shipped snapshot's")
    asked = [TeacherQuery(Image.open(io.BytesIO(q.image)).convert("RGB"), q.prompt) for q in kept]
    keys = [query_key(hashlib.sha256(q.image).hexdigest(), q.prompt) for q in kept]
    item_parts, query_parts, hashes = [], [], []
    # One store an encoder, so that one more encoder does not mean encoding all of them again.
    for name in encoders:
        extractor = load_extractor(name, device=settings.device, model=model, cache=settings.cache_dir)
        hashes.append(extractor.preprocessing_hash)
        item_parts.append(_encoded(settings.cache_dir, extractor, header.corpus_id, "items", ids.tolist(),
                                   [(i.image, i.caption) for i in corpus], progress))  # fmt: skip
        query_parts.append(_encoded(settings.cache_dir, extractor, header.corpus_id, "queries", keys,
                                    [(q.image, q.prompt) for q in asked], progress))  # fmt: skip
    item_rows, query_rows = np.concatenate(item_parts, axis=1), np.concatenate(query_parts, axis=1)
    digest = hashlib.sha256(f"{header.teacher_id}{hashes}{model.revision}".encode())
    for part in (ids, tau, error, item_rows, query_rows):
        digest.update(np.ascontiguousarray(part).tobytes())
    return StudyData(
        corpus, asked, tuple(q.split for q in kept),
        tuple((name, part.shape[1]) for name, part in zip(encoders, item_parts, strict=True)), item_rows, query_rows,
        tau, header.teacher_id, digest.hexdigest()[:16],
        halves_are_disjoint(kept, header.teacher_id), error,
    )  # fmt: skip


def _some_of_each(labelled: Sequence[SnapshotQuery], count: int) -> list[SnapshotQuery]:
    """The first ``count`` queries of each split, in file order; all of them for 0."""
    seen: dict[str, int] = {}
    kept = []
    for query in labelled:
        seen[query.split] = seen.get(query.split, 0) + 1
        if not count or seen[query.split] <= count:
            kept.append(query)
    return kept


def _encoded(
    cache: Path, extractor: FeatureExtractor, corpus_id: str, kind: str, keys: Sequence[int],
    pairs: Sequence[tuple[Image.Image, str]], progress: Progress,
) -> FloatArray:  # fmt: skip
    """Features [n, d] of one encoder from its store below ``cache``, filled where rows are missing."""
    folder = cache / "features" / corpus_id / extractor.preprocessing_hash / kind
    store = FeatureStore(folder, extractor.spec, corpus_id)
    pair_of = dict(zip(keys, pairs, strict=True))
    fill_store(store, extractor, list(pair_of), pair_of.__getitem__,
               lambda done, total: progress(f"features of {kind}", done, total))
    return store.matrix(keys)
