"""Promise 7 under fire: answers of every tier are asked for while items are withdrawn; afterwards nothing of them is in
any file."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from attribution.v1 import attribution_job_pb2 as wire
from byline.catalog.items import Item
from byline.config import load_settings
from byline.db.session import transaction
from byline.failpoints import VARIABLE, FailpointReached
from byline.features import FeatureExtractor
from byline.jobs import Job, Stage, Tier
from byline.jobs.runner import Work
from byline.ranker.head import load_head
from byline.rankings.features import LabelFeatures
from byline.rankings.store import RankingStore
from byline.releases.absence import absent_releases, check_absence
from byline.releases.delta import DeltaStore
from byline.releases.manifest import HEAD
from byline.releases.purge import Places, purge
from byline.releases.sketches import SketchParts, section_of
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.sketch_fit import fit_sketches
from services.gateway import reading
from services.gateway.context import GatewayContext, build_context
from services.trainer.additions import Additions
from services.workers.estimation import EstimateStage, OpenReleases
from services.workers.lookup import LookupStage
from services.workers.verification import VerifyStage
from services.workers.withdrawal import WithdrawnItems

from .conftest import Bench, png
from .test_estimation import DRAWS, NOTHING_ELSE, teacher_items
from .test_lookup import World, extractor  # noqa: F401 - a fixture

#: Ids that no other number in a file is likely to equal.
NEW = [2**50 + 7 * number for number in range(1, 13)]


@pytest.fixture
def world(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str  # noqa: F811
) -> Iterator[World]:
    made = World(bench, extractor, tiny_model, tmp_path, database_url)
    made.publish("r1")
    made.registry.activate("tiny", "r1")
    made.serving.start()
    yield made
    bench.stop.set()
    made.serving.close()


@pytest.fixture
def gateway(database_url: str, tmp_path: Path) -> Iterator[GatewayContext]:
    """What the gateway answers with, without its socket."""
    context = build_context(load_settings(database_url=database_url, state_dir=tmp_path, model_id="tiny"))
    yield context
    context.close()


def _named(gateway: GatewayContext, job_id: uuid.UUID, by_tier: dict[str, set[int]] | None = None) -> set[int]:
    message = reading.kept(gateway, "p", job_id)
    for answer in message.answers if by_tier is not None else ():
        by_tier.setdefault(wire.Tier.Name(answer.tier), set()).update(one.item_id for one in answer.influences)
    listed = [one for answer in message.answers for one in answer.influences]
    return {one.item_id for one in listed} | {item_id for one in listed for item_id in one.copies}


def _publish_next(world: World, release_id: str, sketches: SketchParts | None = None) -> None:
    world.publish(release_id, head=load_head(world.root / "releases" / "r1" / HEAD), sketches=sketches)
    world.registry.activate("tiny", release_id)
    world.serving._holder.refresh()


def _sketches(bench: Bench, folder: Path) -> SketchParts:
    """Of all items there are."""
    linear = bench.teachers.teacher("abu_plus_linear", DRAWS, overrides=NOTHING_ELSE)
    assert isinstance(linear, AbuPlusLinear)
    fitted = fit_sketches(
        linear, teacher_items(bench), dimensions=5, coordinates=400, token_rank=0, store=folder / "fit"
    )
    section = section_of(
        teacher_id=fitted.teacher_id, dimensions=fitted.basis.dimensions, selection=fitted.basis.selection,
        query_draws=DRAWS, fidelity={},
    )  # fmt: skip
    return SketchParts(fitted.item_ids, fitted.sketches, fitted.basis, section)


class Late:
    """What was withdrawn as of the call before: a stage learns of a withdrawal once it was refused for it."""

    def __init__(self, read: Callable[[], frozenset[int]]) -> None:
        self._read, self._known = read, read()

    def __call__(self) -> frozenset[int]:
        known, self._known = self._known, self._read()
        return known


class Hammer(threading.Thread):
    """Asks, answers as a worker does, reads as a client does, and reads old answers again.

    Every third job is one of ``slow``'s tier; ``one_at_a_time``, for there is one model.
    """

    def __init__(
        self, world: World, gateway: GatewayContext, acknowledged: set[int], number: int, slow: Tier,
        one_at_a_time: threading.Lock,
    ) -> None:  # fmt: skip
        super().__init__(daemon=True)
        self._world, self._gateway, self._acknowledged = world, gateway, acknowledged
        self.number = number
        self._rng = np.random.default_rng(number)
        self._stage = LookupStage(
            serving=world.serving, blobs=world.bench.blobs,
            # Its clock stands still: it learns of a withdrawal only by being refused, as if no word of it came.
            withdrawn=WithdrawnItems(world.bench.withdrawn, lambda: 0.0),
            max_image_bytes=1 << 20, max_image_pixels=1 << 20, clock=lambda: 0.0, deltas=world.lookup._deltas,
        )  # fmt: skip
        bench = world.bench
        self._slow_tier, self._one_at_a_time = slow, one_at_a_time
        self._slow: Mapping[Stage, Work] = {
            Stage.ESTIMATE: EstimateStage(
                store=bench.jobs, releases=OpenReleases(world.registry, "tiny"), bench=bench.teachers,
                blobs=bench.blobs, withdrawn=Late(bench.withdrawn), draws=DRAWS, clock=time.perf_counter,
            ),
            Stage.VERIFY: VerifyStage(
                store=bench.jobs, bench=bench.teachers, blobs=bench.blobs, withdrawn=Late(bench.withdrawn),
                teacher="abu_plus", draws=DRAWS, clock=time.perf_counter, racing=False,
            ),
        }  # fmt: skip
        self.named_by: dict[str, set[int]] = {}
        self.done = threading.Event()
        self.jobs: list[uuid.UUID] = []
        self.seen: set[int] = set()
        self.violations: list[set[int]] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        runner = self._world.bench.runner(f"hammer-{self.name}")
        try:
            while not self.done.is_set():
                job = self._asked(len(self.jobs))
                # A withdrawal between search and commit lets a stage run again: one attempt, then another.
                for _ in range(3):
                    runner.run(job.id, Stage.LOOKUP, self._stage, self._world.serving.current_id())
                if job.tier is self._slow_tier:
                    with self._one_at_a_time:
                        for _ in range(3):
                            for stage, work in self._slow.items():
                                runner.run(job.id, stage, work)
                self.jobs.append(job.id)
                for asked in (job.id, self.jobs[int(self._rng.integers(len(self.jobs)))]):
                    before = set(self._acknowledged)
                    named = _named(self._gateway, asked, self.named_by)
                    self.seen |= named
                    if named & before:
                        self.violations.append(named & before)
        except BaseException as error:  # told to the test, which would wait for nothing otherwise
            self.failure = error

    def _asked(self, number: int) -> Job:
        copies = {} if number % 4 == 1 else {"payload": {"copies": "apart"}}
        if number % 3:
            return self._world.job(top_k=20, **copies)
        few = {"candidates": 4, "top_k": 4} if self._slow_tier is Tier.VERIFIED else {"top_k": 20}
        return self._world.job(tier=self._slow_tier, **few, **copies)


def test_no_answer_names_an_item_after_its_withdrawal_was_acknowledged_and_then_no_file_does(
    world: World, gateway: GatewayContext, extractor: FeatureExtractor, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    bench = world.bench
    features = LabelFeatures(extractor, bench.blobs, tmp_path / "cache", "tiny")
    additions = Additions(bench.engine, "tiny", lambda manifest: features)
    items = [Item(item_id, f"a cat w{item_id % 97}", creator="zoe" if n % 2 else "ann", image_sha256=bench.blobs.put(
        png(item_id % 1009))) for n, item_id in enumerate(NEW)]  # fmt: skip
    bench.catalog.add_items("tiny", items[:8])
    additions.catch_up_all()
    bench.items.extend(items[:8])
    _publish_next(world, "r2", _sketches(bench, tmp_path))
    bench.catalog.add_items("tiny", items[8:])  # these are in the delta of r2
    additions.catch_up_all()
    _label(world, items)

    acknowledged: set[int] = set()
    one_at_a_time = threading.Lock()
    hammers = [
        Hammer(world, gateway, acknowledged, number, slow, one_at_a_time)
        for number, slow in enumerate((Tier.ESTIMATED, Tier.VERIFIED))
    ]
    for hammer in hammers:
        hammer.start()
    receipts = []
    try:
        for item_id in (NEW[0], NEW[3], NEW[8], NEW[11]):
            _until(lambda wanted=item_id: all(wanted in h.seen or h.failure for h in hammers))
            receipts.append(bench.catalog.withdraw([item_id]))
            acknowledged.add(item_id)
            enough = [len(hammer.jobs) + 3 for hammer in hammers]  # one of them is slow
            _until(lambda enough=enough: all(len(h.jobs) >= enough[h.number] or h.failure for h in hammers))
    finally:
        for hammer in hammers:
            hammer.done.set()
        for hammer in hammers:
            hammer.join(60)
    assert [hammer.failure for hammer in hammers] == [None, None]
    assert [hammer.violations for hammer in hammers] == [[], []]
    # What was withdrawn had been in answers of the slow tiers, too: an estimate names every item of its release.
    assert hammers[0].named_by["TIER_ESTIMATED"] >= {NEW[0], NEW[3]} and hammers[1].named_by["TIER_VERIFIED"]

    # Before the next release nothing is purged, and the check says where the items are.
    places = Places(tmp_path / "releases", tmp_path / "cache", bench.blobs)
    kept = [bench.catalog.receipt(one.receipts[0]) for one in receipts]
    assert purge(bench.engine, places, "tiny").waiting == {"tiny": "r2"}
    found = check_absence(bench.engine, places, kept[0])
    assert found.releases["r2"]["catalogue.parquet"] == found.releases["r2"]["embeddings.faiss"] == 1
    assert found.rows["rankings"] == 1 and found.rows["results"] > 0 and found.images == 1
    assert sum(found.features.values()) == 1 and found.files
    assert not found.absent

    bench.items[:] = [item for item in [*bench.items, *items[8:]] if item.item_id not in acknowledged]
    _publish_next(world, "r3")
    additions.catch_up_all()
    for place in ("corpus.purge_after_rows", "corpus.purge_after_files"):  # interrupted, it is simply run again
        monkeypatch.setenv(VARIABLE, f"{place}=raise")
        with pytest.raises(FailpointReached):
            purge(bench.engine, places, "tiny")
    monkeypatch.delenv(VARIABLE)
    report = purge(bench.engine, places, "tiny")
    assert report.done and report.removed_releases == ["r2"]
    assert ("tiny", "r3") in report.absent_from
    for receipt in kept:
        after = check_absence(bench.engine, places, receipt)
        assert after.absent, after.to_json()
        assert set(absent_releases(after)) == {"r1", "r3"} and after.ids == 1 and after.searched > 0
        assert bench.catalog.receipt(receipt.receipt_id).purged_at is not None
    # What was not withdrawn is all there: answers, labels, features, images.
    job = hammers[0].jobs[0]
    assert not _named(gateway, job) & acknowledged and _named(gateway, job)
    (ranking,) = RankingStore(bench.engine).load("tiny", "t")
    left = [item.item_id for item in items if item.item_id not in acknowledged]
    assert ranking.item_ids.tolist() == left
    np.testing.assert_array_equal(ranking.tau, np.array([item_id % 97 for item_id in left], np.float32))
    rows = features.encode_items([item for item in items if item.item_id in left])
    assert np.abs(rows).sum(axis=1).all()
    assert all(bench.blobs.exists(item.image_sha256) for item in bench.items)
    assert purge(bench.engine, places, "tiny").receipts == 0


class _Labels:
    """A teacher's ranking of the new items."""

    def __init__(self, items: list[Item]) -> None:
        self.item_ids = np.array([item.item_id for item in items], np.int64)
        self.tau = (self.item_ids % 97).astype(np.float32)
        self.standard_error = np.ones(len(items), np.float32)
        self.tau_halves = np.stack([self.tau, self.tau + 1]).astype(np.float32)
        self.samples = np.ones(len(items), np.int32)
        self.draws, self.teacher_id, self.candidate_set = 2, "t", "corpus"


def _label(world: World, items: list[Item]) -> None:
    store = RankingStore(world.bench.engine)
    with transaction(world.bench.engine) as connection:
        query = store.add_query(connection, model_id="tiny", prompt="a cat", seed=1, split="train",
                                near_duplicate_group=1, image_sha256="0" * 64, source="corpus")  # fmt: skip
        assert store.add_ranking(connection, query, _Labels(items))
    assert DeltaStore(world.bench.engine).ids("r2") == set(NEW[8:])


def _until(condition, patience_s: float = 120.0) -> None:
    deadline = threading.Event()
    timer = threading.Timer(patience_s, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set(), "it never came"
            deadline.wait(0.02)
    finally:
        timer.cancel()
