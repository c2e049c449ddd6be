"""A catalogue makes items when they are asked for, and refuses what is not one."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byline.catalog.items import Item
from byline.errors import ReleaseCorrupt
from byline.releases import catalogue
from byline.releases.catalogue import read_catalogue, write_catalogue

ITEMS = [Item(n * n, f"item {n}", ("a", "b")[: n % 3], creator=f"c{n}", near_duplicate_group=n // 2) for n in range(50)]


def test_every_item_comes_back_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_REMEMBERED", 7)  # what was forgotten is made again
    write_catalogue(tmp_path / "c.parquet", reversed(ITEMS))
    found = read_catalogue(tmp_path / "c.parquet")
    assert list(found) == [item.item_id for item in ITEMS] == found.ids.tolist() and len(found) == 50
    for _ in range(2):
        assert [found[item.item_id] for item in ITEMS] == ITEMS
    assert found.get(2) is None and 3 not in found and 2500 not in found and -1 not in found
    assert all(isinstance(found[4].item_id, int) for _ in range(2)) and type(found[4].near_duplicate_group) is int


def test_an_empty_catalogue_holds_nothing(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "c.parquet", [])
    found = read_catalogue(tmp_path / "c.parquet")
    assert len(found) == 0 and 1 not in found


def test_ids_out_of_order_or_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_catalogue(path, ITEMS)
    table = pq.read_table(path)
    for places in ([1, 0], [3, 3]):
        pq.write_table(table.take(pa.array(places)), path)
        with pytest.raises(ReleaseCorrupt):
            read_catalogue(path)
