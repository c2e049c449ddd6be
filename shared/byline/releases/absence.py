"""Whether withdrawn items are really gone: every place where they could be is read again.

Why it exists: a receipt says what was removed; this proves it, years later and without believing the receipt. Files
whose format is known are parsed (catalogues, indexes, sketches, features); beyond that every file of the releases and
the cache is searched for the items' ids as they would stand in it: eight bytes, or digits.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from sqlalchemy import Engine

from byline.catalog.withdrawals import StoredReceipt
from byline.db.session import transaction
from byline.features.store import stored_ids
from byline.index import load_index
from byline.releases.catalogue import catalogue_ids
from byline.releases.manifest import (
    CATALOGUE,
    EMBEDDINGS,
    GOLDEN,
    MANIFEST,
    SKETCH_GOLDEN,
    SKETCH_TOKENS,
    SKETCHES,
)
from byline.releases.purge import REFERENCED, Places, item_stores
from byline.releases.purge_rows import rows_naming
from byline.releases.purge_sketches import sketch_sets
from byline.releases.vouched import vouched
from byline.security.signing import Keyring

Ids = NDArray[np.int64]
#: A smaller id is a number like any other: finding its bytes or digits proves nothing.
DISTINCTIVE = 2**40
_CHUNK = 16 * 1024 * 1024
#: Files in which an id would stand in digits.
_TEXTS = frozenset({".json", ".jsonl", ".csv", ".txt"})


@dataclass
class AbsenceReport:
    """What was found of a receipt's items. ``absent``: nothing, anywhere.

    ``kept_images`` are pictures that an item or a query that was not withdrawn shares. ``releases`` are those whose
    files were read, with how many of the items each part names. ``searched`` bytes were searched for ``ids`` ids.
    """

    receipt: str
    items: int
    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    kept_images: int = 0
    features: dict[str, int] = field(default_factory=dict)
    sketches: dict[str, int] = field(default_factory=dict)
    releases: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    searched: int = 0
    ids: int = 0

    @property
    def absent(self) -> bool:
        """Whether nothing was found."""
        counts = [*self.rows.values(), self.images, *self.features.values(), *self.sketches.values()]
        parts = [count for release in self.releases.values() for count in release.values()]
        return not any((*counts, *parts, *self.files.values()))

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return vars(self) | {"absent": self.absent}


def check_absence(engine: Engine, places: Places, receipt: StoredReceipt) -> AbsenceReport:
    """Look for the receipt's items everywhere. Reads every release and cache file once."""
    gone = np.array(sorted(receipt.images), dtype=np.int64)
    report = AbsenceReport(str(receipt.receipt_id), len(gone))
    digests = sorted(filter(None, receipt.images.values()))
    with transaction(engine) as connection:
        report.rows = rows_naming(connection, receipt.corpus_id, gone.tolist())
        kept = set(connection.execute(REFERENCED, {"digests": digests}).scalars())
    report.kept_images = len(kept)
    report.images = sum(places.blobs.exists(digest) for digest in digests if digest not in kept)
    for folder in item_stores(places.cache_dir, receipt.corpus_id):
        report.features[_shown(folder, places.cache_dir)] = _among(stored_ids(folder), gone)
    for folder in sketch_sets(places.cache_dir):
        report.sketches[_shown(folder, places.cache_dir)] = _among(_tensor_ids(folder / "sketches.safetensors"), gone)
    for manifest in sorted(places.release_dir.glob("*/" + MANIFEST)):
        report.releases[manifest.parent.name] = _of_release(manifest.parent, gone, places.keyring)
    _search(places, gone[gone >= DISTINCTIVE], report)
    return report


def _of_release(directory: Path, gone: Ids, keyring: Keyring) -> dict[str, int]:
    manifest = vouched(directory, keyring)
    readers: dict[str, Callable[[Path], Ids]] = {
        CATALOGUE: catalogue_ids,
        EMBEDDINGS: lambda path: load_index(path, manifest.index_factory).ids,
        GOLDEN: lambda path: _tensor_ids(path, "ids"),
        SKETCH_GOLDEN: lambda path: _tensor_ids(path, "ids"),
        SKETCH_TOKENS: _tensor_ids,
    }
    if manifest.sketches is not None:
        factory = manifest.sketches.index.factory if manifest.sketches.index else "Flat"
        readers[SKETCHES] = lambda path: load_index(path, factory).ids
    return {name: _among(read(directory / name), gone) for name, read in readers.items() if name in manifest.files}


def _search(places: Places, ids: Ids, report: AbsenceReport) -> None:
    """Every file under releases and cache, hidden ones included, for the ids as bytes or as digits."""
    report.ids = len(ids)
    if not len(ids):
        return
    for root in (places.release_dir, places.cache_dir):
        for path in sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size):
            digits = path.suffix in _TEXTS
            found = sum(_found(chunk, ids, digits) for chunk in _chunks(path))
            report.searched += path.stat().st_size
            if found:
                report.files[_shown(path, root.parent)] = found


def _found(data: bytes, ids: Ids, digits: bool) -> int:
    count = 0
    for offset in range(8):
        whole = (len(data) - offset) // 8
        if whole <= 0:
            break
        numbers = np.frombuffer(data, dtype="<i8", offset=offset, count=whole)
        place = np.searchsorted(ids, numbers)
        count += int((ids[np.minimum(place, len(ids) - 1)] == numbers).sum())
    return count + (sum(str(item_id).encode() in data for item_id in ids.tolist()) if digits else 0)


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in pieces that overlap by the longest id."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start in range(0, len(data), _CHUNK):
            yield data[max(0, start - 20) : start + _CHUNK]


def _tensor_ids(path: Path, name: str = "item_ids") -> Ids:
    with safe_open(path, "np") as file:
        ids: Ids = file.get_tensor(name).astype(np.int64)
    return ids.ravel()


def _among(ids: Ids, gone: Ids) -> int:
    return int(np.isin(ids, gone).sum())


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def absent_releases(report: AbsenceReport) -> Sequence[str]:
    """The releases whose files were read and name none of the items."""
    return [name for name, parts in report.releases.items() if not any(parts.values())]
