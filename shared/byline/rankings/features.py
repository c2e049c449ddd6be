"""Features of labelled queries and of the items they are ranked over, computed once and kept on disk.

Why it exists: a refresh happens every few rankings, but an image's features never change. Items are kept under their
id; a query, which has none that fits, under 63 bits of the digest of its image and prompt. One image that was lost, or
cannot be decoded, is left out and named: it must not keep all the others from being learnt from.
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
from byline.errors import BlobNotFound, InvalidRequest
from byline.features.extractor import FeatureExtractor
from byline.features.store import FeatureStore, fill_store
from byline.telemetry import get_logger

log = get_logger(__name__)

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
        self._told: set[str] = set()

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
        """[n, in] in the order of ``items``; image and caption of those not yet known are encoded.

        Raises BlobNotFound and InvalidRequest for an image that is lost or broken; see ``lost_items``.
        """
        return self._rows(self._items, [item.item_id for item in items], _pairs_of_items(items), progress)

    def lost_items(self, items: Sequence[Item], progress: Progress) -> dict[int, str]:
        """Which of the items have no features and no image to make them of, by id, and why; the others are encoded."""
        return self._fill(self._items, _pairs_of_items(items), progress)

    def lost_queries(self, rankings: Sequence[Asked], progress: Progress) -> dict[int, str]:
        """The same of queries, by their place in ``rankings``."""
        keys = [query_key(ranking.image_sha256, ranking.prompt) for ranking in rankings]
        lost = self._fill(self._queries, _pairs_of_queries(rankings), progress)
        return {place: lost[key] for place, key in enumerate(keys) if key in lost}

    def lost_images(self, rankings: Sequence[Asked]) -> dict[int, str]:
        """Those of the queries whose image is lost although features of it may be kept, by their place, and why."""
        found = {place: self._image(one.image_sha256) for place, one in enumerate(rankings)}
        return {place: image for place, image in found.items() if isinstance(image, str)}

    def readable(self, items: Sequence[Item], progress: Progress) -> list[Item]:
        """The items without the lost ones."""
        lost = self.lost_items(items, progress)
        return [item for item in items if item.item_id not in lost]

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
        return self._rows(self._queries, keys, _pairs_of_queries(rankings), progress)

    def _rows(self, store: FeatureStore, ids: Sequence[int], pairs: Mapping[int, tuple[str, str]],
              progress: Progress) -> FloatArray:
        def pair_of(row_id: int) -> tuple[Image.Image, str]:
            sha256, text = pairs[row_id]
            return decode_image(self._blobs.get(sha256)), text

        fill_store(store, self._extractor, list(pairs), pair_of, progress)
        return store.matrix(ids)

    def _fill(self, store: FeatureStore, pairs: Mapping[int, tuple[str, str]], progress: Progress) -> dict[int, str]:
        lost: dict[int, str] = {}

        def pair_of(row_id: int) -> tuple[Image.Image, str] | None:
            image = self._image(pairs[row_id][0])
            if isinstance(image, str):
                lost[row_id] = image
                return None
            return image, pairs[row_id][1]

        fill_store(store, self._extractor, list(pairs), pair_of, progress)
        return lost

    def _image(self, sha256: str) -> Image.Image | str:
        """The picture, or why there is none: logged once."""
        try:
            return decode_image(self._blobs.get(sha256))
        except (BlobNotFound, InvalidRequest) as error:
            if sha256 not in self._told:
                self._told.add(sha256)
                log.error("image_left_out", image_sha256=sha256, reason=error.reason, error=error.message)
            return f"{error.reason}: {error.message}"


def _pairs_of_items(items: Sequence[Item]) -> dict[int, tuple[str, str]]:
    return {item.item_id: (item.image_sha256, item.caption) for item in items}


def _pairs_of_queries(rankings: Sequence[Asked]) -> dict[int, tuple[str, str]]:
    return {query_key(one.image_sha256, one.prompt): (one.image_sha256, one.prompt) for one in rankings}


def query_key(image_sha256: str, prompt: str) -> int:
    """A 63-bit key of a query's image and prompt."""
    digest = hashlib.sha256(f"{image_sha256}\x00{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & ITEM_ID_MASK
