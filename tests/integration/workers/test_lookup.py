"""Stage ``lookup`` and the release it answers from, on a real registry with a tiny model's own features."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byline.catalog.decode import decode_image
from byline.catalog.store import CatalogStore
from byline.config import load_settings
from byline.db import make_engine, migrate
from byline.diffusion.model import DiffusionModel
from byline.features import FeatureExtractor, load_extractor
from byline.jobs import Claim, Job, NewJob, Stage, State, Tier
from byline.jobs.batch import BatchRunner
from byline.jobs.runner import Beat, Outcome, RunOutcome
from byline.jobs.store import JobStore
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release
from byline.releases.delta import DeltaStore
from byline.releases.delta_view import Deltas
from byline.releases.labelled import LabelledPlaces
from byline.releases.manifest import HEAD, ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.releases.sketches import SketchParts
from services.workers.child import WorkerChild
from services.workers.feature_memory import FeatureMemory
from services.workers.lookup import LookupStage
from services.workers.serving import Serving
from services.workers.withdrawal import WithdrawnItems

from .conftest import Bench, png

FEATURES = "denoiser"


@pytest.fixture(scope="session")
def extractor(tiny_model: Path) -> FeatureExtractor:
    return load_extractor(FEATURES, model=DiffusionModel.load(tiny_model))


class World:
    """A bench with releases to publish and one lookup worker's serving."""

    def __init__(self, bench: Bench, extractor: FeatureExtractor, tiny_model: Path, root: Path, url: str) -> None:
        self.bench = bench
        self.registry = ReleaseRegistry(bench.engine)
        self.root = root
        self.model_directory = tiny_model
        self.extractor = extractor
        self.changed = threading.Event()
        self.serving = Serving(
            registry=self.registry,
            settings=load_settings(
                database_url=url, state_dir=root, model_id="tiny", corpus_id="tiny", model_directory=tiny_model
            ),
            stop=bench.stop,
            changed=self.changed.set,
        )
        self.lookup = LookupStage(
            serving=self.serving,
            blobs=bench.blobs,
            withdrawn=WithdrawnItems(bench.withdrawn, time.monotonic),
            max_image_bytes=1 << 20,
            max_image_pixels=1 << 20,
            clock=time.perf_counter,
            deltas=Deltas(DeltaStore(bench.engine), time.monotonic, keep_s=0.0),
        )

    def publish(
        self, release_id: str, seed: int = 1, preprocessing_hash: str | None = None, head: Head | None = None,
        labelled: LabelledPlaces | None = None, sketches: SketchParts | None = None,
    ) -> Path:  # fmt: skip
        """Build and register a release of the bench's items, with a head of its own or a given one."""
        items = self.bench.items
        images = [decode_image(self.bench.blobs.get(item.image_sha256)) for item in items]
        features = self.extractor.extract(images, [item.caption for item in items])
        blocks = feature_blocks(self.extractor.spec.encoders, self.extractor.dims)
        if head is None:
            head = Head(HeadConfig(self.extractor.dim, blocks, (8,), 4, 0.0))
            head.initialise(features, features, torch.Generator().manual_seed(seed))
        directory = build_release(
            self.root / "releases",
            release_id=release_id,
            model_id="tiny",
            model_revision=DiffusionModel.load(self.model_directory).revision,
            corpus_id="tiny",
            head=head,
            feature_spec=FEATURES,
            preprocessing_hash=preprocessing_hash or self.extractor.preprocessing_hash,
            item_ids=np.array([item.item_id for item in items]),
            item_features=features,
            catalogue=items,
            calibrator={},
            metrics={},
            parent=None,
            labels={"queries": 0, "digest": ""},
            teacher_id="none",
            golden_features=features[:1],
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            labelled=labelled,
            sketches=sketches,
        )
        self.registry.register(ReleaseManifest.read(directory), directory)
        return directory

    def job(self, **changes: Any) -> Job:
        """A lookup job for the third item's own picture and caption."""
        item = self.bench.items[2]
        new = NewJob(
            project_id="p",
            request_id=uuid.uuid4().hex,
            model_id="tiny",
            prompt=item.caption,
            image_sha256=item.image_sha256,
            top_k=3,
        )
        return self.bench.jobs.create(replace(new, **changes))[0]

    def run(self, job: Job) -> RunOutcome:
        """As the child does it: the current release is pinned by the claim."""
        return self.bench.runner().run(job.id, Stage.LOOKUP, self.lookup, self.serving.current_id())

    def answer(self, job: Job) -> dict[str, Any]:
        return dict(self.bench.jobs.results(job.id)[Stage.LOOKUP].result)

    def row(self, job: Job) -> Job:
        found = self.bench.jobs.find(job.id)
        assert found is not None
        return found


@pytest.fixture
def world(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str
) -> Iterator[World]:
    made = World(bench, extractor, tiny_model, tmp_path, database_url)
    made.publish("r1")
    made.registry.activate("tiny", "r1")
    made.serving.start()
    yield made
    bench.stop.set()
    made.serving.close()


def swapped_to(world: World, release_id: str) -> None:
    """Wait for the watch: it hears of an activation by itself."""
    while world.serving.state().release_id != release_id:
        assert world.changed.wait(20), f"{release_id} was not swapped in: {world.serving.state()}"
        world.changed.clear()


def test_a_corpus_image_is_its_own_first_influence(world: World) -> None:
    job = world.job()
    assert world.run(job) is RunOutcome.COMPLETED
    answer = world.answer(job)
    first = answer["influences"][0]
    assert (first["item_id"], first["rank"], first["creator"]) == ("3", 1, "artist 3")
    assert len(answer["influences"]) == 3
    assert answer["release_id"] == "r1" == world.row(job).release_id
    assert set(answer["timings_ms"]) == {"decode", "encode", "head", "search", "total"}


def test_a_withdrawn_item_leaves_room_for_the_next(world: World) -> None:
    world.bench.catalog.withdraw([3])
    job = world.job()
    world.run(job)
    ids = [one["item_id"] for one in world.answer(job)["influences"]]
    assert "3" not in ids and len(ids) == 3


def test_an_item_withdrawn_during_the_search_is_not_in_the_answer(world: World) -> None:
    job = world.job()

    def withdraw_meanwhile(claim: Claim, beat: Beat) -> Outcome:
        outcome = world.lookup(claim, beat)
        world.bench.catalog.withdraw([3])
        return outcome

    runner = world.bench.runner()
    assert runner.run(job.id, Stage.LOOKUP, withdraw_meanwhile, "r1") is RunOutcome.RETRIED
    assert world.bench.jobs.results(job.id) == {}


def test_a_verified_job_leaves_its_candidates_for_the_teacher(world: World) -> None:
    job = world.job(tier=Tier.VERIFIED, candidates=5)
    world.run(job)
    answer = world.answer(job)
    assert len(answer["influences"]) == 3 and len(answer["candidates"]) == 2
    assert world.row(job).stage is Stage.VERIFY


def test_a_ready_embedding_gives_the_same_answer_as_its_image(world: World) -> None:
    with world.serving.pinned("r1") as served:
        item = world.bench.items[2]
        embedding = served.embed(decode_image(world.bench.blobs.get(item.image_sha256)), item.caption)
    from_image, from_embedding = world.job(), world.job(image_sha256=None, embedding=tuple(map(float, embedding)))
    for job in (from_image, from_embedding):
        assert world.run(job) is RunOutcome.COMPLETED
    ids = [[one["item_id"] for one in world.answer(job)["influences"]] for job in (from_image, from_embedding)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("embedding", "made_by"), [((1.0, 2.0), "r1"), ((1.0, 0.0, 0.0, 0.0, 1.0), "an-older-release")]
)
def test_an_embedding_that_does_not_belong_to_the_release_is_refused(
    world: World, embedding: tuple[float, ...], made_by: str
) -> None:
    job = world.job(image_sha256=None, embedding=embedding, payload={"embedding_release_id": made_by})
    assert world.run(job) is RunOutcome.FAILED
    assert world.row(job).error["reason"] == "INVALID_REQUEST"  # type: ignore[index]


def test_a_broken_image_fails_at_once_and_the_worker_goes_on(world: World) -> None:
    broken = world.job(image_sha256=world.bench.blobs.put(png(1)[:40]))
    assert world.run(broken) is RunOutcome.FAILED
    assert world.row(broken).error["reason"] == "IMAGE_UNDECODABLE"  # type: ignore[index]
    assert world.run(world.job()) is RunOutcome.COMPLETED


def test_a_swap_is_heard_and_the_next_claim_is_pinned_to_the_new_release(world: World) -> None:
    before = world.job()
    world.run(before)
    world.publish("r2", seed=2)
    world.registry.activate("tiny", "r2")
    swapped_to(world, "r2")
    after = world.job()
    world.run(after)
    assert [world.answer(job)["release_id"] for job in (before, after)] == ["r1", "r2"]


def test_a_retried_job_keeps_the_release_of_its_first_claim(world: World) -> None:
    job = world.job()
    claim = world.bench.jobs.claim(job.id, Stage.LOOKUP, "w0", 30.0, "r1")
    assert claim is not None
    world.bench.jobs.release(claim)
    world.publish("r2", seed=2)
    world.registry.activate("tiny", "r2")
    swapped_to(world, "r2")
    assert world.run(job) is RunOutcome.COMPLETED
    assert world.answer(job)["release_id"] == "r1"


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_serving_and_is_reported(world: World) -> None:
    directory = world.publish("r2", seed=2)
    (directory / HEAD).chmod(0o644)
    directory.chmod(0o755)
    (directory / HEAD).write_bytes(b"not a head")
    world.registry.activate("tiny", "r2")
    deadline = time.monotonic() + 30
    pause = threading.Event()
    while world.serving.state().error is None and time.monotonic() < deadline:
        pause.wait(0.05)
    state = world.serving.state()
    assert state.release_id == "r1"
    assert state.error is not None and "RELEASE_CORRUPT" in state.error
    job = world.job()
    assert world.run(job) is RunOutcome.COMPLETED
    assert world.answer(job)["release_id"] == "r1"


def test_a_release_made_with_other_preprocessing_is_never_served(world: World) -> None:
    world.publish("r2", seed=2, preprocessing_hash="0123456789abcdef")
    world.registry.activate("tiny", "r2")
    deadline = time.monotonic() + 30
    pause = threading.Event()
    while world.serving.state().error is None and time.monotonic() < deadline:
        pause.wait(0.05)
    assert world.serving.state().release_id == "r1"
    assert "FEATURE_MISMATCH" in (world.serving.state().error or "")


def test_without_a_release_a_lookup_waits_for_another_attempt(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str
) -> None:
    world = World(bench, extractor, tiny_model, tmp_path, database_url)
    job = world.job()
    assert world.run(job) is RunOutcome.RETRIED
    assert world.row(job).state is State.QUEUED
    assert world.row(job).error["reason"] == "NO_ACTIVE_RELEASE"  # type: ignore[index]


def test_a_job_of_another_model_is_refused_and_not_answered_from_this_release(world: World) -> None:
    job = world.job(model_id="another")
    assert world.run(job) is RunOutcome.FAILED
    assert world.row(job).error["reason"] == "MODEL_MISMATCH"  # type: ignore[index]
    assert world.bench.jobs.results(job.id) == {}


def child_of(world: World, url: str, queue: str = "lookup", **changes: Any) -> WorkerChild:
    """A child as the parent process makes it, with a stop of its own; close it."""
    settings = load_settings(
        database_url=url, state_dir=world.root, model_id="tiny", corpus_id="tiny", feature_spec=FEATURES,
        blob_dir=world.bench.blobs.root, **{"model_directory": world.model_directory, **changes},
    )  # fmt: skip
    return WorkerChild(queue, settings, "w1", threading.Event())


def test_a_release_whose_loading_crashes_costs_no_job_and_is_served_once_it_loads(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    job = world.job()
    child = child_of(world, database_url)
    try:
        with monkeypatch.context() as patched:
            patched.setattr("services.workers.serving.load_release", crashes)
            child.start()
            for _ in range(world.row(job).max_attempts + 1):
                child.handle(str(job.id), Stage.LOOKUP)
            assert (world.row(job).state, world.row(job).attempt) == (State.QUEUED, 0)
        child.handle(str(job.id), Stage.LOOKUP)
        assert world.row(job).state is State.SUCCEEDED
    finally:
        child.close()


def test_a_generator_that_cannot_be_loaded_costs_no_verification(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    job = world.job(tier=Tier.VERIFIED, candidates=3)
    assert world.run(job) is RunOutcome.COMPLETED
    child = child_of(world, database_url, "verification", verify_draws=16)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(DiffusionModel, "load", crashes)
            child.start()
            for _ in range(world.row(job).max_attempts + 1):
                child.handle(str(job.id), Stage.VERIFY)
            assert (world.row(job).state, world.row(job).stage) == (State.QUEUED, Stage.VERIFY)
        child.handle(str(job.id), Stage.VERIFY)
        assert world.row(job).state is State.SUCCEEDED
    finally:
        child.close()


def test_a_child_that_starts_before_the_migrations_serves_after_them(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, empty_database_url: str
) -> None:
    engine = make_engine(empty_database_url, 5)
    late = replace(bench, engine=engine, jobs=JobStore(engine, {}), catalog=CatalogStore(engine))
    world = World(late, extractor, tiny_model, tmp_path, empty_database_url)
    child = child_of(world, empty_database_url)
    try:
        child.start()
        child.handle(str(uuid.uuid4()), Stage.LOOKUP)
        migrate(empty_database_url)
        late.catalog.add_corpus("tiny")
        late.catalog.add_items("tiny", late.items)
        world.publish("r1")
        world.registry.activate("tiny", "r1")
        job = world.job()
        child.handle(str(job.id), Stage.LOOKUP)
        assert world.row(job).state is State.SUCCEEDED
    finally:
        child.close()
        engine.dispose()


# --- several at once, and what is remembered ---------------------------------------------------------------


def batch_runner(world: World) -> BatchRunner:
    """As the child has one; batches as large as they may be."""
    runner = BatchRunner(world.bench.jobs, "w1", 30.0, time.monotonic, stop=world.bench.stop)
    runner._mean_s = 0.0
    return runner


def take_all(world: World) -> int:
    return batch_runner(world).run_waiting(Stage.LOOKUP, world.lookup, world.serving.current_id())


def test_an_answer_does_not_depend_on_the_batch_it_was_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit: cosines, ranks and items of each job alone and of all together."""
    alone = []
    for item in world.bench.items:
        job = world.job(image_sha256=item.image_sha256, prompt=item.caption)
        assert world.run(job) is RunOutcome.COMPLETED
        alone.append(world.answer(job)["influences"])
    monkeypatch.setattr(world.lookup, "_features", FeatureMemory())  # nothing remembered
    jobs = [world.job(image_sha256=item.image_sha256, prompt=item.caption) for item in reversed(world.bench.items)]
    assert take_all(world) == len(jobs)
    assert [world.answer(job)["influences"] for job in reversed(jobs)] == alone
    assert all(world.row(job).state is State.SUCCEEDED for job in jobs)


def test_a_picture_asked_for_again_is_not_decoded_again_and_answered_alike(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.job()
    world.run(first)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr("services.workers.lookup.decode_untrusted", never)
    again, other = world.job(top_k=2), world.job(prompt="another prompt")
    assert world.run(again) is RunOutcome.COMPLETED
    assert world.answer(again)["influences"] == world.answer(first)["influences"][:2]
    assert world.run(other) is not RunOutcome.COMPLETED


def test_what_is_remembered_of_a_picture_serves_the_next_release_with_its_own_head(world: World) -> None:
    before = world.job()
    world.run(before)
    world.publish("r2", seed=2)
    world.registry.activate("tiny", "r2")
    swapped_to(world, "r2")
    remembered = world.job()
    world.run(remembered)
    world.lookup._features = FeatureMemory()
    anew = world.job()
    world.run(anew)
    assert world.answer(remembered)["release_id"] == "r2"
    assert world.answer(remembered)["influences"] == world.answer(anew)["influences"]


def test_a_withdrawal_nobody_told_the_worker_of_is_in_no_answer(world: World) -> None:
    """The set the search leaves out is remembered; the look inside the completing transaction is not."""
    assert world.run(world.job()) is RunOutcome.COMPLETED  # the set is remembered now
    world.bench.catalog.withdraw([3])
    named, unaffected = world.job(), world.job(top_k=1, image_sha256=world.bench.items[0].image_sha256,
                                               prompt=world.bench.items[0].caption)  # fmt: skip
    assert take_all(world) == 2
    assert world.row(unaffected).state is State.SUCCEEDED
    assert (world.row(named).state, world.bench.jobs.results(named.id)) == (State.QUEUED, {})
    assert world.run(named) is RunOutcome.COMPLETED  # its second attempt: by doorbell, with a fresh set
    assert "3" not in [one["item_id"] for one in world.answer(named)["influences"]]


def test_a_worker_takes_a_lookup_without_any_doorbell(world: World, database_url: str) -> None:
    child = child_of(world, database_url)
    try:
        child.start()
        jobs = [world.job(), world.job(), world.job()]
        ends = time.monotonic() + 60
        pause = threading.Event()
        while not all(world.row(job).state is State.SUCCEEDED for job in jobs) and time.monotonic() < ends:
            pause.wait(0.02)
        assert [world.row(job).state for job in jobs] == [State.SUCCEEDED] * 3
        assert all(world.row(job).dispatched_at is None for job in jobs)
        child.handle(str(jobs[0].id), Stage.LOOKUP)  # the doorbell that comes late does nothing
        assert len(world.bench.jobs.events(jobs[0].id)) == 3
    finally:
        child.close()


def test_an_answer_says_how_far_its_query_is_from_everything_labelled(world: World) -> None:
    bench = world.bench
    own, other = bench.items[2], bench.items[3]
    image = decode_image(bench.blobs.get(own.image_sha256))
    row = world.extractor.extract([image], [own.caption])
    width = row.shape[1]
    places = LabelledPlaces(row / np.linalg.norm(row), np.zeros(width, np.float32), np.ones(width, np.float32), 0.05)
    world.publish("r2", labelled=places)
    world.registry.activate("tiny", "r2")
    swapped_to(world, "r2")
    known, strange = world.job(), world.job(prompt=other.caption, image_sha256=other.image_sha256)
    for job in (known, strange):
        world.run(job)
    near, far = world.answer(known), world.answer(strange)
    assert near["labelled_distance"] < 0.05 < far["labelled_distance"]
    assert near["labelled_distance_limit"] == far["labelled_distance_limit"] == pytest.approx(0.05)
