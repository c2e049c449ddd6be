"""kill -9 of the trainer at each of its steps: nothing is half-published, and the next one goes on.

One process imports everything and forks a trainer for each kill: real processes, real signals, one start of torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.failpoints import NAMES
from byline.releases.absence import check_absence
from byline.releases.garbage import GarbageCollector, KeepRule
from byline.releases.garbage_files import BUILDING, REMOVING
from byline.releases.loader import load_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.purge import Places
from byline.releases.registry import ReleaseRegistry, ReleaseState
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.packed_directions import PackedDirections
from byline.teachers.sketch_basis import Coordinates, SketchBasis
from byline.teachers.sketch_set import SketchSet

from .test_refresh import ITEMS, World, _add, engine, world  # noqa: F401 - fixtures

#: A trainer in each of its steps, then the next one: ``POINT NUMBER`` a line; answers ``STATUS``.
PROGRAM = """
import importlib.util, os, sys
from datetime import timedelta
from pathlib import Path

import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("toy_world", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_world"] = toy
spec.loader.exec_module(toy)
from byline.catalog.blobs import BlobStore
from byline.db.session import make_engine
from byline.releases.garbage import KeepRule
from byline.releases.purge import Places, purge
from services.trainer.observe import Observer
from services.trainer.schedule import RefreshRule
from services.trainer.work import TrainerWork

url, folder, queries = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
world = toy.World()
for number in range(queries):
    world.labels(f"train {number}")
for number in range(12):
    world.labels(f"validation {number}")


def train(number):
    engine = make_engine(url, 3)
    observer = Observer(engine, "toy", "abu_plus_linear")
    rule = RefreshRule(1, timedelta(hours=1), timedelta(0))
    refresher = toy._refresher(engine, world, folder, epochs=2, limits=toy.LENIENT)
    places = Places(folder / "releases", folder / "cache", BlobStore(folder / "blobs"))
    work = TrainerWork(engine, "toy", folder / "releases", observer, rule, lambda: refresher,
                       KeepRule(0, timedelta(0)), purge=lambda: purge(engine, places, "toy"))
    outcome = work.run(observer.now())
    return 0 if outcome is None or outcome.activated else 3


for line in sys.stdin:
    point, number = line.split()
    child = os.fork()
    if child == 0:
        os.environ["BYLINE_FAILPOINTS"] = "" if point == "none" else f"{point}=kill"
        status = 4
        try:
            status = train(int(number))
        finally:
            os._exit(status)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

#: Every step; after each group a trainer runs to its end. Those of the first group leave nothing but a hidden folder.
STEPS = (
    ("trainer.before_snapshot", "trainer.before_fit", "trainer.after_fit", "trainer.before_write",
     "releases.before_rename"),
    ("trainer.after_write",), ("trainer.before_register",), ("trainer.after_register",), ("trainer.before_activate",),
    ("trainer.after_activate",),
)  # fmt: skip
COLLECTING = sorted(name for name in NAMES if name.startswith("releases.gc_"))
PURGING = (*sorted(name for name in NAMES if name.startswith("corpus.purge_")), "releases.gc_after_hide")


class Trainers:
    """Forks trainers, each with at most one failpoint."""

    def __init__(self, url: str, folder: Path, queries: int) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(entry for entry in [root, *sys.path] if entry)
        self._minutes = 0
        self._log = folder / "trainers.log"
        self._log.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(Path(__file__).with_name("test_refresh.py")), url, str(folder),
             str(queries)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=self._log.open("w"), env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, point: str = "none") -> int:
        """The exit code of one trainer; -9 if it was killed."""
        self._minutes += 1
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{point} {self._minutes}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # log lines, then how it ended
            if line.startswith("ended "):
                return int(line.split()[1])
        raise AssertionError(self._log.read_text()[-3000:])

    def close(self) -> None:
        self._process.communicate(timeout=60)


def whole(engine, root: Path) -> None:  # noqa: F811
    """Nothing is half-published: what answers can be loaded, what is visible is whole, what is registered is there."""
    registry = ReleaseRegistry(engine)
    active = registry.active("toy")
    for directory in root.glob("[!.]*"):
        manifest = ReleaseManifest.read(directory)
        load_release(directory, expected=manifest)
    if active is not None:
        record = registry.get(active.release_id)
        assert record.state is ReleaseState.ACTIVE
        load_release(record.directory, expected=record.manifest)
    states = [record.state for record in registry.list("toy")]
    assert states.count(ReleaseState.ACTIVE) == (1 if active is not None else 0)


def test_every_step_of_a_trainer_is_one_of_them() -> None:
    named = {point for points in STEPS for point in points}
    assert named == {name for name in NAMES if name.startswith("trainer.")} | {"releases.before_rename"}


@pytest.mark.timeout(600)
def test_a_trainer_killed_at_any_step_leaves_nothing_half_published_and_the_next_one_goes_on(
    engine, world: World, database_url: str, tmp_path: Path  # noqa: F811
):
    _add(engine, world, "train", range(10))
    _add(engine, world, "validation", range(12))
    registry, root = ReleaseRegistry(engine), tmp_path / "releases"
    trainers = Trainers(database_url, tmp_path, 10 + len(STEPS))
    try:
        for number, points in enumerate(STEPS):
            _add(engine, world, "train", range(10 + number, 11 + number))  # a reason to refresh
            before = registry.active("toy")
            for point in points:
                assert trainers.run(point) == -signal.SIGKILL, point
                whole(engine, root)
            assert trainers.run() == 0, f"the trainer after {points}"
            whole(engine, root)
            active = registry.active("toy")
            assert active is not None and (before is None or active.epoch == before.epoch + 1), points
            assert registry.get(active.release_id).manifest.labels.queries == 23 + number, points
        unfinished = [r for r in registry.list("toy") if r.state in (ReleaseState.BUILT, ReleaseState.VALIDATED)]
        assert unfinished == []
        given_up = [r.reason for r in registry.list("toy") if (r.reason or "").startswith("ABANDONED")]
        assert sorted(given_up) == [
            "ABANDONED: its trainer ended before it was judged",
            "ABANDONED: its trainer ended before it was registered",
            "ABANDONED: its trainer ended before it was registered",
        ]
    finally:
        trainers.close()
    # What the killed builder left is found by its lock, whatever its age, and goes with the next collection.
    assert len(list(root.glob(f"{BUILDING}*"))) == 1
    GarbageCollector(engine, root, KeepRule(), young_s=0.0).collect("toy", datetime.now(UTC))
    assert list(root.glob(".*")) == []


@pytest.mark.timeout(600)
def test_a_collection_killed_at_any_step_is_finished_by_the_next_and_never_touches_what_answers(
    engine, world: World, database_url: str, tmp_path: Path  # noqa: F811
):
    _add(engine, world, "train", range(10))
    _add(engine, world, "validation", range(12))
    registry, root = ReleaseRegistry(engine), tmp_path / "releases"
    trainers = Trainers(database_url, tmp_path, 30)
    try:
        assert trainers.run() == 0
        for number, point in enumerate(["none", *COLLECTING]):
            _add(engine, world, "train", range(10 + number, 11 + number))
            # The third release makes the first one superfluous: active and previous stay.
            assert trainers.run(point) == (0 if point == "none" else -signal.SIGKILL), point
            whole(engine, root)
        _add(engine, world, "train", range(20, 21))
        assert trainers.run() == 0
    finally:
        trainers.close()
    active = registry.active("toy")
    assert active is not None
    kept = {active.release_id, active.previous_release_id}
    assert {path.name for path in root.iterdir()} == kept
    assert not list(root.glob(f"{REMOVING}*"))
    assert {r.release_id for r in registry.list("toy") if r.collected_at is None} == kept


def fitted_set(place: Path) -> None:
    """A sketch set of all items, as ``byline sketches fit`` makes one."""
    directions = PackedDirections.pack([torch.randn(8, 4, generator=torch.Generator().manual_seed(0))], 16)
    settings = UnlearningSettings(corpus_size=ITEMS, query_draws=8, item_draws=8)
    basis = SketchBasis(Coordinates({"layer": torch.arange(8)}), directions, "rev1", "all", "curvature", settings)
    SketchSet(basis, np.arange(ITEMS), np.ones((ITEMS, 4), np.float32), {}, "sketch/1").save(place)


@pytest.mark.timeout(600)
def test_a_purge_killed_at_any_step_is_finished_by_the_next_trainer_which_alone_closes_the_receipt(
    engine, world: World, database_url: str, tmp_path: Path  # noqa: F811
):
    _add(engine, world, "train", range(10))
    _add(engine, world, "validation", range(12))
    catalog, root, teachers = CatalogStore(engine), tmp_path / "releases", tmp_path / "cache" / "teachers-rev1"
    places = Places(root, tmp_path / "cache", BlobStore(tmp_path / "blobs"))
    fitted_set(teachers / "sketches-all")
    trainers, gone = Trainers(database_url, tmp_path, 10), set()
    try:
        assert trainers.run() == 0
        for item_id, point in enumerate(PURGING):
            (receipt_id,) = catalog.withdraw([item_id]).receipts
            gone.add(item_id)
            # The corpus changed: a release without the item, and then the purge.
            assert trainers.run(point) == -signal.SIGKILL, point
            whole(engine, root)
            assert catalog.receipt(receipt_id).purged_at is None, point
            assert trainers.run() == 0, point
            whole(engine, root)
            receipt = catalog.receipt(receipt_id)
            assert receipt.purged_at is not None, point
            found = check_absence(engine, places, receipt)
            assert found.absent, (point, found.to_json())
            held = SketchSet.load(teachers / "sketches-all", "rev1").item_ids.tolist()
            assert held == [other for other in range(ITEMS) if other not in gone], point
            assert [path.name for path in teachers.iterdir()] == ["sketches-all"], point
            assert list(root.glob(".*")) == [], point
    finally:
        trainers.close()
