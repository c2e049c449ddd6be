"""Evidence on queries and null queries with their features, computed once and kept on disk.

Why it exists: the trainer calibrates every release anew, but neither a query's evidence nor the null queries change
as long as model, captions and encoders do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import encode_png
from byline.diffusion.model import DiffusionModel
from byline.evaluation.null_queries import RECIPE, NullQuery, make_null_queries
from byline.features.extractor import FeatureExtractor, load_evidence
from byline.features.prompt_gain import NAME
from byline.features.store import FeatureStore, fill_store
from byline.rankings.features import Asked, LabelFeatures, query_key

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
#: Nulls of each kind: enough for 5 % to be more than one of them, few enough for a laptop.
PER_KIND = 40


@dataclass(frozen=True)
class NullRows:
    """Null queries as rows: ``kind``, ``source`` [m], ``features`` [m, in], ``evidence`` [m]."""

    kind: tuple[str, ...]
    source: tuple[str, ...]
    features: FloatArray
    evidence: FloatArray


class QueryEvidence:
    """Evidence under the attributed model; rows cached below ``cache_dir``."""

    def __init__(self, extractor: FeatureExtractor, model: DiffusionModel, blobs: BlobStore, cache_dir: Path,
                 corpus_id: str, *, per_kind: int = PER_KIND, seed: int = 0) -> None:
        self._features = extractor
        self._gain = load_evidence(NAME, model=model)
        self._model = model
        self._cache = cache_dir
        self._corpus_id = corpus_id
        self._per_kind = per_kind
        self._seed = seed
        self._queries = LabelFeatures(self._gain, blobs, cache_dir, corpus_id)

    @property
    def encoder(self) -> tuple[str, str]:
        """Name and preprocessing hash of what makes the evidence."""
        return NAME, self._gain.preprocessing_hash

    def of_queries(self, rankings: Sequence[Asked], progress: Progress) -> FloatArray:
        """[q] in the order of ``rankings``."""
        return self._queries.of_queries(rankings, progress)[:, 0]

    def nulls(self, captions: Sequence[str], progress: Progress) -> NullRows:
        """The null queries with prompts out of ``captions``; made on the first call, read from disk after it."""
        known = hashlib.sha256("\x00".join(captions).encode()).hexdigest()
        recipe = json.dumps([RECIPE, self._model.revision, self._per_kind, self._seed, known])
        listing = self._cache / "nulls" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.json"
        stores = [self._store(extractor) for extractor in (self._features, self._gain)]
        if listing.exists():
            rows = json.loads(listing.read_text())
            keys = [int(row["key"]) for row in rows]
            if not any(store.missing(keys) for store in stores):
                kinds, sources = (tuple(row[name] for row in rows) for name in ("kind", "source"))
                return NullRows(kinds, sources, stores[0].matrix(keys), stores[1].matrix(keys)[:, 0])
        made = make_null_queries(self._model, captions, per_kind=self._per_kind, seed=self._seed)
        keys = [_key(null) for null in made]
        pairs = {key: (null.image, null.prompt) for key, null in zip(keys, made, strict=True)}
        for number, (store, extractor) in enumerate(zip(stores, (self._features, self._gain), strict=True)):
            fill_store(store, extractor, list(pairs), pairs.__getitem__,
                       lambda done, total, before=number: progress(before * total + done, 2 * total))  # type: ignore[misc]
        listing.parent.mkdir(parents=True, exist_ok=True)
        partial = listing.with_suffix(".partial")
        partial.write_text(json.dumps([
            {"key": str(key), "kind": null.kind, "source": null.source} for key, null in zip(keys, made, strict=True)
        ], indent=1))  # fmt: skip
        partial.replace(listing)
        return NullRows(tuple(null.kind for null in made), tuple(null.source for null in made),
                        stores[0].matrix(keys), stores[1].matrix(keys)[:, 0])

    def _store(self, extractor: FeatureExtractor) -> FeatureStore:
        folder = self._cache / "features" / self._corpus_id / extractor.preprocessing_hash
        return FeatureStore(folder / "nulls", extractor.spec, self._corpus_id)


def _key(null: NullQuery) -> int:
    return query_key(hashlib.sha256(encode_png(null.image)).hexdigest(), null.prompt)
