"""The catalogue of a release: the items it was built from, as a Parquet file beside its index.

Why it exists: an answer names captions, creators and licences without asking a database, and names them as
they were when the release was made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from byline.catalog.items import Item
from byline.errors import ReleaseCorrupt

_SCHEMA = pa.schema(
    [
        ("item_id", pa.int64()), ("caption", pa.string()), ("keywords", pa.list_(pa.string())),
        ("creator", pa.string()), ("licence", pa.string()), ("source", pa.string()), ("source_path", pa.string()),
        ("image_sha256", pa.string()), ("near_duplicate_group", pa.int64()),
    ]
)  # fmt: skip


def write_catalogue(path: Path, items: Iterable[Item]) -> None:
    """Write the items, ordered by id."""
    ordered = sorted(items, key=lambda item: item.item_id)
    columns = {f.name: [getattr(item, f.name) for item in ordered] for f in fields(Item)}
    pq.write_table(pa.table(columns, schema=_SCHEMA), path)


#: Items kept once made: those that are found are found again.
_REMEMBERED = 16_384


class Catalogue(Mapping[int, Item]):
    """Items by id, in ascending order, each made when it is asked for.

    100,000 items as Python objects take more than a second to make, in which the interpreter has little time for
    anybody else, and most of a worker's memory: a release that is loaded beside the one that answers must not be felt.
    """

    def __init__(self, table: pa.Table) -> None:
        """``table``: of the schema above, ordered by id. ValueError if it is not, or an id stands twice."""
        whole = table.combine_chunks()
        self._columns = [
            (name, whole.column(name).chunk(0) if len(whole) else whole.column(name)) for name in whole.column_names
        ]
        self._ids = np.asarray(whole.column("item_id").to_numpy(), dtype=np.int64)
        self._groups = np.asarray(whole.column("near_duplicate_group").to_numpy(), dtype=np.int64)
        self._made: dict[int, Item] = {}
        if len(self._ids) and (self._ids[0] < 0 or (np.diff(self._ids) <= 0).any()):
            raise ValueError("the ids are not in ascending order")

    @property
    def ids(self) -> NDArray[np.int64]:
        """[n], ascending."""
        return self._ids

    def groups(self, item_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The near-duplicate groups [n] of items [n], without making them; an id that is not held is its own group."""
        if not len(self._ids):
            return item_ids
        places = np.minimum(np.searchsorted(self._ids, item_ids), len(self._ids) - 1)
        found: NDArray[np.int64] = np.where(self._ids[places] == item_ids, self._groups[places], item_ids)
        return found

    def __getitem__(self, item_id: int) -> Item:
        item = self._made.get(item_id)
        if item is None:
            if len(self._made) >= _REMEMBERED:
                self._made = {}
            item = self._made[item_id] = self._make(item_id)
        return item

    def _make(self, item_id: int) -> Item:
        place = bisect_left(self._ids, item_id)  # a comparison of numbers each: numpy's own search costs more
        if place == len(self._ids) or self._ids[place] != item_id:
            raise KeyError(item_id)
        row = {name: column[place].as_py() for name, column in self._columns}
        row["keywords"] = tuple(row["keywords"] or ())
        return Item(**row)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)


def read_catalogue(path: Path) -> Catalogue:
    """Items by id, in ascending order. ReleaseCorrupt when the file is broken or of another shape."""
    try:
        # One thread: whoever answers from another release meanwhile needs the others.
        return Catalogue(pq.read_table(path, schema=_SCHEMA, use_threads=False))
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise ReleaseCorrupt(f"{path.name} cannot be read as a catalogue", file=path.name) from error


def catalogue_ids(path: Path) -> NDArray[np.int64]:
    """The ids [n] alone, ascending. ReleaseCorrupt as ``read_catalogue``."""
    try:
        column = pq.read_table(path, columns=["item_id"])["item_id"]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ReleaseCorrupt(f"{path.name} cannot be read as a catalogue", file=path.name) from error
    ids: NDArray[np.int64] = column.to_numpy()
    return ids
