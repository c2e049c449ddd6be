"""What every study works on: a corpus, its labelled queries, features of both and the teacher's two noise halves.

Why it exists: six studies that each read files, split queries or choose noise halves by themselves could not be
compared. Everything is read from what ships with the repository, no server; features are encoded once and kept.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from byline.config import Settings
from byline.diffusion.model import DiffusionModel
from byline.errors import LabelsNotUsable
from byline.evaluation.corpus_file import read_corpus
from byline.features.extractor import FeatureExtractor, load_extractor
from byline.features.store import FeatureStore, fill_store
from byline.ranker.labelled_set import LabelledSet, dense_tau
from byline.rankings.features import query_key
from byline.rankings.snapshot import SnapshotQuery, read_snapshot
from byline.teachers.ranking import TeacherItem, TeacherQuery

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StudyData:
    """``item_features`` [n, d] and ``query_features`` [q, d] of the encoders in ``blocks`` (name, width), in order;
    ``tau`` [2, q, n], the teacher's two halves of disjoint noise; ``splits`` [q]; ``digest`` of all of it."""

    items: Sequence[TeacherItem]
    queries: Sequence[TeacherQuery]
    splits: tuple[str, ...]
    blocks: tuple[tuple[str, int], ...]
    item_features: FloatArray
    query_features: FloatArray
    tau: FloatArray
    teacher_id: str
    digest: str
    disjoint: bool

    @cached_property
    def item_ids(self) -> IntArray:
        """[n]."""
        return np.asarray([item.item_id for item in self.items], dtype=np.int64)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names, in the order of the columns."""
        return tuple(name for name, _ in self.blocks)

    def rows(self, split: str) -> IntArray:
        """Places of a split's queries. LabelsNotUsable when it has none."""
        found = np.flatnonzero(np.asarray(self.splits) == split).astype(np.int64)
        if not len(found):
            raise LabelsNotUsable(f"the labels have no {split} queries; a study needs train, validation and test")
        return found

    def blocks_of(self, encoders: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """(name, width) of some encoders, in the order given. LabelsNotUsable for one that was not encoded."""
        widths = dict(self.blocks)
        if missing := [name for name in encoders if name not in widths]:
            raise LabelsNotUsable(f"no features of {', '.join(missing)}; there are {', '.join(widths)}")
        return tuple((name, widths[name]) for name in encoders)

    def columns(self, encoders: Sequence[str]) -> IntArray:
        """Columns of some encoders, in the order given."""
        starts = dict(zip(self.encoders, np.cumsum([0, *(w for _, w in self.blocks)])[:-1], strict=True))
        return np.concatenate([np.arange(starts[n], starts[n] + w) for n, w in self.blocks_of(encoders)])

    def labelled(
        self, rows: IntArray, half: int, encoders: Sequence[str] = (), *, tau: FloatArray | None = None,
        items: IntArray | None = None,
    ) -> LabelledSet:  # fmt: skip
        """Queries at ``rows`` with one noise half, over some encoders (default all) and items (default all).

        ``tau`` [len(rows), items] replaces the snapshot's.
        """
        columns = self.columns(encoders or self.encoders)
        places = np.arange(len(self.items)) if items is None else items
        found = self.tau[half][np.ix_(rows, places)] if tau is None else tau
        return LabelledSet(
            np.ascontiguousarray(self.query_features[np.ix_(rows, columns)]), self.item_ids[places],
            np.ascontiguousarray(self.item_features[np.ix_(places, columns)]), found,
        )  # fmt: skip


def load_data(
    settings: Settings, model: DiffusionModel, encoders: Sequence[str], cache: Path, progress: Progress, *,
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
    if np.isnan(tau).any():
        raise LabelsNotUsable("the studies need rankings of the whole corpus, such as the shipped snapshot's")
    extractor = load_extractor("+".join(encoders), device=settings.device, model=model)
    asked = [TeacherQuery(Image.open(io.BytesIO(q.image)).convert("RGB"), q.prompt) for q in kept]
    keys = [query_key(hashlib.sha256(q.image).hexdigest(), q.prompt) for q in kept]
    item_rows = _encoded(cache, extractor, settings.corpus_id, "items", ids.tolist(),
                         [(i.image, i.caption) for i in corpus], progress)
    query_rows = _encoded(cache, extractor, settings.corpus_id, "queries", keys,
                          [(q.image, q.prompt) for q in asked], progress)
    digest = hashlib.sha256(f"{header.teacher_id}{extractor.preprocessing_hash}{model.revision}".encode())
    for part in (ids, tau, item_rows, query_rows):
        digest.update(np.ascontiguousarray(part).tobytes())
    return StudyData(
        corpus, asked, tuple(q.split for q in kept), tuple(zip(encoders, extractor.dims, strict=True)),
        item_rows, query_rows, tau, header.teacher_id, digest.hexdigest()[:16],
        all(q.tau_halves is not None for q in kept),
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
    """Features [n, d] from the store below ``cache`` (the one the trainer keeps), filled where rows are missing."""
    folder = cache / "features" / corpus_id / extractor.preprocessing_hash / kind
    store = FeatureStore(folder, extractor.spec, corpus_id)
    pair_of = dict(zip(keys, pairs, strict=True))
    fill_store(store, extractor, list(pair_of), pair_of.__getitem__,
               lambda done, total: progress(f"features of {kind}", done, total))
    return store.matrix(keys)
