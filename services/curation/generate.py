"""Pictures and candidates for planned queries, from the generator and the corpus's raw features.

Why it exists: this is the only part of curation that needs torch; the loop and the planning do not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byline.catalog.decode import encode_png
from byline.catalog.store import CatalogStore
from byline.diffusion.model import DiffusionModel
from byline.features.encoder import Encoder
from byline.features.extractor import FeatureExtractor
from byline.features.registry import GRADIENT, load_encoder
from byline.features.spec import SEPARATOR, FeatureSpec
from byline.features.store import FeatureStore
from byline.rankings.features import LabelFeatures, query_key
from byline.teachers.ranking import ignore_progress
from services.curation.head import Heads
from services.curation.plan import PlannedQuery
from services.curation.shortlist import Shortlist, choose_shortlist

#: Encoders of prompts alone; the first is the one whose weights are always installed.
TEXT_ENCODERS = ("minilm", "clip_text")
#: Prompts encoded between two writes: what a killed service loses.
_AT_ONCE = 512


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


def text_encoder(spec: str, device: str) -> Encoder:
    """The text encoder of a feature spec, or the built-in one."""
    named = [name for name in spec.split(SEPARATOR) if name in TEXT_ENCODERS]
    return load_encoder((named or [TEXT_ENCODERS[0]])[0], device=device)


class PromptRows:
    """Unit feature rows of prompts, on disk under a digest of the prompt.

    The planner looks at all captions and all queries again and again: each is encoded once in all, and none is held in
    memory between two calls.
    """

    def __init__(self, encoder: Encoder, directory: Path, corpus_id: str) -> None:
        self._encoder = encoder
        spec = FeatureSpec((encoder.name,), (encoder.dim,), (encoder.preprocessing_hash,))
        self._store = FeatureStore(directory / corpus_id / spec.preprocessing_hash / "prompts", spec, corpus_id)

    @property
    def encoder(self) -> str:
        """Name and preprocessing hash: rows of two encoders cannot be compared."""
        return f"{self._encoder.name}/{self._encoder.preprocessing_hash}"

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """[n, d] in the order of ``prompts``, of which there must be at least one."""
        keys = [query_key("", prompt) for prompt in prompts]
        lacking = set(self._store.missing(keys))
        missing = list({key: prompt for key, prompt in zip(keys, prompts, strict=True) if key in lacking}.items())
        missing.sort(key=lambda one: len(one[1]))  # equally long ones share a batch, which then holds little padding
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            rows = np.asarray(self._encoder.encode([], [prompt for _, prompt in part]), dtype=np.float32)
            self._store.append([key for key, _ in part], rows)
        rows = self._store.matrix(keys)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9
        return rows


class Prefilter:
    """The nearest items by raw features and by the head that answers now, and a random share from outside them."""

    def __init__(
        self,
        catalog: CatalogStore,
        features: LabelFeatures,
        extractor: FeatureExtractor,
        corpus_id: str,
        *,
        count: int,
        explore_share: float,
        heads: Heads | None = None,
    ) -> None:
        self._catalog = catalog
        self._features = features
        self._extractor = extractor
        self._corpus_id = corpus_id
        self._count = count
        self._explore_share = explore_share
        self._heads = heads

    def __call__(self, planned: PlannedQuery, picture: bytes) -> Shortlist:
        """Items to rank, and where they came from. Neither withdrawn items are among them, nor such whose image is
        lost or broken."""
        items = self._features.readable(self._catalog.items(self._corpus_id), ignore_progress)
        ids = np.array([item.item_id for item in items], dtype=np.int64)
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        query = self._extractor.extract([image], [planned.prompt])[0]
        rows = self._features.of_items(items, ignore_progress)
        head = None if self._heads is None else self._heads.active()
        return choose_shortlist(
            query,
            ids,
            rows,
            count=self._count,
            explore_share=self._explore_share,
            seed=planned.seed % (1 << 63),
            direct=self._extractor.spec.columns(GRADIENT),
            head_scores=None if head is None else head.scores(query, ids, rows),
            release_id=None if head is None else head.release_id,
        )
