"""The dispatcher as a real process, on real Postgres and Redis."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from byline.db import make_engine
from byline.errors import BrokerUnavailable, SettingsInvalid
from byline.jobs import NewJob, Stage, State
from byline.jobs.store import JobStore
from byline.queue import check_broker, enqueue, make_celery

PATIENCE_S = 90


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url, socket_timeout=None)  # its default of 5 s would end a BRPOP that waits
    yield client
    client.close()


@pytest.fixture
def store(database_url: str) -> Iterator[JobStore]:
    engine = make_engine(database_url, pool_size=2)
    yield JobStore(engine, bounds={}, rng=random.Random(1))
    engine.dispose()


@pytest.fixture
def dispatcher(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "BYLINE_DATABASE_URL": database_url,
        "BYLINE_REDIS_URL": redis_url,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (tmp_path / "dispatcher.log").open("wb") as log:
        command = [sys.executable, "-m", "services.dispatcher"]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=log)
        yield process
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE_S)


def new_job(request_id: str) -> NewJob:
    return NewJob(project_id="p", request_id=request_id, model_id="m", prompt="a cat", image_sha256="0" * 64)


def next_doorbell(client: redis.Redis, queue: str = "lookup") -> list[str]:
    """Wait for a message as a worker does, and open it."""
    popped = client.brpop([f"byline:{queue}"], timeout=PATIENCE_S)
    assert popped is not None, "no doorbell was rung"
    arguments, keywords, _ = json.loads(base64.b64decode(json.loads(popped[1])["body"]))
    assert keywords == {}
    return arguments


def test_a_job_is_rung_rung_again_after_redis_is_wiped_and_taken_back_from_a_dead_worker(
    dispatcher: subprocess.Popen[bytes], store: JobStore, client: redis.Redis
):
    job, _ = store.create(new_job("a"))
    assert next_doorbell(client) == [str(job.id), "lookup"]

    client.flushall()  # the message was taken and its reader is gone; Redis knows nothing of it any more
    assert next_doorbell(client) == [str(job.id), "lookup"]

    assert store.claim(job.id, Stage.LOOKUP, "dies at once", lease_s=0.01)
    assert next_doorbell(client) == [str(job.id), "lookup"]
    claim = store.claim(job.id, Stage.LOOKUP, "lives", lease_s=60)
    assert claim is not None
    assert claim.job.attempt == 2
    assert store.complete(claim, {"influences": []}).state is State.SUCCEEDED

    dispatcher.send_signal(signal.SIGTERM)
    assert dispatcher.wait(PATIENCE_S) == 0
    assert client.llen("byline:lookup") == 0


def test_a_doorbell_carries_the_job_and_its_stage_and_nothing_else(
    redis_url: str, store: JobStore, client: redis.Redis
):
    job, _ = store.create(new_job("a"))
    enqueue(make_celery(redis_url), job.id, Stage.VERIFY)
    assert next_doorbell(client, "verification") == [str(job.id), "verify"]


def test_ringing_gives_up_within_seconds_when_redis_is_away(store: JobStore):
    job, _ = store.create(new_job("a"))
    with pytest.raises(BrokerUnavailable):
        enqueue(make_celery("redis://127.0.0.1:1/0"), job.id, Stage.LOOKUP)
    with pytest.raises(BrokerUnavailable):
        check_broker("redis://127.0.0.1:1/0")


@pytest.fixture
def eviction(client: redis.Redis) -> Iterator[Callable[[str], None]]:
    yield lambda policy: client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory-policy", "noeviction")


def test_a_redis_that_may_evict_messages_is_refused(redis_url: str, eviction: Callable[[str], None]):
    check_broker(redis_url)
    eviction("allkeys-lru")
    with pytest.raises(SettingsInvalid, match="noeviction"):
        check_broker(redis_url)
