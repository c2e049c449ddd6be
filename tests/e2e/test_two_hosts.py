"""Workers on another host than Postgres and Redis, and the link between them cut for a while.

Two network namespaces of one machine: the kernel drops the packets as a pulled cable does, and neither side is told.
Needs root and iproute2, and two starts of each worker, so it runs when asked for: ``make two-hosts``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy.engine import make_url

from byline.catalog.items import Item
from byline.db import make_engine
from byline.embedded.process import ServerProcess
from byline.jobs import State

from .conftest import LEASE_S, PATIENCE_S, Cluster, eventually

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600),
    pytest.mark.skipif("BYLINE_TEST_TWO_HOSTS" not in os.environ, reason="runs when asked for: make two-hosts"),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]  # fmt: skip

Picture = Callable[[int], tuple[bytes, Item]]
HOST, OUTSIDE, INSIDE = "byline-other", "bylv0", "bylv1"
HERE, THERE = "10.231.77.1", "10.231.77.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def forwarded(port: int) -> Iterator[int]:
    """A port on this end of the link that leads to ``port`` of loopback, where the private servers listen."""
    listener = socket.create_server((HERE, 0), backlog=64)
    ended = threading.Event()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass  # one side is gone: so is the other
        finally:
            for one in (source, sink):
                one.close()

    def accept() -> None:
        while not ended.is_set():
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
            except OSError:
                continue
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        ended.set()
        listener.close()


@contextmanager
def other_host() -> Iterator[None]:
    """A namespace with one cable to here."""
    ip("netns", "add", HOST)
    try:
        ip("link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE)
        ip("link", "set", INSIDE, "netns", HOST)
        ip("addr", "add", f"{HERE}/30", "dev", OUTSIDE)
        ip("link", "set", OUTSIDE, "up")
        for command in (("addr", "add", f"{THERE}/30", "dev", INSIDE), ("link", "set", INSIDE, "up"),
                        ("link", "set", "lo", "up")):  # fmt: skip
            ip("-n", HOST, *command)
        yield
    finally:
        subprocess.run(["ip", "link", "del", OUTSIDE], capture_output=True, check=False)
        ip("netns", "del", HOST)


def start_there(cluster: Cluster, queue: str, database_port: int, redis_port: int) -> ServerProcess:
    database = make_url(cluster.postgres.url).set(host=HERE, port=database_port)
    redis_url = cluster.valkey.url.replace(f"127.0.0.1:{cluster.valkey.port}", f"{HERE}:{redis_port}")
    environment = {
        **cluster.environment, "BYLINE_REDIS_URL": redis_url,
        "BYLINE_DATABASE_URL": database.set(drivername="postgresql").render_as_string(hide_password=False),
    }  # fmt: skip
    command = ["ip", "netns", "exec", HOST, sys.executable, "-m", "services.workers", queue, "--name", f"{queue}-there"]
    return ServerProcess.start(
        f"{queue}-there", command, log=cluster.root / f"{queue}-there.log", cwd=cluster.root, environment=environment,
        die_with_parent=True,
    )  # fmt: skip


def lives_there(cluster: Cluster, queue: str, process: ServerProcess) -> bool:
    assert process.running(), process.log_tail()
    engine = make_engine(cluster.postgres.url, 1)
    try:
        with engine.connect() as connection:
            found = connection.exec_driver_sql(
                f"SELECT 1 FROM worker_reports WHERE worker_id LIKE '{queue}-there@%%' AND error IS NULL"  # noqa: S608
                + (" AND release_id IS NOT NULL" if queue == "lookup" else "")
            ).first()
        return found is not None
    finally:
        engine.dispose()


def test_work_goes_on_after_the_link_to_the_workers_was_cut_and_takes_effect_once(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    for name in ("lookup", "verification"):
        cluster.stop(name)
    processes: dict[str, ServerProcess] = {}
    with ExitStack() as stack:
        stack.enter_context(other_host())
        database_port = stack.enter_context(forwarded(make_url(cluster.postgres.url).port or 5432))
        redis_port = stack.enter_context(forwarded(cluster.valkey.port))
        try:
            for queue in ("lookup", "verification"):
                processes[queue] = start_there(cluster, queue, database_port, redis_port)
            for queue, process in processes.items():
                eventually(lambda queue=queue, process=process: lives_there(cluster, queue, process), f"{queue} there")
            with cluster.client(project) as client:
                data, item = picture(2)
                assert client.attribute(data, prompt=item.caption, timeout=PATIENCE_S).tier == "RETRIEVED"

                verified = client.submit(picture(3)[0], prompt="cut", tier="VERIFIED", top_k=3, candidates=40)
                eventually(
                    lambda: [e for e in cluster.jobs.events(uuid.UUID(verified.id)) if e.stage.value == "verify"
                             and e.to_state is State.RUNNING], "a verification that runs over there"
                )  # fmt: skip
                ip("link", "set", OUTSIDE, "down")
                begun = time.monotonic()
                during = [client.submit(picture(n)[0], prompt=f"cut {n}") for n in range(4, 9)]
                eventually(
                    lambda: time.monotonic() - begun > 2 * LEASE_S
                    and cluster.jobs.find(uuid.UUID(verified.id)).state is not State.RUNNING,
                    "the lease running out",
                )
                assert all(client.get(job).state == "QUEUED" for job in during)
                ip("link", "set", OUTSIDE, "up")
                for job in (verified, *during):
                    last = list(client.watch(job, timeout=4 * PATIENCE_S))[-1]
                    assert last.state == "SUCCEEDED", last.error
            for job in (verified, *during):
                events = cluster.jobs.events(uuid.UUID(job.id))
                assert Counter(event.to_state for event in events)[State.SUCCEEDED] == 1
                fences = [event.fence for event in events]
                assert fences == sorted(fences)
        finally:
            for process in processes.values():
                process.stop(30.0)
    for name in ("lookup", "verification"):
        cluster.start(name)
    cluster.ready("lookup", "verification")
