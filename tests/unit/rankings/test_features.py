"""Features of labelled queries and items are computed once."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.errors import BlobNotFound
from byline.features.extractor import FeatureExtractor
from byline.features.spec import FeatureSpec
from byline.rankings.features import LabelFeatures, query_key
from byline.rankings.store import LabelledQuery


class MeanColour:
    """An encoder of three numbers that counts what it is asked for."""

    name = "mean_colour"
    dim = 3
    modality = "image"
    preprocessing_hash = "ab" * 8

    def __init__(self) -> None:
        self.rows = 0

    def encode(self, images, texts) -> np.ndarray:
        self.rows += len(images)
        return np.asarray([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images], dtype=np.float32)


def _png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _query(prompt: str, sha256: str) -> LabelledQuery:
    none = np.zeros(0, dtype=np.float32)
    return LabelledQuery(
        query_id=uuid.uuid4(),
        prompt=prompt,
        split="train",
        near_duplicate_group=1,
        image_sha256=sha256,
        item_ids=np.zeros(0, dtype=np.int64),
        tau=none,
        standard_error=none,
        tau_halves=None,
        seed=0,
        candidate_set="corpus",
        draws=1,
    )


def test_each_image_is_encoded_once_and_rows_keep_the_order_asked_for(tmp_path: Path):
    blobs = BlobStore(tmp_path / "blobs")
    red, green = blobs.put(_png((200, 0, 0))), blobs.put(_png((0, 100, 0)))
    encoder = MeanColour()
    extractor = FeatureExtractor(FeatureSpec(("mean_colour",)), [encoder])
    seen: list[tuple[int, int]] = []
    features = LabelFeatures(extractor, blobs, tmp_path / "cache", "toy")
    items = [Item(5, "red", image_sha256=red), Item(3, "green", image_sha256=green)]
    rows = features.of_items(items, lambda done, total: seen.append((done, total)))
    assert rows.tolist() == [[200, 0, 0], [0, 100, 0]] and seen[-1] == (2, 2)
    queries = [_query("a", green), _query("b", green), _query("a", green)]
    assert features.of_queries(queries, lambda done, total: None).tolist() == [[0, 100, 0]] * 3
    assert encoder.rows == 4
    again = LabelFeatures(extractor, blobs, tmp_path / "cache", "toy")
    assert again.of_items(items[::-1], lambda done, total: None).tolist() == [[0, 100, 0], [200, 0, 0]]
    assert encoder.rows == 4
    assert (again.spec, again.blocks) == ("mean_colour", (("mean_colour", 3),))


def test_the_key_of_a_query_depends_on_image_and_prompt():
    assert len({query_key("a" * 64, "cat"), query_key("a" * 64, "dog"), query_key("b" * 64, "cat")}) == 3
    assert 0 <= query_key("a" * 64, "cat") < 2**63


def test_an_image_that_is_lost_or_broken_is_left_out_and_named_and_the_others_are_encoded(tmp_path: Path):
    blobs = BlobStore(tmp_path / "blobs")
    red, broken = blobs.put(_png((200, 0, 0))), blobs.put(b"no picture")
    encoder = MeanColour()
    features = LabelFeatures(
        FeatureExtractor(FeatureSpec(("mean_colour",)), [encoder]), blobs, tmp_path / "cache", "toy"
    )
    items = [Item(1, "lost", image_sha256="0" * 64), Item(2, "broken", image_sha256=broken),
             Item(3, "red", image_sha256=red), Item(4, "no image")]  # fmt: skip
    lost = features.lost_items(items, lambda done, total: None)
    assert sorted(lost) == [1, 2, 4] and lost[1].startswith("BLOB_NOT_FOUND")
    kept = features.readable(items, lambda done, total: None)
    assert [item.item_id for item in kept] == [3] and encoder.rows == 1
    assert features.of_items(kept, lambda done, total: None).tolist() == [[200, 0, 0]]
    with pytest.raises(BlobNotFound):
        features.of_items(items[:1], lambda done, total: None)
    queries = [_query("a", red), _query("b", "0" * 64), _query("c", "0" * 64)]
    assert sorted(features.lost_queries(queries, lambda done, total: None)) == [1, 2]
    blobs.remove(red)
    assert features.lost_queries(queries[:1], lambda done, total: None) == {}  # its features are kept
    assert sorted(features.lost_images(queries[:2])) == [0, 1]
    # One that was restored is encoded at the next look.
    again = [Item(5, "restored", image_sha256=blobs.put(_png((0, 7, 0))))]
    assert features.lost_items(again, lambda done, total: None) == {}
