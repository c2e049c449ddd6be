"""Stage ``estimate`` on a real database, with sketches fitted on a tiny model, from a real release."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byline.catalog.decode import decode_image
from byline.jobs import Claim, Job, NewJob, Stage, State, Tier, Verification
from byline.jobs.runner import Beat, Outcome, RunOutcome
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.releases.sketches import SketchParts, section_of
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet
from services.workers.answer import retrieved_answer, retrieved_influence
from services.workers.estimation import EstimateStage, OpenReleases

from .conftest import Bench, png

DRAWS = 16
NOTHING_ELSE = {"item_draws": 16, "noise": "shared"}


def teacher_items(bench: Bench) -> list[TeacherItem]:
    return [
        TeacherItem(one.item_id, decode_image(bench.blobs.get(one.image_sha256)), one.caption) for one in bench.items
    ]


@pytest.fixture
def sketches(bench: Bench, tmp_path: Path) -> SketchSet:
    linear = bench.teachers.teacher("abu_plus_linear", 16, overrides=NOTHING_ELSE)
    assert isinstance(linear, AbuPlusLinear)
    found = fit_sketches(
        linear, teacher_items(bench), dimensions=5, coordinates=400, token_rank=0, store=tmp_path / "fit"
    )
    found.save(tmp_path / "sketches")
    return SketchSet.load(tmp_path / "sketches", bench.teachers.model_revision)


@pytest.fixture
def publish(bench: Bench, sketches: SketchSet, tmp_path: Path) -> Callable[..., str]:
    """Build, register and activate a release of the six items, with sketches unless told otherwise."""
    registry = ReleaseRegistry(bench.engine)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((len(bench.items), 8)).astype(np.float32)
    head = Head(HeadConfig(8, feature_blocks(["minilm"], [8]), hidden=(4,), out_dim=4))
    head.initialise(features, features, torch.Generator().manual_seed(0))

    def make(release_id: str, with_sketches: bool = True) -> str:
        section = section_of(
            teacher_id=sketches.teacher_id, dimensions=sketches.basis.dimensions, selection=sketches.basis.selection,
            query_draws=DRAWS, fidelity={},
        )  # fmt: skip
        parts = SketchParts(sketches.item_ids, sketches.sketches, sketches.basis, section)
        directory = build_release(
            tmp_path / "releases", release_id=release_id, model_id="tiny",
            model_revision=bench.teachers.model_revision, corpus_id="tiny", head=head, feature_spec="minilm",
            preprocessing_hash="h", item_ids=[one.item_id for one in bench.items], item_features=features,
            catalogue=bench.items, calibrator={}, metrics={}, parent=None, labels={"queries": 0, "digest": ""},
            teacher_id="t", golden_features=features[:1], created_at=datetime(2026, 1, 1, tzinfo=UTC),
            sketches=parts if with_sketches else None,
        )  # fmt: skip
        registry.register(ReleaseManifest.read(directory), directory)
        registry.activate("tiny", release_id)
        return release_id

    return make


@pytest.fixture
def estimate(bench: Bench) -> EstimateStage:
    return EstimateStage(
        store=bench.jobs,
        releases=OpenReleases(ReleaseRegistry(bench.engine), "tiny"),
        bench=bench.teachers,
        blobs=bench.blobs,
        withdrawn=bench.withdrawn,
        draws=DRAWS,
        clock=time.perf_counter,
    )


def looked_up(bench: Bench, release: str, *, top_k: int = 4, revision: str | None = None, **more: Any) -> Job:
    """An ESTIMATED job whose lookup named items 1 and 2 only."""
    job, _ = bench.jobs.create(
        NewJob(
            project_id="p", request_id=uuid.uuid4().hex, model_id="tiny", prompt="a red cat", tier=Tier.ESTIMATED,
            top_k=top_k, **({"image_sha256": bench.blobs.put(png(100))} | more),
        )
    )  # fmt: skip
    named = [
        retrieved_influence(item, rank=rank, cosine=1 - rank / 10, probability=None)
        for rank, item in enumerate(bench.items[:2], start=1)
    ]
    answer = retrieved_answer(
        named, top_k=top_k, release_id=release, model_revision=revision or bench.teachers.model_revision,
        not_attributable=False, noise_floor=None, timings_ms={},
    )  # fmt: skip

    def lookup(_claim: Claim, _beat: Beat) -> Outcome:
        return Outcome(answer)

    assert bench.runner("lookup").run(job.id, Stage.LOOKUP, lookup, release) is RunOutcome.COMPLETED
    return job


def estimated(bench: Bench, job: Job) -> dict[str, Any]:
    return dict(bench.jobs.results(job.id)[Stage.ESTIMATE].result)


def test_the_whole_corpus_is_ranked_as_the_sketch_teacher_ranks_it(
    bench: Bench, sketches: SketchSet, publish: Callable[..., str], estimate: EstimateStage
) -> None:
    job = looked_up(bench, publish("r1"), top_k=6)
    assert bench.runner().run(job.id, Stage.ESTIMATE, estimate) is RunOutcome.COMPLETED
    answer = estimated(bench, job)
    linear = bench.teachers.teacher("abu_plus_linear", 16, overrides=NOTHING_ELSE)
    assert isinstance(linear, AbuPlusLinear)
    teacher = SketchTeacher(bench.teachers.model, linear.curvature, sketches.basis, sketches, query_draws=DRAWS)
    picture: Image.Image = decode_image(bench.blobs.get(str(job.image_sha256)))
    ranking = teacher.score(TeacherQuery(picture, job.prompt), teacher_items(bench))
    assert [int(one["item_id"]) for one in answer["influences"]] == ranking.order().tolist()
    by_id = dict(zip(ranking.item_ids.tolist(), zip(ranking.tau, ranking.standard_error, strict=True), strict=True))
    for one in answer["influences"]:
        tau, error = by_id[int(one["item_id"])]
        assert one["tau"] == pytest.approx(float(tau), rel=1e-4)
        assert one["standard_error"] == pytest.approx(float(error), rel=1e-3) and one["standard_error"] > 0
        assert one["retrieved_rank"] == {"1": 1, "2": 2}.get(one["item_id"])
    assert (answer["tier"], answer["release_id"], answer["draws"]) == ("ESTIMATED", "r1", DRAWS)
    assert answer["teacher_id"] == ranking.teacher_id and answer["timings_ms"]["total"] > 0
    assert bench.jobs.find(job.id).state is State.SUCCEEDED  # type: ignore[union-attr]


def test_a_withdrawn_item_makes_room_for_the_next(
    bench: Bench, publish: Callable[..., str], estimate: EstimateStage
) -> None:
    release = publish("r1")
    before = looked_up(bench, release, top_k=3)
    bench.runner().run(before.id, Stage.ESTIMATE, estimate)
    first = [one["item_id"] for one in estimated(bench, before)["influences"]]
    bench.catalog.withdraw([int(first[0])])
    after = looked_up(bench, release, top_k=3)
    bench.runner().run(after.id, Stage.ESTIMATE, estimate)
    found = [one["item_id"] for one in estimated(bench, after)["influences"]]
    assert len(found) == 3 and found[:2] == first[1:]


def test_a_job_is_answered_by_its_release_after_another_one_became_active(
    bench: Bench, publish: Callable[..., str], estimate: EstimateStage
) -> None:
    old = looked_up(bench, publish("r1"))
    new = looked_up(bench, publish("r2"))
    for job, release in ((new, "r2"), (old, "r1")):
        assert bench.runner().run(job.id, Stage.ESTIMATE, estimate) is RunOutcome.COMPLETED
        assert estimated(bench, job)["release_id"] == release


@pytest.mark.parametrize("policy", list(Verification))
def test_a_release_without_sketches_refuses_and_best_effort_keeps_the_lookup(
    bench: Bench, publish: Callable[..., str], estimate: EstimateStage, policy: Verification
) -> None:
    job = looked_up(bench, publish("r1", with_sketches=False), verification=policy)
    assert bench.runner().run(job.id, Stage.ESTIMATE, estimate) is RunOutcome.FAILED
    ended = bench.jobs.find(job.id)
    assert ended is not None
    error = ended.error or estimated(bench, job)["verification_error"]
    assert error["reason"] == "TIER_NOT_AVAILABLE" and "r1 has no sketches" in error["message"]
    assert ended.state is (State.FAILED if policy is Verification.REQUIRED else State.SUCCEEDED)


def test_an_answer_of_another_revision_and_an_embedding_are_not_estimated(
    bench: Bench, publish: Callable[..., str], estimate: EstimateStage
) -> None:
    release = publish("r1")
    for job, reason in (
        (looked_up(bench, release, revision="older"), "MODEL_MISMATCH"),
        (looked_up(bench, release, image_sha256=None, embedding=(1.0, 0.0)), "INVALID_REQUEST"),
    ):
        assert bench.runner().run(job.id, Stage.ESTIMATE, estimate) is RunOutcome.FAILED
        assert bench.jobs.find(job.id).error["reason"] == reason  # type: ignore[union-attr,index]


def test_a_cancelled_estimate_stops_within_its_gradient(
    bench: Bench, publish: Callable[..., str], estimate: EstimateStage
) -> None:
    job = looked_up(bench, publish("r1"))

    def cancelled(claim: Claim, beat: Beat) -> Outcome:
        bench.jobs.cancel("p", job.id)
        beat.cancelled = bench.jobs.heartbeat(claim, 0, 1, 30.0)
        return estimate(claim, beat)

    assert bench.runner().run(job.id, Stage.ESTIMATE, cancelled) is RunOutcome.CANCELLED
    assert Stage.ESTIMATE not in bench.jobs.results(job.id)
