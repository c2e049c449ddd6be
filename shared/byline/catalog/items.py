"""One training image as everybody else sees it.

Why it exists: index, releases, answers and the console all speak of items; this is the one value they
share, so a caption or a licence is never looked up in two shapes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

ITEM_ID_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Item:
    """A corpus item. ``item_id`` is stable for ever; ``image_sha256`` addresses its bytes in the blob store.

    ``near_duplicate_group`` ties recolours and series together (splits and credit go by group); an item
    that belongs to no group is a group of its own: the default is its own id.
    """

    item_id: int
    caption: str
    keywords: tuple[str, ...] = ()
    creator: str = ""
    licence: str = ""
    source: str = ""
    source_path: str = ""
    image_sha256: str = ""
    near_duplicate_group: int = field(default=-1)

    def __post_init__(self) -> None:
        """Check the id's range and fill in the default group."""
        if not 0 <= self.item_id <= ITEM_ID_MASK:
            raise ValueError(f"item_id {self.item_id} is outside 0 … 2^63-1")
        if self.near_duplicate_group < 0:
            object.__setattr__(self, "near_duplicate_group", self.item_id)


def derive_item_id(corpus_id: str, image_sha256: str) -> int:
    """A stable 63-bit id for an image that came without one: the same image in the same corpus has the same id."""
    digest = hashlib.sha256(f"{corpus_id}\x00{image_sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & ITEM_ID_MASK
