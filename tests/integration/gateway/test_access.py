"""Keys, scopes, projects, rates and the audit of acts, over a real socket."""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from attribution.v1 import attribution_service_pb2 as wire
from attribution.v1 import attribution_service_pb2_grpc as rpc
from attribution.v1 import operator_service_pb2 as operator_wire
from attribution.v1 import operator_service_pb2_grpc as operator_rpc
from byline.client import AsyncClient, Client
from byline.config import load_settings
from byline.errors import BylineError, JobNotFound, SettingsInvalid
from byline.security.errors import ProjectForbidden, RateLimited, ScopeMissing, Unauthenticated
from services.gateway.access import ACCESS

from .conftest import ITEMS, MODEL, Keyed, manifest, png
from .test_jobs import reason

PROTOS = Path(__file__).resolve().parents[3] / "protos"


def refused_as(expected: type[BylineError], call: Any, *arguments: Any, **more: Any) -> BylineError:
    with pytest.raises(expected) as caught:
        call(*arguments, **more)
    assert type(caught.value) is expected
    return caught.value


def methods() -> dict[str, Any]:
    """Every method of every service of the API, from the descriptors, also of services this test has not heard of."""
    found = {}
    for path in sorted((PROTOS / "attribution" / "v1").glob("*.proto")):
        module = importlib.import_module(f"attribution.v1.{path.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}": method for method in service.methods}
    return found


def test_every_method_of_the_api_has_a_scope_and_no_scope_is_for_a_method_that_is_gone() -> None:
    known = methods()
    assert len(known) > 20
    assert not sorted(set(known) - set(ACCESS)), "give these methods a row in services/gateway/access.py"
    planned = ("GetImageUpload", "DeleteAttributionJob", "AddItems")
    assert not [method for method in set(ACCESS) - set(known) if not method.endswith(planned)]


def test_a_request_that_names_a_project_is_checked_against_the_keys_project() -> None:
    """A field that holds a project's or job's name must be the one the table looks at."""
    comments = {path.stem: path.read_text() for path in (PROTOS / "attribution" / "v1").glob("*.proto")}
    for full_name, method in methods().items():
        message = method.input_type
        source = next(body for body in comments.values() if f"message {message.name} {{" in body)
        body = source.split(f"message {message.name} {{", 1)[1].split("\n}", 1)[0]
        fields = [block for block in body.split(";") if " parent =" in block or " name =" in block]
        names_project = any("`projects/" in block for block in fields)
        if full_name in ACCESS:  # the test above names those that are not
            assert bool(ACCESS[full_name].project) == names_project, full_name


def test_no_key_no_answer_and_every_bad_key_is_refused_in_the_same_words(keyed: Keyed) -> None:
    good = keyed.key()
    revoked, expired = keyed.keys.create(project_id="acme", name="r", scopes=["jobs:read"]), keyed.key(days=-1)
    keyed.keys.revoke(revoked.record.id)
    said = set()
    for token in ("", "nonsense", good[:-1] + ("A" if good[-1] != "A" else "B"), revoked.token, expired,
                  "byl_" + "0" * 16 + "_" + "x" * 43):
        with Client(keyed.address, "acme", api_key=token) as client:
            said.add(str(refused_as(Unauthenticated, client.submit, png(), "a cat")))
    assert len(said) == 1 and not any(token in str(keyed.events()) for token in (good, revoked.token))
    with Client(keyed.address, "acme", api_key=good) as client:
        job = client.submit(png(), "a cat")
        assert client.get(job).name == job.name
    with grpc.insecure_channel(keyed.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(rpc.AttributionServiceStub(channel).WatchAttributionJob(wire.WatchAttributionJobRequest(name=job.name)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED and reason(caught.value) == "API_KEY_INVALID"


def test_strangers_with_bad_keys_shut_no_good_key_out(keyed: Keyed) -> None:
    request = wire.ListAttributionJobsRequest(parent="projects/acme")
    with grpc.insecure_channel(keyed.address) as channel:
        call = rpc.AttributionServiceStub(channel).ListAttributionJobs
        flood = [
            call.future(request, metadata=[("authorization", f"Bearer byl_{n:016x}_{'x' * 43}")], timeout=60)
            for n in range(400)
        ]
        good = [("authorization", f"Bearer {keyed.key()}")]  # of which this gateway knows nothing yet
        assert not call(request, metadata=good, timeout=60).attribution_jobs
        assert {refused.code() for refused in flood} == {grpc.StatusCode.UNAUTHENTICATED}
        assert not call(request, metadata=[("authorization", f"Bearer {keyed.key()}")], timeout=60).attribution_jobs


def test_a_revoked_key_stops_working_on_a_gateway_that_remembers_it(keyed: Keyed) -> None:
    issued = keyed.keys.create(project_id="acme", name="leaked", scopes=["jobs:read"])
    with Client(keyed.address, "acme", api_key=issued.token) as client:
        list(client.list())
        revoked = time.monotonic()
        keyed.keys.revoke(issued.record.id)
        while True:
            try:
                list(client.list())
            except Unauthenticated:
                break
            assert time.monotonic() - revoked < 20, "only the memory's own end would have stopped it"
            time.sleep(0.02)


def test_a_key_can_do_what_its_scopes_say_and_nothing_else(keyed: Keyed) -> None:
    with Client(keyed.address, "acme", api_key=keyed.key(scopes=["jobs:read"])) as client:
        error = refused_as(ScopeMissing, client.submit, png(), "a cat")
        assert error.metadata["scope"] == "jobs:write"
        refused_as(ScopeMissing, client.upload, png())
        refused_as(ScopeMissing, client.withdraw, MODEL, [ITEMS[0]])
        refused_as(ScopeMissing, client.activate, MODEL, "r1")
        assert list(client.list()) == []
    assert not keyed.context.catalog.withdrawn(MODEL)
    with pytest.raises(BylineError, match="reaches beyond"):
        keyed.key(scopes=["operate"])


def test_another_projects_job_is_answered_like_one_that_does_not_exist(keyed: Keyed) -> None:
    with Client(keyed.address, "acme", api_key=keyed.key()) as owner:
        job = owner.submit(png(), "a cat")
        absent = job.name[:-12] + "0" * 12
        with Client(keyed.address, "rival", api_key=keyed.key("rival")) as rival:
            for name in (job.name, job.name.replace("acme", "rival")):
                for call in (rival.get, rival.cancel, rival.query_image):
                    foreign = refused_as(JobNotFound, call, name)
                    unknown = refused_as(JobNotFound, call, name[:-12] + "0" * 12)
                    assert str(foreign).replace(name[-36:], "") == str(unknown).replace(absent[-36:], "")
            refused_as(JobNotFound, lambda: list(rival.watch(job.name)))
        assert owner.get(job).state == "QUEUED"
    with Client(keyed.address, "acme", api_key=keyed.key("rival")) as stranger:
        for call in (lambda: stranger.submit(png()), lambda: list(stranger.list()), lambda: stranger.upload(png())):
            refused_as(ProjectForbidden, call)


def test_an_operators_key_may_act_in_every_project(keyed: Keyed) -> None:
    token = keyed.key(None)
    for project in ("acme", "rival"):
        with Client(keyed.address, project, api_key=token) as client:
            assert client.get(client.submit(png(), "a cat")).state == "QUEUED"


def test_the_async_client_sends_its_key_with_every_kind_of_call(keyed: Keyed) -> None:
    async def calls() -> None:
        async with AsyncClient(keyed.address, "acme", api_key=keyed.key()) as client:
            job = await client.submit(png(), "a cat")
            await client.cancel(job)
            assert [seen.state async for seen in client.watch(job)] == ["CANCELLED"]
            assert (await client.upload(png("green"))).startswith("projects/acme/images/")

    asyncio.run(calls())


def test_a_key_never_travels_in_plain_text_to_another_machine() -> None:
    for address in ("10.0.0.1:50551", "byline.example:443"):
        with pytest.raises(SettingsInvalid, match="plain text"):
            Client(address, api_key="byl_x")


def test_a_key_that_calls_too_often_is_told_when_it_may_again(keyed: Keyed) -> None:
    token = keyed.key(rate_per_second=1.0)
    with Client(keyed.address, "acme", api_key=token) as client, pytest.raises(RateLimited):
        for _ in range(50):
            list(client.list())
    stub = rpc.AttributionServiceStub(grpc.insecure_channel(keyed.address))
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(50):
            stub.ListAttributionJobs(
                wire.ListAttributionJobsRequest(parent="projects/acme"), metadata=[("authorization", f"Bearer {token}")]
            )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = {detail.TypeName() for detail in rpc_status.from_call(caught.value).details}
    assert {"google.rpc.RetryInfo", "google.rpc.QuotaFailure", "google.rpc.ErrorInfo"} <= details
    with Client(keyed.address, "acme", api_key=keyed.key()) as other:
        list(other.list())  # another key of the project is not held up


def test_who_acted_and_who_was_refused_stands_in_the_audit_and_the_chain_holds(keyed: Keyed) -> None:
    operator = keyed.keys.create(project_id=None, name="ops", scopes=["operate", "catalog:write"])
    with Client(keyed.address, "acme", api_key=operator.token) as client:
        client.withdraw(MODEL, [ITEMS[0], ITEMS[1]], reason="asked for by ann")
        client.pause("rank")
        refused_as(ScopeMissing, client.submit, png())
        with pytest.raises(BylineError):
            client.activate(MODEL, "r9")
    rows = [row for row in keyed.events() if row["principal"] == f"key:{operator.record.id}"]
    told = [(row["action"], row["decision"]) for row in rows]
    for expected in (("WithdrawItems", "ALLOWED"), ("PauseStage", "ALLOWED"), ("CreateAttributionJob", "DENIED"),
                     ("ActivateRelease", "ALLOWED"), ("ActivateRelease", "FAILED")):
        assert expected in told
    (withdrawal,) = [row for row in rows if row["action"] == "WithdrawItems" and "item_ids" in row["detail"]]
    assert withdrawal["detail"]["reason"] == "asked for by ann" and withdrawal["detail"]["item_ids"]["count"] == 2
    until = time.monotonic() + 30
    while keyed.context.audit.verify().unsealed and time.monotonic() < until:
        time.sleep(0.05)
    verified = keyed.context.audit.verify()
    assert verified.unsealed == 0 and verified.head.seq == len(keyed.events())


def test_who_activated_a_release_and_who_rolled_it_back_stands_beside_the_release(keyed: Keyed, tmp_path: Path) -> None:
    keyed.context.registry.register(manifest("r2", parent="r1"), tmp_path / "r2")
    day, night = (keyed.keys.create(project_id=None, name=name, scopes=["operate", "operate:read"]) for name in "dn")
    with Client(keyed.address, api_key=day.token) as client:
        client.activate(MODEL, "r2", reason="better")
    with Client(keyed.address, api_key=night.token) as client:
        client.rollback(MODEL, reason="worse")
    switched = [row for row in keyed.events() if row["resource"] in ("releases/r1", "releases/r2")]
    assert [(row["resource"], row["principal"], row["detail"]["why"]) for row in switched[-2:]] == [
        ("releases/r2", f"key:{day.record.id}", "better"), ("releases/r1", f"key:{night.record.id}", "worse"),
    ]  # fmt: skip


def test_a_job_remembers_which_key_asked(keyed: Keyed) -> None:
    issued = keyed.keys.create(project_id="acme", name="web", scopes=["jobs:write"])
    with Client(keyed.address, "acme", api_key=issued.token) as client:
        job = client.submit(png(), "a cat")
    created = [row for row in keyed.events() if row["action"] == "CreateAttributionJob"]
    assert [(row["principal"], row["resource"]) for row in created] == [
        (f"key:{issued.record.id}", f"attributionJobs/{job.id}")
    ]


def test_an_unknown_method_and_bytes_that_are_no_message_are_typed_errors_too(keyed: Keyed) -> None:
    metadata = [("authorization", f"Bearer {keyed.key()}")]
    with grpc.insecure_channel(keyed.address) as channel:
        for path, body, expected in (
            ("/attribution.v1.AttributionService/NoSuch", b"", "METHOD_UNKNOWN"),
            ("/attribution.v1.NoService/Get", b"x", "METHOD_UNKNOWN"),
            ("/attribution.v1.AttributionService/GetAttributionJob", b"\xff\xff\xff", "MALFORMED_REQUEST"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(body, metadata=metadata, timeout=20)
            assert reason(caught.value) == expected


@pytest.mark.parametrize(
    ("address", "settings", "refused"),
    [
        ("127.0.0.1:0", {}, ""),
        ("[::1]:0", {}, ""),
        ("0.0.0.0:0", {}, "AUTH_MODE"),
        ("10.1.2.3:50551", {}, "AUTH_MODE"),
        ("0.0.0.0:0", {"auth_mode": "keys"}, "plain text"),
        ("0.0.0.0:0", {"auth_mode": "keys", "tls_terminated": True}, ""),
    ],
)
def test_a_gateway_open_to_strangers_does_not_start(address: str, settings: dict[str, Any], refused: str) -> None:
    from services.gateway.transport import transport_of

    transport = transport_of(load_settings(**settings))
    if not refused:
        transport.check(address)
        return
    with pytest.raises(SettingsInvalid, match=refused):
        transport.check(address)


def test_where_keys_are_asked_for_the_api_is_not_described_to_strangers(keyed: Keyed) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(keyed.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_operators_call_with_a_projects_key_is_refused_before_anything_happens(keyed: Keyed) -> None:
    with grpc.insecure_channel(keyed.address) as channel, pytest.raises(grpc.RpcError) as caught:
        operator_rpc.OperatorServiceStub(channel).PauseStage(
            operator_wire.PauseStageRequest(stage="lookup"), metadata=[("authorization", f"Bearer {keyed.key()}")]
        )
    assert reason(caught.value) == "SCOPE_MISSING"
    assert not any(depth.paused for depth in keyed.context.jobs.depths())
