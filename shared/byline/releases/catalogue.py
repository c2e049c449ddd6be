"""The catalogue of a release: the items it was built from, as a Parquet file beside its index.

Why it exists: an answer names captions, creators and licences without asking a database, and names them as
they were when the release was made.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def read_catalogue(path: Path) -> dict[int, Item]:
    """Items by id, in ascending order. ReleaseCorrupt when the file is broken or of another shape."""
    try:
        rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
        items = [Item(**{**row, "keywords": tuple(row["keywords"] or ())}) for row in rows]
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise ReleaseCorrupt(f"{path.name} cannot be read as a catalogue", file=path.name) from error
    return {item.item_id: item for item in items}


def catalogue_ids(path: Path) -> NDArray[np.int64]:
    """The ids [n] alone, ascending. ReleaseCorrupt as ``read_catalogue``."""
    try:
        column = pq.read_table(path, columns=["item_id"])["item_id"]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ReleaseCorrupt(f"{path.name} cannot be read as a catalogue", file=path.name) from error
    ids: NDArray[np.int64] = column.to_numpy()
    return ids
