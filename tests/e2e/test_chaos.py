"""``make chaos`` in small, on the session's cluster: everything dies once under load, and the promises hold.

The long run (ten thousand jobs, every fault, all services) is ``make chaos``; see docs/chaos.md.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from byline.catalog.store import CatalogStore
from byline.chaos.build import TinyWorld
from byline.chaos.history import History
from byline.chaos.plan import plan
from byline.chaos.run import attack
from byline.chaos.system import System
from byline.cli import chaos
from byline.releases.loader import load_release

from .conftest import CORPUS_ID, LEASE_S, MODEL_ID, PATIENCE_S, Cluster, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

FAULTS = (
    "lookup_killed", "lookup_suspended", "gateway_killed", "postgres_killed", "redis_flushed", "messages_thrice",
    "release_swapped", "item_withdrawn",
)  # fmt: skip


@pytest.fixture
def system(cluster: Cluster) -> Iterator[System]:
    """The cluster as a chaos run sees it; what was withdrawn, and the release, come back for the tests after it."""
    running = System(
        cluster.root, cluster.environment, cluster.address, cluster.engine, cluster.postgres, cluster.valkey,
        services=("gateway", "lookup"), processes=cluster.processes,
    )  # fmt: skip
    yield running
    with cluster.engine.begin() as connection:
        connection.execute(text("UPDATE items SET withdrawn_at = NULL"))
    if cluster.registry.active(MODEL_ID).release_id != cluster.releases[0]:
        cluster.registry.activate(MODEL_ID, cluster.releases[0])
    cluster.serves(cluster.releases[0])


def world_of(cluster: Cluster) -> TinyWorld:
    items = CatalogStore(cluster.engine).items(CORPUS_ID, include_withdrawn=True)
    rng = np.random.default_rng(1)
    embeddings, held = {}, {}
    for release_id in cluster.releases:
        release = load_release(cluster.root / "releases" / release_id)
        embeddings[release_id] = release.embed(rng.standard_normal((16, release.manifest.feature_dim), np.float32))
        held[release_id] = frozenset(release.catalogue.ids.tolist())
    pictures = tuple((cluster.blobs.get(item.image_sha256), item.caption) for item in items)
    return TinyWorld(pictures, embeddings, held)


def test_every_promise_holds_while_each_part_dies_once(cluster: Cluster, system: System, tmp_path: Path) -> None:
    cluster.ready("lookup", "verification")
    world = world_of(cluster)
    first, second = world.release_items.values()
    assert first - second and second - first, "an answer of both would be seen"
    asks = plan(240, 6, verified=3, estimated=3, by_image=6)
    outcome = attack(
        system, world, asks, seed=6, lease_s=LEASE_S, model_id=MODEL_ID, corpus_id=CORPUS_ID, only=FAULTS,
        rest_within_s=4 * PATIENCE_S,
    )  # fmt: skip
    assert outcome.verdict.passed, outcome.verdict.violations
    figures = outcome.figures
    assert figures["jobs"] == 240 and figures["kills"] >= 3 and figures["answers_read"] >= 200
    assert {fault["name"] for fault in figures["faults"]} == set(FAULTS)
    assert not figures["ended_by_themselves"]
    assert set(figures["answers_by"]) == {"get", "attribute", "watch"} and figures["watches"] >= 40
    assert {result.release for result in outcome.history.results} == set(cluster.releases)
    kept = tmp_path / "history.jsonl.gz"
    outcome.history.write(kept)
    assert chaos.main(["--check", str(kept)]) == 0
    told = outcome.history.acknowledged[0]
    without = [job for job in outcome.history.jobs if job.job != told.job]
    History(acknowledged=(told,), jobs=tuple(without)).write(kept)
    assert chaos.main(["--check", str(kept)]) == 1, "a job that is missing is seen"


def test_a_worker_that_stops_consuming_is_noticed_and_ends(cluster: Cluster, system: System) -> None:
    """Its child computes, reports itself and answers; only the parent, which consumes, stands still."""
    system.environment = {**cluster.environment, "BYLINE_CANARY_SECONDS": "2"}
    system.start("lookup-2")
    try:
        system.ready("lookup-2")
        process = system.processes["lookup-2"]
        system.held_down.add("lookup-2")
        children = system.pids("lookup-2")
        system.signal("lookup-2", signal.SIGSTOP, children=False)
        eventually(lambda: not process.running(), "notice of a worker that consumes nothing")
        assert process.popen.returncode == -signal.SIGKILL
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the end of its child")
        assert "consumes_nothing" in process.log_tail(50)
        rows = system.rows("SELECT pid FROM worker_reports")
        assert not children & {int(str(pid)) for (pid,) in rows}, "it left the fleet"
    finally:
        system.kill("lookup-2")
        del system.processes["lookup-2"]
