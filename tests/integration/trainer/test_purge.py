"""Withdrawn items leave the files although trainers build, workers serve and releases come meanwhile."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.db.session import transaction
from byline.releases import purge as purging
from byline.releases.absence import check_absence
from byline.releases.purge import Places, purge
from byline.releases.registry import ReleaseRegistry, ReleaseState
from services.trainer.observe import Observer
from services.trainer.schedule import Due, Trigger

from .test_refresh import LENIENT, NOW, World, _add, _refresher, engine, world  # noqa: F401 - fixtures

SERVES = text("INSERT INTO worker_releases (worker_id, model_id, release_id) VALUES ('w1', 'toy', :release)")
SWAPS = text("UPDATE worker_releases SET release_id = :release WHERE worker_id = 'w1'")
CORPUS = [Due(Trigger.CORPUS, "1 withdrawn")]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "releases", tmp_path / "cache", BlobStore(tmp_path / "blobs"))


@pytest.fixture
def refresher(engine, world: World, tmp_path: Path):  # noqa: F811
    _add(engine, world, "train", range(10))
    _add(engine, world, "validation", range(12))
    return _refresher(engine, world, tmp_path, epochs=2, limits=LENIENT)


def test_a_candidate_of_an_older_snapshot_opens_the_receipt_that_was_closed_without_it(
    engine, refresher, places: Places  # noqa: F811
):
    catalog, receipts = CatalogStore(engine), []

    def withdrawn_meanwhile(what: str, done: int, total: int) -> None:
        if (what, done) == ("build the release", 0):  # the items were read long before
            receipts.extend(catalog.withdraw([7]).receipts)
            assert purge(engine, places, "toy").done
            assert catalog.receipt(receipts[0]).purged_at is not None

    first = refresher.run_once(now=NOW, seed=0, progress=withdrawn_meanwhile)
    assert first.activated and catalog.receipt(receipts[0]).purged_at is None
    assert purge(engine, places, "toy").waiting == {"toy": first.release_id}
    change = Observer(engine, "toy", "abu_plus_linear").look().corpus
    assert change is not None and change.withdrawn == 1
    second = refresher.run_once(now=NOW + timedelta(minutes=5), seed=0, due=CORPUS)
    assert second.activated
    report = purge(engine, places, "toy")
    assert report.done and report.removed_releases == [first.release_id]
    receipt = catalog.receipt(receipts[0])
    assert receipt.purged_at is not None and check_absence(engine, places, receipt).absent


def test_a_refused_candidate_that_holds_a_withdrawn_item_is_removed_too(
    engine, world: World, refresher, places: Places, tmp_path: Path  # noqa: F811
):
    strict = _refresher(engine, world, tmp_path, epochs=2, limits=LENIENT.__class__(0.999, 1.0, 0.95))
    catalog, receipts = CatalogStore(engine), []

    def withdrawn_meanwhile(what: str, done: int, total: int) -> None:
        if (what, done) == ("build the release", 0):
            receipts.extend(catalog.withdraw([7]).receipts)
            assert purge(engine, places, "toy").done

    refused = strict.run_once(now=NOW, seed=0, progress=withdrawn_meanwhile)
    record = ReleaseRegistry(engine).get(refused.release_id)
    assert record.state is ReleaseState.REJECTED and record.directory.is_dir()
    assert purge(engine, places, "toy").removed_releases == [refused.release_id]
    assert not record.directory.exists()


def test_a_receipt_is_not_closed_while_a_release_came_that_the_purge_has_not_looked_into(
    engine, refresher, places: Places, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):
    catalog = CatalogStore(engine)
    (receipt_id,) = catalog.withdraw([7]).receipts
    made = []

    def another_trainer(place: str) -> None:
        if place == "corpus.purge_before_mark":
            made.append(refresher.run_once(now=NOW, seed=0).release_id)

    with monkeypatch.context() as patch:
        patch.setattr(purging, "failpoint", another_trainer)
        report = purge(engine, places, "toy")
    assert report.left == made and not report.done and catalog.receipt(receipt_id).purged_at is None
    assert purge(engine, places, "toy").done and catalog.receipt(receipt_id).purged_at is not None


def test_a_release_that_a_worker_still_serves_keeps_its_files_and_the_receipt_open(
    engine, refresher, places: Places  # noqa: F811
):
    catalog, registry = CatalogStore(engine), ReleaseRegistry(engine)
    first = refresher.run_once(now=NOW, seed=0)
    with transaction(engine) as connection:
        report = text("INSERT INTO worker_reports (worker_id, service, queue, pid) VALUES ('w1', 'workers', 'l', 1)")
        connection.execute(report)
        connection.execute(SERVES, {"release": first.release_id})
    (receipt_id,) = catalog.withdraw([7]).receipts
    second = refresher.run_once(now=NOW + timedelta(minutes=5), seed=0, due=CORPUS)
    assert second.activated
    assert purge(engine, places, "toy").left == [first.release_id]
    record = registry.get(first.release_id)
    assert record.directory.is_dir() and record.collected_at is None
    assert catalog.receipt(receipt_id).purged_at is None
    with transaction(engine) as connection:
        connection.execute(SWAPS, {"release": second.release_id})
    assert purge(engine, places, "toy").removed_releases == [first.release_id]
    assert catalog.receipt(receipt_id).purged_at is not None and isinstance(receipt_id, uuid.UUID)
