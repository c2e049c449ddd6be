"""Pictures and candidates for planned queries, from the generator and the corpus's raw features.

Why it exists: this is the only part of curation that needs torch; the loop and the planning do not.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byline.catalog.decode import encode_png
from byline.catalog.store import CatalogStore
from byline.diffusion.model import DiffusionModel
from byline.features.extractor import FeatureExtractor
from byline.features.registry import GRADIENT
from byline.rankings.features import LabelFeatures
from byline.teachers.ranking import ignore_progress
from services.curation.plan import PlannedQuery, choose_candidates


class Generator:
    """Samples from the model, as lossless PNG: what a client would submit."""

    def __init__(self, model: DiffusionModel, steps: int, guidance: float) -> None:
        self._model = model
        self._steps = steps
        self._guidance = guidance

    def __call__(self, planned: PlannedQuery) -> bytes:
        """PNG bytes of one sample; the same plan gives the same picture."""
        [picture] = self._model.generate([planned.prompt], [planned.seed], steps=self._steps, guidance=self._guidance)
        return encode_png(picture)


class Prefilter:
    """The nearest items by raw features, and a random share from outside them."""

    def __init__(
        self,
        catalog: CatalogStore,
        features: LabelFeatures,
        extractor: FeatureExtractor,
        corpus_id: str,
        *,
        count: int,
        explore_share: float,
    ) -> None:
        self._catalog = catalog
        self._features = features
        self._extractor = extractor
        self._corpus_id = corpus_id
        self._count = count
        self._explore_share = explore_share

    def __call__(self, planned: PlannedQuery, picture: bytes) -> NDArray[np.int64]:
        """Ids to rank, ascending. Items that were withdrawn are not among them."""
        items = self._catalog.items(self._corpus_id)
        ids = np.array([item.item_id for item in items], dtype=np.int64)
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        return choose_candidates(
            self._extractor.extract([image], [planned.prompt])[0],
            ids,
            self._features.of_items(items, ignore_progress),
            count=self._count,
            explore_share=self._explore_share,
            seed=planned.seed,
            direct=self._extractor.spec.columns(GRADIENT),
        )
