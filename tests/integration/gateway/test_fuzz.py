"""Damaged images and requests: no crash, no hang, always a typed error. `make fuzz` sends more than ten thousand.

``BYLINE_TEST_FUZZ_INPUTS`` is how many, ``BYLINE_TEST_FUZZ_SEED`` with what seed, ``BYLINE_TEST_FUZZ_REPORT`` where the
figures go.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import catalog_service_pb2 as catalog_wire
from attribution.v1 import operator_service_pb2 as operator_wire
from byline.client import Client
from byline.errors import ImageTooLarge, ImageUndecodable
from byline.security.decoding import BoundedDecoder

from .conftest import ITEMS, MODEL, AnsweringWorker, Keyed, Running, png
from .fuzzing import image_seeds, messages, mutate, nearly, spoil

INPUTS = int(os.environ.get("BYLINE_TEST_FUZZ_INPUTS", "500"))
SEED = int(os.environ.get("BYLINE_TEST_FUZZ_SEED", "0"))
REPORT = os.environ.get("BYLINE_TEST_FUZZ_REPORT", "")
#: Longer than the server's own limit of a call and the decoder's of an image, on a machine that is loaded ten times.
HANG_S = 120.0
#: The one stream that may stay open: of a job that has not ended.
OPEN = "WatchAttributionJob"
#: gRPC's own limit, kept by the server.
MESSAGE_BYTES = 4 * 1024 * 1024
PROTOS = Path(__file__).resolve().parents[3] / "protos"
SEEDS = image_seeds()

pytestmark = pytest.mark.timeout(3_600 if INPUTS > 1_000 else 300)


@dataclass
class Tally:
    """What came of the inputs. ``decoder_deaths``: images that ended a decoding child (contained, but looked at);
    ``intruders``: calls without a good key that were let in."""

    inputs: int = 0
    accepted: int = 0
    crashes: int = 0
    hangs: int = 0
    untyped: int = 0
    decoder_deaths: int = 0
    intruders: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def refused(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def bad(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.examples.append(f"{kind}: {what[:400]}")


def write(part: str, tally: Tally) -> None:
    if not REPORT:
        return
    path = Path(REPORT)
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = asdict(tally)
    total = {name: sum(one[name] for one in parts.values()) for name in ("inputs", "crashes", "hangs", "untyped")}
    from byline.evaluation.result_file import git_commit, machine

    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(sum(one["seconds"] for one in parts.values()), 1)
    header = {"command": "make fuzz", "seed": SEED, "seconds": seconds, "machine": machine()}
    document = {**header, "commit": git_commit(PROTOS), **total, "parts": parts}
    path.write_text(json.dumps(document, indent=1) + "\n")


def test_a_damaged_image_is_decoded_or_refused_with_a_typed_error() -> None:
    rng, tally, begun = random.Random(SEED), Tally(), time.monotonic()
    decoder = BoundedDecoder(timeout_s=HANG_S / 2)
    decoder.decode(SEEDS[0])
    for number in range(INPUTS * 5 // 10):
        data = mutate(rng, SEEDS[number % len(SEEDS)], SEEDS) if number >= len(SEEDS) else SEEDS[number]
        child, asked = decoder._child, time.monotonic()
        try:
            image = decoder.decode(data, max_pixels=4_000_000)
            assert image.mode == "RGB"
            tally.accepted += 1
        except (ImageUndecodable, ImageTooLarge) as error:
            tally.refused(error.reason)
        except Exception as error:
            tally.bad("untyped", f"{error!r} for {data[:60].hex()}")
        tally.inputs += 1
        tally.decoder_deaths += decoder._child is not child
        if time.monotonic() - asked > HANG_S:
            tally.bad("hangs", data[:60].hex())
    decoder.close()
    tally.seconds = round(time.monotonic() - begun, 1)
    write("images", tally)
    assert not tally.examples and tally.decoder_deaths == 0, tally
    assert tally.accepted > tally.inputs // 20 and len(tally.reasons) >= 3, "the mutations are too wild or too tame"


def methods() -> list[MethodDescriptor]:
    found = []
    for path in sorted((PROTOS / "attribution" / "v1").glob("*_service.proto")):
        module = importlib.import_module(f"attribution.v1.{path.stem}_pb2")
        found += [method for service in module.DESCRIPTOR.services_by_name.values() for method in service.methods]
    return found


def good_requests(job: str) -> dict[str, list[Any]]:
    """A request of each method that is admitted (a stream of them for uploads)."""
    query = job_wire.Query(inline_image=png(), prompt="a cat")
    create = wire.CreateAttributionJobRequest(
        parent="projects/acme", attribution_job=job_wire.AttributionJob(model=f"models/{MODEL}", query=query)
    )
    data = png("green")
    digest, corpus = hashlib.sha256(data).hexdigest(), f"corpora/{MODEL}"
    metadata = wire.UploadImageRequest.Metadata(parent="projects/acme", size_bytes=len(data), sha256=digest)
    return {
        "CreateAttributionJob": [create],
        "BatchCreateAttributionJobs": [
            wire.BatchCreateAttributionJobsRequest(parent="projects/acme", requests=[create, create])
        ],
        "Attribute": [wire.AttributeRequest(parent="projects/acme", query=query)],
        "GetAttributionJob": [wire.GetAttributionJobRequest(name=job)],
        "WatchAttributionJob": [wire.WatchAttributionJobRequest(name=job)],
        "CancelAttributionJob": [wire.CancelAttributionJobRequest(name=job)],
        "DownloadQueryImage": [wire.DownloadQueryImageRequest(name=job)],
        "ListAttributionJobs": [wire.ListAttributionJobsRequest(parent="projects/acme", page_size=3)],
        "UploadImage": [wire.UploadImageRequest(metadata=metadata), wire.UploadImageRequest(chunk=data)],
        "GetImageUpload": [wire.GetImageUploadRequest(name=f"projects/acme/images/{digest}")],
        "BatchGetItems": [catalog_wire.BatchGetItemsRequest(parent=corpus, item_ids=ITEMS[:5])],
        "GetItemImage": [catalog_wire.GetItemImageRequest(name=f"{corpus}/items/{ITEMS[0]}")],
        "WithdrawItems": [catalog_wire.WithdrawItemsRequest(parent=corpus, item_ids=[ITEMS[-1]], reason="test")],
        "GetCorpus": [catalog_wire.GetCorpusRequest(name=corpus)],
        "ListReleases": [operator_wire.ListReleasesRequest(parent=f"models/{MODEL}")],
        "ActivateRelease": [operator_wire.ActivateReleaseRequest(name=f"models/{MODEL}/releases/r1")],
        "ListDeadJobs": [operator_wire.ListDeadJobsRequest(parent="projects/acme")],
        "PauseStage": [operator_wire.PauseStageRequest(stage="rank")],
    }


class Caller:
    """Sends raw bytes to any method and judges what comes back."""

    def __init__(self, channel: Any, tally: Tally) -> None:
        self._channel, self._tally = channel, tally

    def send(
        self, method: MethodDescriptor, bodies: list[bytes], path: str = "", metadata: tuple[tuple[str, str], ...] = ()
    ) -> str:
        """The reason of the refusal; empty if it was accepted."""
        if any(len(body) > MESSAGE_BYTES for body in bodies):
            return "TOO_LARGE"  # gRPC refuses it before any of our code sees it
        path = path or f"/{method.containing_service.full_name}/{method.name}"
        self._tally.inputs += 1
        timing = {"timeout": 1.0 if method.name == OPEN else HANG_S, "metadata": metadata}
        try:
            if method.client_streaming:
                self._channel.stream_unary(path)(iter(bodies), **timing)
            elif method.server_streaming:
                for _ in self._channel.unary_stream(path)(bodies[0], **timing):
                    pass
            else:
                self._channel.unary_unary(path)(bodies[0], **timing)
        except grpc.RpcError as error:
            return self._judge(method, error, bodies)
        self._tally.accepted += 1
        return ""

    def _judge(self, method: MethodDescriptor, error: Any, bodies: list[bytes]) -> str:
        what = f"{method.full_name} {error.code()} {error.details()!r} {b'|'.join(bodies)[:80].hex()}"
        info, status = error_details_pb2.ErrorInfo(), rpc_status.from_call(error)
        typed = status is not None and any(detail.Unpack(info) for detail in status.details)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not typed:
            if method.name != OPEN:
                self._tally.bad("hangs", what)
                return "HANG"
            self._tally.accepted += 1
        elif not typed or info.domain != "attribution.v1":
            self._tally.bad("untyped", what)
        elif info.reason == "INTERNAL":
            self._tally.bad("crashes", what)
        else:
            self._tally.refused(info.reason)
        return str(info.reason)


def test_a_request_of_any_bytes_is_answered_or_refused_with_a_typed_error(
    served: Running, worker: AnsweringWorker
) -> None:
    assert worker.store is served.store
    known, tally, begun = methods(), Tally(), time.monotonic()
    samples: dict[str, list[bytes]] = {}
    with Client(served.address, "acme") as client:
        job = client.attribute(png(), "a cat", timeout=HANG_S).job.name
    good = good_requests(job)
    with grpc.insecure_channel(served.address, options=[("grpc.max_metadata_size", 16_384)]) as channel:
        caller = Caller(channel, tally)

        @seed(SEED)
        @settings(
            max_examples=max(20, INPUTS * 2 // 10), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.data())
        def draw_and_send(data: Any) -> None:
            method = data.draw(st.sampled_from(known))
            if method.name in good and data.draw(st.integers(0, 4)):
                drawn = [data.draw(nearly(one, SEEDS)) for one in good[method.name]]
            else:
                count = data.draw(st.integers(0, 3)) if method.client_streaming else 1
                drawn = [data.draw(messages(method.input_type, SEEDS)) for _ in range(count)]
            bodies = [one.SerializeToString() for one in drawn]
            samples.setdefault(method.name, []).extend(bodies)
            caller.send(method, bodies)

        draw_and_send()
        rng = random.Random(SEED)
        for _ in range(INPUTS * 2 // 10):
            method = rng.choice(known)
            path = "" if rng.random() < 0.97 else f"/attribution.v1.CatalogService/{rng.randrange(99)}"
            own = samples.get(method.name) or [b""]
            caller.send(method, [mutate(rng, rng.choice(own), [*filter(None, own), b"x"])], path)
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HANG_S)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    tally.seconds = round(time.monotonic() - begun, 1)
    write("requests", tally)
    assert not tally.examples, "\n".join(tally.examples[:20])
    assert len(tally.reasons) >= 3 and tally.accepted > 0, "the mutations are too wild or too tame"


def test_whatever_stands_for_a_key_only_a_good_key_is_let_in(keyed: Keyed) -> None:
    known, tally, begun, rng = methods(), Tally(), time.monotonic(), random.Random(SEED)
    keys = [keyed.key(), keyed.key("other"), keyed.key(None)]
    with Client(keyed.address, "acme", api_key=keys[0]) as client:
        job = client.submit(png(), "a cat").name
        client.cancel(job)
    good = good_requests(job)
    with grpc.insecure_channel(keyed.address, options=[("grpc.max_metadata_size", 16_384)]) as channel:
        caller = Caller(channel, tally)
        for _ in range(INPUTS // 10):
            method = rng.choice(known)
            bodies = [one.SerializeToString() for one in good.get(method.name, [])] or [b""]
            if rng.random() < 0.1:
                bodies = [mutate(rng, body or b"x", [b"x"]) for body in bodies]
            values = spoil(rng, keys)
            told = caller.send(method, bodies, metadata=tuple(("authorization", value) for value in values))
            holders = [value.split() for value in values if value.lower().startswith("bearer ")]
            may = bool(holders) and holders[0][1:] in [[key] for key in keys]
            if not may and told not in ("API_KEY_INVALID", "MALFORMED_REQUEST"):
                tally.bad("intruders", f"{method.full_name} {told} {values!r}")
    tally.seconds = round(time.monotonic() - begun, 1)
    write("keys", tally)
    assert not tally.examples, "\n".join(tally.examples[:20])
    assert tally.accepted and tally.reasons["API_KEY_INVALID"] > tally.inputs // 4
