"""What is withdrawn: remembered for the search, looked up once more before an answer is committed.

Why it exists: promise 7. A search that began before a withdrawal may end after it, and the set a search leaves out
may be a moment old; the check in the transaction that writes the answer is what the promise rests on. An answer already
committed is filtered by the gateway when it is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from byline.errors import ItemWithdrawn

_WITHDRAWN = text(
    "SELECT item_id FROM items WHERE item_id = ANY(CAST(:ids AS bigint[])) AND withdrawn_at IS NOT NULL"
    " ORDER BY item_id"
)


def refuse_withdrawn(connection: Connection, item_ids: Sequence[int]) -> None:
    """Raise ItemWithdrawn (the stage runs again, without it) if any of ``item_ids`` is withdrawn."""
    if not item_ids:
        return
    gone = connection.execute(_WITHDRAWN, {"ids": list(item_ids)}).scalars().all()
    if gone:
        raise ItemWithdrawn(
            "an item of the answer was withdrawn while the answer was made; the stage runs again without it",
            items=",".join(str(item_id) for item_id in gone),
        )


class WithdrawnItems:
    """The withdrawn ids, read again when told that they changed, and at least every ``keep_s`` seconds.

    Being late by a notification costs a search that is repeated, never a withdrawn item in an answer: that is
    ``refuse_withdrawn``'s to say, and ``changed`` must be called when it does.
    """

    def __init__(
        self, read: Callable[[], Iterable[int]], clock: Callable[[], float], keep_s: float = 5.0
    ) -> None:
        self._read = read
        self._clock = clock
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._version = 0
        self._known: tuple[int, float, NDArray[np.int64]] | None = None

    def changed(self) -> None:
        """An item was withdrawn, or may have been. Any thread."""
        with self._lock:
            self._version += 1

    def ids(self) -> NDArray[np.int64]:
        """The withdrawn ids [w], ascending; the same array until they are read again."""
        with self._lock:
            version, known = self._version, self._known
        if known is not None and known[0] == version and self._clock() < known[1]:
            return known[2]
        # Version first, set after: a change in between is read again next time.
        ids = np.array(sorted(self._read()), dtype=np.int64)
        ids.setflags(write=False)  # so that an index may remember where they are
        with self._lock:
            self._known = (version, self._clock() + self._keep_s, ids)
        return ids
