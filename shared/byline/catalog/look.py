"""What a picture looks like, in 800 bytes: enough to recognise a copy that was saved again, scaled or mirrored.

Why it exists: an item that is added twice must not collect influence twice, and a digest of the bytes changes with
every save. A hash finds the few pictures that could be copies, a small thumbnail says which of them are. It is meant
for copies, not for resemblance: a recoloured drawing is another look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

#: Bits of the hash in which two pictures may differ and still be compared more closely.
HASH_BITS = 12
#: Correlation of two thumbnails from which on one picture is a copy of the other; and the difference of their mean
#: colours (of 255) up to which. Found on the demo corpus, see docs/corpus.md.
CORRELATION = 0.985
MEAN_DIFFERENCE = 10.0
_SIDE = 16


@dataclass(frozen=True, slots=True)
class Look:
    """``hash`` (63 bits, as Postgres' bigint holds them) and ``thumbnail``: 16 x 16 pixels of RGB, 768 bytes."""

    hash: int
    thumbnail: bytes

    def mirrored(self) -> Look:
        """The look of the picture turned left to right."""
        return _look(_pixels(self.thumbnail)[:, ::-1])


def look_of(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    from PIL.Image import Resampling  # the gateway compares looks and never opens a picture

    small = image.convert("RGB").resize((_SIDE, _SIDE), Resampling.BOX)
    return _look(np.asarray(small, dtype=np.uint8))


def is_copy(one: bytes, other: bytes) -> bool:
    """Whether two thumbnails are of one picture. Two plain areas of one colour are, too."""
    a, b = (_pixels(thumbnail).astype(np.float64) for thumbnail in (one, other))
    if np.abs(a.mean((0, 1)) - b.mean((0, 1))).max() > MEAN_DIFFERENCE:
        return False
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a**2).sum() * (b**2).sum())
    flat = max(a.std(), b.std()) < 1.0
    return bool(flat or (size > 0 and (a * b).sum() >= CORRELATION * size))


def differing_bits(one: int, other: int) -> int:
    """Bits in which two hashes differ."""
    return (one ^ other).bit_count()


def _look(pixels: NDArray[np.uint8]) -> Look:
    grey = (pixels.astype(np.float64) @ (0.299, 0.587, 0.114)).reshape(8, _SIDE // 8, 8, _SIDE // 8).mean((1, 3))
    # Brighter than the mean: on a mostly white page comparisons with a neighbour or the median would be noise.
    bits = (grey > grey.mean()).ravel()[:-1]
    return Look(int("".join("1" if bit else "0" for bit in bits), 2), np.ascontiguousarray(pixels).tobytes())


def _pixels(thumbnail: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(thumbnail, dtype=np.uint8).reshape(_SIDE, _SIDE, 3)
