"""Which near-duplicate group a new item belongs to.

Why it exists: who adds a picture a hundred times must not be credited a hundred times. A new item whose look is that
of a known one joins its group; groups are credited once. The comparison is linear in the corpus: the hashes of all
items are read (8 bytes each) and compared at once, the thumbnails only of the few that come near.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, select

from byline.catalog.items import Item
from byline.catalog.look import HASH_BITS, Look, is_copy
from byline.db.models import Base

_items = Base.metadata.tables["items"]


def groups_of(
    connection: Connection, corpus_id: str, items: Sequence[Item], looks: Mapping[int, Look],
    stated: Collection[int] = (),
) -> dict[int, int]:  # fmt: skip
    """The group of every item by id: the stated one, that of the picture it is a copy of, or a new one of its own.

    Reads within the caller's transaction, which holds the corpus: copies that come together find each other.
    """
    groups = {item.item_id: item.near_duplicate_group for item in items}
    joining = [item.item_id for item in items if item.item_id in looks and item.item_id not in stated]
    if not joining:
        return groups
    known = connection.execute(
        select(_items.c.item_id, _items.c.look_hash)
        .where(_items.c.corpus_id == corpus_id, _items.c.look_hash.is_not(None), _items.c.withdrawn_at.is_(None))
        .order_by(_items.c.item_id)
    ).all()  # fmt: skip
    ids = [row.item_id for row in known] + joining  # of copies that come together, the first is joined by the others
    hashes = np.array([row.look_hash for row in known] + [looks[i].hash for i in joining], dtype=np.uint64)
    near: dict[int, list[int]] = {}
    for place, item_id in enumerate(joining, start=len(known)):
        look = looks[item_id]
        close = np.minimum(_bits(hashes[:place], look.hash), _bits(hashes[:place], look.mirrored().hash)) <= HASH_BITS
        near[item_id] = [ids[row] for row in np.flatnonzero(close)]
    stored = _stored(connection, {item_id for found in near.values() for item_id in found})
    for item_id in joining:
        look, turned = looks[item_id], looks[item_id].mirrored()
        for other in near[item_id]:
            group, seen = stored[other] if other in stored else (groups[other], looks[other].thumbnail)
            if other != item_id and (is_copy(look.thumbnail, seen) or is_copy(turned.thumbnail, seen)):
                groups[item_id] = group
                break
    return groups


def _bits(hashes: NDArray[np.uint64], one: int) -> NDArray[np.int64]:
    """In how many bits each hash [n] differs from ``one``."""
    bits: NDArray[np.int64] = np.bitwise_count(hashes ^ np.uint64(one)).astype(np.int64)
    return bits


def _stored(connection: Connection, item_ids: set[int]) -> dict[int, tuple[int, bytes]]:
    """Group and thumbnail of these items."""
    if not item_ids:
        return {}
    query = select(_items.c.item_id, _items.c.near_duplicate_group, _items.c.look)
    rows = connection.execute(query.where(_items.c.item_id.in_(item_ids))).all()
    return {row.item_id: (row.near_duplicate_group, bytes(row.look)) for row in rows if row.look is not None}
