"""Withdrawn items out of every file, once the releases that answer are made without them.

Why it exists: a withdrawal is a filter at once and a removal later; this is the removal. It runs after every refresh,
may be run by hand (``byline corpus purge``), and does nothing until each model of the corpus answers from a release
that does not hold the items. What cannot be removed yet (an old release that a running job still needs) leaves the
receipt open, and the next purge goes on. A release that holds withdrawn items is removed whole: it cannot be changed,
and a rollback to it would bring their files back.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, text

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.catalog.withdrawals import StoredReceipt, lock_receipts, mark_purged, receipts, stored_receipt
from byline.db.session import transaction
from byline.failpoints import failpoint
from byline.features.store import forget_rows
from byline.releases.catalogue import catalogue_ids
from byline.releases.delta import DeltaStore
from byline.releases.garbage import in_use
from byline.releases.garbage_files import REMOVING, remove_release, remove_tree
from byline.releases.manifest import CATALOGUE
from byline.releases.purge_rows import PurgedRows, purge_rows
from byline.releases.purge_sketches import cut_sketches, settle_cuts, sketch_sets
from byline.releases.registry import ReleaseRecord, ReleaseRegistry
from byline.releases.vouched import vouched
from byline.security.signing import NOT_SIGNED, Keyring
from byline.telemetry import get_logger

log = get_logger(__name__)

Ids = NDArray[np.int64]
#: Images of items are kept while a query or an item that was not withdrawn is the same picture.
REFERENCED = text("""
SELECT image_sha256 FROM items WHERE withdrawn_at IS NULL AND image_sha256 = ANY(:digests)
UNION SELECT image_sha256 FROM jobs WHERE image_sha256 = ANY(:digests)
UNION SELECT image_sha256 FROM queries WHERE image_sha256 = ANY(:digests)
""")
_MARK = text("UPDATE releases SET collected_at = now() WHERE id = :id AND collected_at IS NULL")
_OTHERS = text(
    "SELECT r.id FROM releases r JOIN models m ON m.id = r.model_id"
    " WHERE m.corpus_id = :corpus AND r.id <> ALL(:known) ORDER BY r.id"
)


@dataclass(frozen=True)
class Places:
    """Where files of items lie. What came with a model or a corpus' source is its owner's and never changed."""

    release_dir: Path
    cache_dir: Path
    blobs: BlobStore
    #: Files of releases that none of its keys signed are not opened.
    keyring: Keyring = NOT_SIGNED


@dataclass
class PurgeReport:
    """What a purge did. ``waiting``: models that still answer from a release with the items; ``left``: releases that
    hold them and could not be removed yet, and such as were registered meanwhile."""

    corpus_id: str
    items: int = 0
    receipts: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    rows: PurgedRows | None = None
    features: int = 0
    sketches: int = 0
    blobs: int = 0
    blobs_kept: int = 0
    removed_releases: list[str] = field(default_factory=list)
    absent_from: list[tuple[str, str]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether everything is gone."""
        return not self.waiting and not self.left

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        values = {name: value for name, value in vars(self).items() if name not in ("rows", "corpus_id", "receipts")}
        return values | {"rows": None if self.rows is None else self.rows.to_json()}


def purge(engine: Engine, places: Places, corpus_id: str) -> PurgeReport:
    """Remove what the corpus' open receipts name. Doing it twice removes nothing twice. Raises OSError, BylineError.

    A purge that runs already on this machine is waited for, and what a killed one left is brought to its end.
    """
    with _alone(places.cache_dir):
        settle_cuts(places.cache_dir)
        for folder in places.release_dir.glob(f"{REMOVING}*"):
            remove_tree(folder)
        return _purge(engine, places, corpus_id)


def _purge(engine: Engine, places: Places, corpus_id: str) -> PurgeReport:
    DeltaStore(engine).drop_collected()
    with transaction(engine) as connection:
        open_ones = [
            stored_receipt(connection, one.receipt_id) for one in receipts(connection, corpus_id, only_unpurged=True)
        ]
    items = sorted({item_id for receipt in open_ones for item_id in receipt.images})
    report = PurgeReport(corpus_id, len(items), len(open_ones))
    if not open_ones:
        return report
    gone = np.array(items, dtype=np.int64)
    records = list(_releases(engine, corpus_id))
    active = _active(engine, corpus_id)
    holding = [record for record in records if _holds(record, gone, places.keyring)]
    report.waiting = {record.model_id: record.release_id for record in holding if record.release_id in active}
    if report.waiting:
        return report
    with transaction(engine) as connection:
        report.rows = purge_rows(connection, corpus_id, items)
    failpoint("corpus.purge_after_rows")
    report.features = sum(forget_rows(folder, gone) for folder in item_stores(places.cache_dir, corpus_id))
    report.sketches = sum(cut_sketches(folder, gone) for folder in sketch_sets(places.cache_dir))
    _remove_images(engine, places.blobs, open_ones, report)
    failpoint("corpus.purge_after_files")
    for record in holding:
        (report.removed_releases if _remove(engine, record) else report.left).append(record.release_id)
    kept = [record for record in records if record not in holding and (record.directory / CATALOGUE).is_file()]
    report.absent_from = [(record.model_id, record.release_id) for record in kept]
    failpoint("corpus.purge_before_mark")
    if report.done:
        with transaction(engine) as connection:
            # From here on whoever registers a release with the items finds the receipts closed, and opens them again.
            lock_receipts(connection, corpus_id)
            known = [record.release_id for record in records]
            report.left = list(connection.execute(_OTHERS, {"corpus": corpus_id, "known": known}).scalars())
            if report.done:
                mark_purged(connection, [receipt.receipt_id for receipt in open_ones], report.to_json())
    log.info("withdrawn_items_purged", corpus_id=corpus_id, items=report.items, done=report.done, left=report.left,
             removed_releases=report.removed_releases)  # fmt: skip
    return report


@contextmanager
def _alone(cache_dir: Path) -> Iterator[None]:
    """One purge of these files at a time; the kernel takes the lock back from the dead."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / ".purging").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def item_stores(cache_dir: Path, corpus_id: str) -> list[Path]:
    """The feature stores of a corpus' items, of every spec."""
    return sorted((cache_dir / "features" / corpus_id).glob("*/items"))


def _releases(engine: Engine, corpus_id: str) -> Iterator[ReleaseRecord]:
    registry = ReleaseRegistry(engine)
    for model in CatalogStore(engine).models():
        if model.corpus_id == corpus_id:
            yield from (record for record in registry.list(model.model_id, limit=1_000_000))


def _active(engine: Engine, corpus_id: str) -> set[str]:
    registry = ReleaseRegistry(engine)
    models = (model for model in CatalogStore(engine).models() if model.corpus_id == corpus_id)
    found = (registry.active(model.model_id) for model in models)
    return {active.release_id for active in found if active is not None}


def _holds(record: ReleaseRecord, gone: Ids, keyring: Keyring) -> bool:
    path = record.directory / CATALOGUE
    if not path.is_file():
        return False
    vouched(record.directory, keyring, record.manifest, (CATALOGUE,))
    return bool(np.isin(catalogue_ids(path), gone).any())


def _remove(engine: Engine, record: ReleaseRecord) -> bool:
    """Remove an old release's files, unless it answers now, or a running job or a worker still uses it."""
    registry = ReleaseRegistry(engine)
    with transaction(engine) as connection:
        registry.lock_within(connection, record.model_id)
        active = registry.active_within(connection, record.model_id)
        if active is not None and active.release_id == record.release_id:
            return False
        if record.release_id in in_use(connection, record.model_id):
            return False
        connection.execute(_MARK, {"id": record.release_id})
    failpoint("corpus.purge_after_release_mark")
    remove_release(record.directory)
    return True


def _remove_images(engine: Engine, blobs: BlobStore, open_ones: Sequence[StoredReceipt], report: PurgeReport) -> None:
    digests = sorted({digest for receipt in open_ones for digest in receipt.images.values() if digest})
    with transaction(engine) as connection:
        kept = set(connection.execute(REFERENCED, {"digests": digests}).scalars())
    report.blobs_kept = len(kept)
    for digest in digests:
        if digest not in kept:
            report.blobs += blobs.remove(digest)
