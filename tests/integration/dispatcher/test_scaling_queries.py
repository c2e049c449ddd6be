"""The queries by which KEDA scales the worker pools, asked of a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sqlalchemy import Engine, text

from byline.db import make_engine
from byline.jobs import NewJob, Stage, Tier
from byline.jobs.store import JobStore

SCALERS = Path(__file__).resolve().parents[3] / "deploy" / "k8s" / "keda" / "scalers.yaml"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=2)
    yield engine
    engine.dispose()


def wanted(engine: Engine) -> dict[str, int]:
    found = {}
    for one in yaml.safe_load_all(SCALERS.read_text()):
        if one["kind"] == "ScaledObject":
            (trigger,) = one["spec"]["triggers"]
            with engine.connect() as connection:
                found[one["metadata"]["name"]] = connection.execute(text(trigger["metadata"]["query"])).scalar_one()
    return found


def test_pools_follow_queued_and_running_work_and_a_busy_pool_is_not_scaled_away(engine: Engine) -> None:
    store = JobStore(engine, {})
    assert wanted(engine) == {"lookup": 0, "verification": 0}
    jobs = [
        store.create(NewJob(project_id="p", request_id=name, model_id="m", prompt="a cat", image_sha256="0" * 64,
                            tier=Tier.VERIFIED))[0]
        for name in ("first", "second")
    ]  # fmt: skip
    assert wanted(engine) == {"lookup": 2, "verification": 0}
    claim = store.claim(jobs[0].id, Stage.LOOKUP, "w", 30.0)
    assert claim is not None
    assert wanted(engine) == {"lookup": 2, "verification": 0}  # running counts
    store.complete(claim, {})
    assert wanted(engine) == {"lookup": 1, "verification": 1}
    assert store.claim(jobs[0].id, Stage.VERIFY, "w", 30.0) is not None
    assert wanted(engine) == {"lookup": 1, "verification": 1}
