"""Features of queries that were asked before.

Why it exists: encoding is most of a lookup's time, and a platform asks for the same picture again (a retry, another
``top_k``, a new release). Features depend on the picture, the prompt and the encoders alone, so they outlive a release;
the head is applied anew each time, it costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

#: Rows kept: some 30 MB at the demo's 1,920 features.
ROWS = 4096

#: Digest of the picture, prompt, and the hash of the encoders with their preprocessing.
Key = tuple[str, str, str]


class FeatureMemory:
    """The last ``rows`` feature rows used; the one unused for longest is dropped. For one thread at a time."""

    def __init__(self, rows: int = ROWS) -> None:
        self._rows = rows
        self._kept: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The row of ``key``, made if it is not kept; the very same bits either way. Raises what ``make`` raises."""
        row = self._kept.get(key)
        if row is None:
            row = self._kept[key] = make()
            row.setflags(write=False)
            if len(self._kept) > self._rows:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return row
