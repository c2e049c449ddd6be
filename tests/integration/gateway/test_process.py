"""The gateway as a process, driven by other programs: the command line, and a client that is not Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db import make_engine
from byline.jobs.store import JobStore
from byline.releases.registry import ReleaseRegistry

from .conftest import ITEMS, MODEL, AnsweringWorker, manifest, png

ROOT = Path(__file__).resolve().parents[3]
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
def started(database_url: str, tmp_path: Path) -> Iterator[Started]:
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
    }
    worker = AnsweringWorker(JobStore(engine, {}), database_url)
    worker.start()
    process = subprocess.Popen([sys.executable, "-m", "services.gateway"], env=environment, cwd=tmp_path)
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


def byline(started: Started, *arguments: str) -> str:
    command = [sys.executable, "-m", "byline.cli.app", *arguments]
    done = subprocess.run(command, env=started.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sigterm_ends_the_process_cleanly(started: Started) -> None:
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0


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
