"""kill -9 of curation at each of its steps: nothing half-published, and whoever comes after it goes on.

Each process is a real one (a fork) that is killed by its own failpoint; what it left is read from Postgres, and another
one without failpoints finishes the work.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text

from byline.catalog.blobs import BlobStore
from byline.db.session import make_engine, transaction
from byline.failpoints import NAMES, VARIABLE
from byline.jobs.states import Tier
from byline.rankings.controls import CurationControl
from services.curation.plan import PlannedQuery

from .conftest import PerfectHead, ask, count, intake, labelled, measurer, producer

_HALVES = """
    SELECT (SELECT count(*) FROM queries q
            WHERE NOT EXISTS (SELECT 1 FROM query_choices c WHERE c.query_id = q.id)
                OR NOT EXISTS (SELECT 1 FROM job_queries j WHERE j.query_id = q.id)
                    AND NOT EXISTS (SELECT 1 FROM rankings r WHERE r.query_id = q.id))
        + (SELECT count(*) FROM jobs j WHERE kind = 'ranking'
            AND NOT EXISTS (SELECT 1 FROM job_queries q WHERE q.job_id = j.id))
        + (SELECT count(*) FROM shortlists s
            WHERE NOT EXISTS (SELECT 1 FROM job_queries q WHERE q.query_id = s.query_id))
        + (SELECT count(*) FROM live_intake i WHERE state = 'labelled'
            AND NOT EXISTS (SELECT 1 FROM rankings r WHERE r.query_id = i.query_id))
"""
BATCH = [PlannedQuery(f"kite {number}", number, number, "train") for number in range(3)]
PRODUCING = ["after_generate", "after_blobs", "after_queries", "before_commit", "after_commit"]
TAKING = ["intake_before_commit", "intake_after_commit"]
MEASURING = ["measure_before_commit", "measure_after_commit"]


def killed(name: str, url: str, work: Callable[[Engine], object]) -> None:
    """Run ``work`` in a process of its own that dies at the failpoint; fails if it does not die there."""
    child = os.fork()
    if child == 0:
        try:
            os.environ[VARIABLE] = f"curation.{name}=kill"
            work(make_engine(url, pool_size=2))
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it did not die at {name}: {status}"


def halves(engine: Engine) -> int:
    """Rows that mean nothing without others: queries without a reason or without job and ranking, jobs without queries,
    lists without a query's job, labels of clients without their ranking."""
    with transaction(engine) as connection:
        return int(connection.execute(text(_HALVES)).scalar_one())


@pytest.mark.parametrize("name", PRODUCING)
def test_killed_while_it_asks_for_a_batch(
    engine: Engine, blobs: BlobStore, database_url: str, name: str
) -> None:
    killed(name, database_url, lambda own: producer(own, blobs).produce(BATCH))
    made = 3 if name == "after_commit" else 0
    assert count(engine, "queries") == count(engine, "shortlists") == made and halves(engine) == 0
    producer(engine, blobs).produce(BATCH)
    assert count(engine, "queries") == count(engine, "shortlists") == count(engine, "job_queries") == 3
    assert count(engine, "jobs") == 1 and halves(engine) == 0


@pytest.mark.parametrize("name", TAKING)
def test_killed_while_it_takes_a_clients_label(
    engine: Engine, blobs: BlobStore, database_url: str, name: str
) -> None:
    ask(engine, blobs, "verified", tier=Tier.VERIFIED)
    killed(name, database_url, lambda own: intake(own, blobs).step(CurationControl()))
    left = 1 if name == "intake_after_commit" else 0
    assert count(engine, "rankings") == count(engine, "live_intake", purpose="live") == left and halves(engine) == 0
    assert intake(engine, blobs).step(CurationControl()) == 1 - left
    assert count(engine, "rankings") == 1 and halves(engine) == 0


@pytest.mark.parametrize("name", MEASURING)
def test_killed_while_it_measures(engine: Engine, blobs: BlobStore, database_url: str, name: str) -> None:
    labelled(engine, blobs, ["kite", "boat"])
    now = datetime.now(UTC)
    killed(name, database_url, lambda own: measurer(own, PerfectHead(), now).step())
    left = 1 if name == "measure_after_commit" else 0
    assert count(engine, "label_measures") == left
    assert measurer(engine, PerfectHead(), now).step() == 2 - left
    assert count(engine, "label_measures") == 2


def test_no_failpoint_of_curation_is_forgotten_here() -> None:
    tested = {*PRODUCING, *TAKING, *MEASURING}
    assert {f"curation.{name}" for name in tested} == {name for name in NAMES if name.startswith("curation.")}
