"""A search that goes as deep as near-duplicates make it necessary.

Why it exists: an answer counts near-duplicate groups, an index counts items. Forty copies of one picture at the head of
the list would leave an answer with one place filled; so whoever searches asks again, deeper, until there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

#: How many times deeper than asked for a search goes to find enough near-duplicate groups. A group that is larger than
#: anybody would list is cut there, and fewer groups than asked for are found behind it.
DEEPEST = 32

Found = TypeVar("Found", bound=Sequence[object])


def searched(
    search: Callable[[int], Found], groups_of: Callable[[Found], Sequence[object]] | None, wanted: int, least: int = 0
) -> Found:
    """The best by ``search(k)``, at least ``least``, and enough of them to hold ``wanted`` groups.

    Without ``groups_of`` everything is a group of its own.
    """
    k = max(wanted if groups_of is None else 2 * wanted, least)
    while True:
        found = search(k)
        if groups_of is None or len(found) < k or k >= DEEPEST * wanted or len(set(groups_of(found))) >= wanted:
            return found
        k = min(4 * k, max(DEEPEST * wanted, least))
