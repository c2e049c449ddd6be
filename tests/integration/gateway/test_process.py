"""The gateway as a process, driven by other programs: the command line, and a client that is not Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attribution.v1 import attribution_service_pb2, attribution_service_pb2_grpc
from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db import make_engine
from byline.embedded.postgres import PrivatePostgres
from byline.jobs.store import JobStore
from byline.releases.registry import ReleaseRegistry

from .conftest import ITEMS, MODEL, AnsweringWorker, manifest, png

ROOT = Path(__file__).resolve().parents[3]
DRAIN_S = 2.0
NODE_MODULES = os.environ.get("BYLINE_TEST_NODE_MODULES", "")


@dataclass
class Started:
    """A gateway process with an answering worker beside it."""

    process: subprocess.Popen[bytes]
    address: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def started(database_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    engine = make_engine(database_url, pool_size=4)
    catalog, registry = CatalogStore(engine), ReleaseRegistry(engine)
    catalog.add_model(ModelRecord(MODEL, MODEL, tmp_path, "rev1"))
    sha256 = BlobStore(tmp_path / "blobs").put(png("blue"))
    catalog.add_items(MODEL, [Item(i, f"item {i}", creator="ann", image_sha256=sha256) for i in ITEMS])
    registry.register(manifest("r1"), tmp_path / "r1")
    registry.activate(MODEL, "r1")
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "shared", "protos")),
        "BYLINE_DATABASE_URL": database_url,
        "BYLINE_STATE_DIR": str(tmp_path),
        "BYLINE_GRPC_ADDRESS": address,
        "BYLINE_DRAIN_SECONDS": str(DRAIN_S),
    }
    worker = AnsweringWorker(JobStore(engine, {}), database_url)
    worker.start()
    command = [sys.executable, "-m", "services.gateway", *getattr(request, "param", ())]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    try:
        wait_until_serving(address)
        yield Started(process, address, environment)
    finally:
        process.kill()
        process.wait(10)
        worker.stop()
        engine.dispose()


def wait_until_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(60)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert any(message.status == health_pb2.HealthCheckResponse.SERVING for message in watch)


@contextmanager
def frozen(server: PrivatePostgres) -> Iterator[None]:
    """All processes of a Postgres stopped: its connections stay open, and nobody answers on them."""
    parent = psutil.Process(server.process.identity.pid)
    parent.suspend()  # first, so that it starts no more
    family = [parent, *parent.children(recursive=True)]
    try:
        for process in family:
            process.suspend()
        yield
    finally:
        for process in family:
            process.resume()


def byline(started: Started, *arguments: str) -> str:
    command = [sys.executable, "-m", "byline.cli.app", *arguments]
    done = subprocess.run(command, env=started.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sigterm_ends_the_process_cleanly(started: Started) -> None:
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0


def test_a_frozen_database_turns_health_to_not_serving_and_sigterm_still_ends_the_gateway(
    started: Started, private_postgres: PrivatePostgres
) -> None:
    with frozen(private_postgres), grpc.insecure_channel(started.address) as channel:
        stuck = attribution_service_pb2_grpc.AttributionServiceStub(channel).ListAttributionJobs.future(
            attribution_service_pb2.ListAttributionJobsRequest(parent="projects/default"), timeout=60
        )
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert any(message.status == health_pb2.HealthCheckResponse.NOT_SERVING for message in watch)
        begun = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(30) == 0
        assert time.monotonic() - begun < 2 * DRAIN_S + 10
        assert stuck.exception(30) is not None


def test_a_database_that_thaws_is_served_again(started: Started, private_postgres: PrivatePostgres) -> None:
    with grpc.insecure_channel(started.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        with frozen(private_postgres):
            assert any(message.status == health_pb2.HealthCheckResponse.NOT_SERVING for message in watch)
        assert any(message.status == health_pb2.HealthCheckResponse.SERVING for message in watch)


@pytest.mark.parametrize("started", [("--notice-seconds", "600")], indirect=True)
def test_two_sigterms_end_the_gateway_at_once(started: Started) -> None:
    with grpc.insecure_channel(started.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        started.process.send_signal(signal.SIGTERM)
        assert any(message.status == health_pb2.HealthCheckResponse.NOT_SERVING for message in watch)
        assert started.process.poll() is None
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(30) == 128 + signal.SIGTERM


def test_a_second_gateway_on_the_same_port_says_so_and_ends(started: Started) -> None:
    command = [sys.executable, "-m", "services.gateway"]
    done = subprocess.run(command, env=started.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "another gateway" in done.stderr


def test_the_command_line_submits_watches_and_shows(started: Started, tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(png())
    submitted = byline(started, "submit", str(image), "--prompt", "a <b>cat</b>", "--tier", "VERIFIED", "--json")
    job = json.loads(submitted)
    assert job["state"] == "SUCCEEDED" and job["answers"][1]["influences"][0]["item_id"] == str(ITEMS[0])
    job_id = job["name"].rpartition("/")[2]
    assert "item 101" in byline(started, "watch", job_id)
    page = tmp_path / "page.html"
    byline(started, "show", job_id, "--html", str(page))
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 1 + 2 * 20 and "<b>cat" not in html and "&lt;b&gt;cat" in html


@pytest.mark.skipif(not NODE_MODULES or shutil.which("node") is None, reason="BYLINE_TEST_NODE_MODULES is not set")
def test_a_node_client_drives_it_from_the_protos_alone(started: Started, tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(png())
    shutil.copy(ROOT / "docs" / "examples" / "node" / "attribute.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    environment = {**started.environment, "BYLINE_PROTOS": str(ROOT / "protos")}

    def node(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["node", "attribute.mjs", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    done = node(str(image), "a cat", "VERIFIED")
    assert done.returncode == 0, done.stderr
    assert "STATE_SUCCEEDED" in done.stdout
    assert "1. item 101 by ann (CC0), tau 0.250, item 101" in done.stdout
    (tmp_path / "broken.png").write_bytes(b"no image")
    refused = node(str(tmp_path / "broken.png"))
    assert refused.returncode == 1 and refused.stderr.startswith("IMAGE_UNDECODABLE:")
