"""Features of labelled queries and of the items they are ranked over, computed once and kept on disk.

Why it exists: a refresh happens every few rankings, but an image's features never change. Items are kept under their
id; a query, which has none that fits, under 63 bits of the digest of its image and prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.items import ITEM_ID_MASK, Item
from byline.features.extractor import FeatureExtractor
from byline.features.store import FeatureStore, fill_store

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class Asked(Protocol):
    """What features need of a query; ``byline.rankings.store.LabelledQuery`` is one."""

    @property
    def image_sha256(self) -> str:
        """Digest under which the blobs keep the picture."""
        ...

    @property
    def prompt(self) -> str:
        """What it was generated from."""
        ...


class LabelFeatures:
    """Feature rows under one extractor's spec, cached below ``cache_dir``."""

    def __init__(self, extractor: FeatureExtractor, blobs: BlobStore, cache_dir: Path, corpus_id: str) -> None:
        self._extractor = extractor
        self._blobs = blobs
        folder = cache_dir / "features" / corpus_id / extractor.preprocessing_hash
        self._items = FeatureStore(folder / "items", extractor.spec, corpus_id)
        self._queries = FeatureStore(folder / "queries", extractor.spec, corpus_id)

    @property
    def spec(self) -> str:
        """Name of the FeatureSpec."""
        return self._extractor.spec.name

    @property
    def preprocessing_hash(self) -> str:
        """Hash of what is done to an image or text before encoding."""
        return self._extractor.preprocessing_hash

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """(encoder, width) in the order of the columns."""
        return tuple(zip(self._extractor.spec.encoders, self._extractor.dims, strict=True))

    def of_items(self, items: Sequence[Item], progress: Progress) -> FloatArray:
        """[n, in] in the order of ``items``; image and caption of those not yet known are encoded."""
        pairs = {item.item_id: (item.image_sha256, item.caption) for item in items}
        return self._rows(self._items, [item.item_id for item in items], pairs, progress)

    def encode_items(self, items: Sequence[Item]) -> FloatArray:
        """As ``of_items`` for a few new items, without waiting for a process that encodes a whole corpus just now."""
        lacking = set(self._items.missing([item.item_id for item in items]))
        fresh = [item for item in items if item.item_id in lacking]
        if fresh:
            images = [decode_image(self._blobs.get(item.image_sha256)) for item in fresh]
            rows = self._extractor.extract(images, [item.caption for item in fresh])
            self._items.append([item.item_id for item in fresh], rows)
        return self._items.matrix([item.item_id for item in items])

    def of_queries(self, rankings: Sequence[Asked], progress: Progress) -> FloatArray:
        """[q, in] in the order of ``rankings``; a query that was ranked twice is encoded once."""
        keys = [query_key(ranking.image_sha256, ranking.prompt) for ranking in rankings]
        pairs = {key: (ranking.image_sha256, ranking.prompt) for key, ranking in zip(keys, rankings, strict=True)}
        return self._rows(self._queries, keys, pairs, progress)

    def _rows(self, store: FeatureStore, ids: Sequence[int], pairs: Mapping[int, tuple[str, str]],
              progress: Progress) -> FloatArray:
        def pair_of(row_id: int) -> tuple[Image.Image, str]:
            sha256, text = pairs[row_id]
            return decode_image(self._blobs.get(sha256)), text

        fill_store(store, self._extractor, list(pairs), pair_of, progress)
        return store.matrix(ids)


def query_key(image_sha256: str, prompt: str) -> int:
    """A 63-bit key of a query's image and prompt."""
    digest = hashlib.sha256(f"{image_sha256}\x00{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & ITEM_ID_MASK
