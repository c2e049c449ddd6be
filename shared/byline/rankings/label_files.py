"""Labels, corpus and features straight from files, as the matrices a head is trained on and judged by.

Why it exists: benchmarks, studies and ``byline evaluate head --labels`` must run on a fresh checkout without Postgres,
Redis or a service. The rules of honest evaluation (which half of the noise teaches, which one judges, which queries
judge at all) are those of ``labelled.py``; features are cached where the services keep theirs, under the same keys.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.errors import LabelsNotUsable
from byline.features.extractor import FeatureExtractor, load_extractor
from byline.features.registry import needs_model
from byline.features.store import FeatureStore, fill_store
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.features import query_key
from byline.rankings.labelled import JUDGE, LEARN, halves_are_disjoint, judging_queries, labelled_set
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, read_snapshot

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
#: Called with (what is encoded, done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FileLabels:
    """All labelled queries of a snapshot and the corpus they are ranked over.

    ``item_features`` [n, in] and ``captions``, ``creators`` in the order of ``item_ids`` [n] (the corpus file's);
    ``query_features`` [q, in] in the order of ``queries``; ``blocks`` (encoder, width) in the order of the columns.
    """

    header: SnapshotHeader
    feature_spec: str
    preprocessing_hash: str
    blocks: tuple[tuple[str, int], ...]
    item_ids: IntArray
    item_features: FloatArray
    captions: tuple[str, ...]
    creators: tuple[str, ...]
    queries: tuple[SnapshotQuery, ...]
    query_features: FloatArray

    def of(self, split: str, cutoff: int = 0) -> tuple[SnapshotQuery, ...]:
        """The queries of a split; with ``cutoff`` only those whose mAP(``cutoff``) means the same."""
        found = [query for query in self.queries if query.split == split]
        return judging_queries(found, cutoff) if cutoff else tuple(found)

    def labelled(self, split: str, half: int | None = None, cutoff: int = 0) -> LabelledSet:
        """A split as a matrix: training queries from the half to learn from, all others from the half that judges.

        ``half`` overrides that (the ceiling needs the other one). LabelsNotUsable for a split without queries.
        """
        wanted = self.of(split, cutoff)
        if not wanted:
            raise LabelsNotUsable(f"the label file has no queries of split {split!r}; known: "
                                  f"{', '.join(sorted({query.split for query in self.queries}))}")
        at = {id(query): row for row, query in enumerate(self.queries)}
        rows = self.query_features[[at[id(query)] for query in wanted]]
        chosen = (LEARN if split == "train" else JUDGE) if half is None else half
        return labelled_set(wanted, rows, self.item_ids, self.item_features, chosen)

    def disjoint(self, split: str) -> bool:
        """Whether the two halves of every query of the split rest on different noise."""
        return halves_are_disjoint(self.of(split), self.header.teacher_id)


def read_label_files(labels: Path, corpus: Path, model_directory: Path, feature_spec: str, cache: Path,
                     device: str = "cpu", progress: Progress = lambda what, done, total: None) -> FileLabels:
    """Read a snapshot and its corpus; encode what the cache lacks.

    Raises LabelsNotUsable for unreadable files, or for features of the generator (``denoiser``) when the labels are
    of another revision of it.
    """
    header, queries = read_snapshot(labels)
    rows = _corpus_rows(corpus)
    model = DiffusionModel.load(model_directory, device) if needs_model(feature_spec) else None
    if model is not None and model.revision != header.model_revision:
        raise LabelsNotUsable(f"the labels in {labels} are of model revision {header.model_revision}, "
                              f"{model_directory} is {model.revision}; name the model they were made with")
    extractor = load_extractor(feature_spec, device=device, model=model, cache=cache)
    folder = cache / "features" / header.corpus_id / extractor.preprocessing_hash
    ids = [int(row["item_id"]) for row in rows]
    pairs = {int(row["item_id"]): (row["image"], row["caption"]) for row in rows}
    items = _encoded(FeatureStore(folder / "items", extractor.spec, header.corpus_id), extractor, ids, pairs,
                     lambda done, total: progress("items", done, total))
    keys = [query_key(hashlib.sha256(query.image).hexdigest(), query.prompt) for query in queries]
    asked = {key: (query.image, query.prompt) for key, query in zip(keys, queries, strict=True)}
    known = _encoded(FeatureStore(folder / "queries", extractor.spec, header.corpus_id), extractor, keys, asked,
                     lambda done, total: progress("queries", done, total))
    return FileLabels(
        header, extractor.spec.name, extractor.preprocessing_hash,
        tuple(zip(extractor.spec.encoders, extractor.dims, strict=True)), np.asarray(ids, dtype=np.int64), items,
        tuple(row["caption"] for row in rows), tuple(row.get("creator") or "" for row in rows), tuple(queries), known,
    )


def _corpus_rows(parquet: Path) -> list[dict[str, Any]]:
    try:
        present = pq.read_schema(parquet).names
        columns = [name for name in ("item_id", "caption", "image", "creator") if name in present]
        rows: list[dict[str, Any]] = pq.read_table(parquet, columns=columns).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise LabelsNotUsable(f"{parquet} is no corpus file: {error}") from error
    if not {"item_id", "caption", "image"} <= set(columns):
        raise LabelsNotUsable(f"{parquet} is no corpus file: it lacks one of item_id, caption and image")
    return rows


def _encoded(store: FeatureStore, extractor: FeatureExtractor, ids: list[int], pairs: Mapping[int, tuple[bytes, str]],
             progress: Callable[[int, int], None]) -> FloatArray:
    def pair_of(row_id: int) -> tuple[Image.Image, str]:
        image, text = pairs[row_id]
        return Image.open(io.BytesIO(image)).convert("RGB"), text

    fill_store(store, extractor, list(dict.fromkeys(ids)), pair_of, progress)
    return np.asarray(store.matrix(ids), dtype=np.float32)
