"""The last look before an answer is committed: is something in it withdrawn by now?

Why it exists: promise 7. A search that began before a withdrawal may end after it; the check runs in the
transaction that writes the answer. An answer already committed is filtered by the gateway when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, text

from byline.errors import ItemWithdrawn

_WITHDRAWN = text(
    "SELECT item_id FROM items WHERE item_id IN :ids AND withdrawn_at IS NOT NULL ORDER BY item_id"
).bindparams(bindparam("ids", expanding=True))


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
