"""The corpus file read for teachers: what is there, in order, and a clear error otherwise."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from byline.errors import LabelsNotUsable
from byline.evaluation.corpus_file import near_duplicate_groups, read_corpus


def _png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def test_items_come_in_file_order_with_their_pictures(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({
        "item_id": [9, 4], "caption": ["a", "b"], "image": [_png((255, 0, 0)), _png((0, 0, 255))],
        "near_duplicate_group": [4, 4],
    }), path)
    items = read_corpus(path)
    assert [(i.item_id, i.caption, i.image.getpixel((0, 0))) for i in items] == [
        (9, "a", (255, 0, 0)), (4, "b", (0, 0, 255))]
    assert near_duplicate_groups(path) == {9: 4, 4: 4}


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelsNotUsable, match="absent.parquet"):
        read_corpus(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(LabelsNotUsable, match="caption"):
        read_corpus(tmp_path / "other.parquet")
