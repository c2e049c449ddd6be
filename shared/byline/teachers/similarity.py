"""Similarity baselines: how near an item is to the query for a frozen encoder, or in its pixels.

Why it exists: a teacher that predicts retraining no better than a raw feature is not worth its price, so every
raw feature answers the same protocol and is judged by the same commands.

tau = the cosine of the two features, higher = more similar, no unit of loss. There is no noise: the standard error
is 0, both halves equal tau, and a score rests on 0 loss evaluations. Encoders of text compare the query's prompt
with the item's caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.features.encoder import Features, identity_hash
from byline.features.registry import load_encoder
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    ScoresManyAtOnce,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
)

PIXELS = "pixels"
#: Items encoded between two calls of ``check``.
_CHUNK = 64


class _Encoding(Protocol):
    """The part of ``features.Encoder`` this module needs."""

    @property
    def preprocessing_hash(self) -> str: ...

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features: ...


class CentredThumbnails:
    """Pixels at the model's resolution, minus the picture's own mean: cosine is then the correlation of pixels."""

    def __init__(self, side: int) -> None:
        """``side``: width and height in pixels."""
        self._side = side
        self.preprocessing_hash = identity_hash(name=PIXELS, side=side)

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """[n, 3 * side * side]; a picture of one colour has no direction and is all zeros."""
        size = (self._side, self._side)
        rows = [np.asarray(i.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.float32) for i in images]
        flat = np.stack(rows).reshape(len(rows), -1) if rows else np.empty((0, 3 * self._side**2), np.float32)
        centred: Features = flat - flat.mean(axis=1, keepdims=True)
        return centred


class SimilarityTeacher(ScoresManyAtOnce):
    """Cosine of one encoder's features. Keeps the unit features of the items it has seen."""

    def __init__(self, encoder: str, model: DiffusionModel) -> None:
        """``encoder``: a name of ``features.registry``, or ``pixels``. Raises ModelNotUsable without its weights."""
        self._encoder: _Encoding = (
            CentredThumbnails(model.image_side)
            if encoder == PIXELS
            else load_encoder(encoder, device=model.device, model=model)
        )
        # Encoders other than ``denoiser`` do not depend on the model, but rankings belong to one: its revision is in.
        self._id = f"similarity:{encoder}/{self._encoder.preprocessing_hash}/{model.revision}"
        self._seen: dict[int, NDArray[np.float32]] = {}

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``."""
        return self._id

    def fit(
        self, corpus: Sequence[TeacherItem], *, progress: Progress = ignore_progress, check: Check = never_cancelled
    ) -> None:
        """Encode the corpus; kept in memory, seconds to minutes."""
        self._features(corpus, progress, check)

    def score_many(
        self, queries: Sequence[TeacherQuery], candidates: Sequence[TeacherItem], *, candidate_set: str = "given",
        progress: Progress = ignore_progress, check: Check = never_cancelled,
    ) -> list[Ranking]:  # fmt: skip
        """Cosine of every candidate with every query."""
        asked = _unit(self._encoder.encode([q.image for q in queries], [q.prompt for q in queries]))
        items = self._features(candidates, progress, check)  # [n, d]
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        rankings = []
        for row in asked:
            # In float64, so that after rounding a score does not depend on how many others the product made.
            tau = items.astype(np.float64) @ row.astype(np.float64)
            rankings.append(summarise(np.stack([tau, tau]), ids, 0, self.teacher_id, candidate_set))
        return rankings

    def _features(
        self, items: Sequence[TeacherItem], progress: Progress, check: Check
    ) -> NDArray[np.float32]:
        """Unit features [n, d]. A caption belongs to its item id, as everywhere in a corpus."""
        missing = [item for item in items if item.item_id not in self._seen]
        for start in range(0, len(missing), _CHUNK):
            check()
            part = missing[start : start + _CHUNK]
            rows = _unit(self._encoder.encode([i.image for i in part], [i.caption for i in part]))
            self._seen.update({item.item_id: row for item, row in zip(part, rows, strict=True)})
            progress(min(start + _CHUNK, len(missing)), len(missing))
        return np.stack([self._seen[i.item_id] for i in items]) if items else np.empty((0, 0), np.float32)


def _unit(rows: Features) -> NDArray[np.float32]:
    """Rows at unit norm; a zero row stays zero. One row at a time, so that none depends on the others."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: NDArray[np.float32] = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
    return unit
