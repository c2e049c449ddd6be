"""The path of a job through every process: submit, watch, RETRIEVED, VERIFIED, swap."""

from __future__ import annotations

import urllib.request
import uuid
from collections.abc import Callable

import pytest

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.errors import TierNotAvailable

from .conftest import CORPUS_ID, PATIENCE_S, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

Picture = Callable[[int], tuple[bytes, Item]]


def test_a_corpus_image_finds_itself_first(cluster: Cluster, picture: Picture, project: str) -> None:
    data, item = picture(3)
    with cluster.client(project) as client:
        answer = client.attribute(data, prompt=item.caption, top_k=5, timeout=PATIENCE_S)
    assert answer.tier == "RETRIEVED"
    assert [one.rank for one in answer.influences] == [1, 2, 3, 4, 5]
    assert answer.influences[0].item_id == item.item_id
    assert answer.influences[0].creator == item.creator
    assert cluster.releases[0] in answer.release


def test_a_verified_job_streams_both_tiers_and_ends_once(cluster: Cluster, picture: Picture, project: str) -> None:
    data, item = picture(7)
    with cluster.client(project) as client:
        job = client.submit(data, prompt=item.caption, tier="VERIFIED", top_k=5)
        tiers: list[str] = []
        for seen in client.watch(job.id):
            tiers += [answer.tier for answer in seen.answers if answer.tier not in tiers]
            last = seen
    assert tiers == ["RETRIEVED", "VERIFIED"]
    assert last.state == "SUCCEEDED"
    retrieved, verified = last.answers
    assert verified.release == retrieved.release
    assert verified.teacher_id.startswith("abu_plus+output_norm/")
    taus = [one.tau for one in verified.influences]
    assert len(taus) == 5 and taus == sorted(taus, reverse=True)
    assert all(one.standard_error >= 0 for one in verified.influences)
    states = [event.to_state for event in cluster.jobs.events(uuid.UUID(job.id))]
    assert states.count("SUCCEEDED") == 1


def test_an_estimated_job_streams_both_tiers_and_orders_the_corpus_as_the_sketch_teacher_does(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    data, item = picture(5)
    withdrawn = CatalogStore(cluster.engine).withdrawn(CORPUS_ID)
    with cluster.client(project) as client:
        job = client.submit(data, prompt=item.caption, tier="ESTIMATED", top_k=25)
        tiers: list[str] = []
        for seen in client.watch(job.id):
            tiers += [answer.tier for answer in seen.answers if answer.tier not in tiers]
            last = seen
    assert tiers == ["RETRIEVED", "ESTIMATED"] and last.state == "SUCCEEDED"
    retrieved, estimated = last.answers
    assert estimated.release == retrieved.release and estimated.teacher_id.startswith("sketch/")
    assert estimated.draws == 16 and len(estimated.influences) == 25
    assert all(one.standard_error > 0 and one.caption for one in estimated.influences)
    expected = [one for one in _order_of_the_sketch_teacher(cluster, data, item.caption) if one not in withdrawn]
    assert [one.item_id for one in estimated.influences] == expected[:25]


def _order_of_the_sketch_teacher(cluster: Cluster, data: bytes, prompt: str) -> list[int]:
    """The whole corpus by the library alone, from the model's own files."""
    from byline.catalog.decode import decode_image
    from byline.diffusion.model import DiffusionModel
    from byline.teachers import TeacherItem, TeacherQuery
    from byline.teachers.curvature import Curvature
    from byline.teachers.sketch import SketchTeacher
    from byline.teachers.sketch_set import SketchSet

    model = DiffusionModel.load(cluster.root / "model")
    curvature = Curvature.load(cluster.root / "model" / "curvature", model.revision)
    known = SketchSet.load(cluster.root / "model" / "sketches", model.revision)
    teacher = SketchTeacher(model, curvature, known.basis, known, query_draws=16)
    corpus = [
        TeacherItem(one.item_id, decode_image(cluster.blobs.get(one.image_sha256)), one.caption)
        for one in CatalogStore(cluster.engine).items(CORPUS_ID, include_withdrawn=True)
    ]
    return teacher.score(TeacherQuery(decode_image(data), prompt), corpus).order().tolist()


def test_a_release_without_sketches_refuses_an_estimate_and_says_which_release_it_is(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    first, second = cluster.releases
    data, item = picture(6)
    with cluster.client(project) as client:
        cluster.registry.activate("tiny", second)
        try:
            with pytest.raises(TierNotAvailable, match=f"{second} has no sketches"):
                client.submit(data, prompt=item.caption, tier="ESTIMATED")
        finally:
            cluster.registry.activate("tiny", first)
        cluster.serves(first)


def test_a_withdrawn_item_is_in_no_estimate_given_afterwards(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    data, item = picture(8)
    with cluster.client(project) as client:
        before = client.attribute(data, prompt=item.caption, tier="ESTIMATED", top_k=5, timeout=PATIENCE_S)
        gone = before.influences[0].item_id
        client.withdraw("tiny", [gone])
        after = client.attribute(data, prompt=item.caption, tier="ESTIMATED", top_k=5, timeout=PATIENCE_S)
        read_again = client.get(before.job).answer_of("ESTIMATED")
    assert [one.item_id for one in after][:4] == [one.item_id for one in before][1:]
    assert len(after) == 5
    assert read_again is not None and gone not in {one.item_id for one in read_again.influences}


def test_after_a_swap_the_next_job_names_the_new_release(cluster: Cluster, picture: Picture, project: str) -> None:
    first, second = cluster.releases
    data, item = picture(11)
    with cluster.client(project) as client:
        before = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S)
        cluster.registry.activate("tiny", second)
        try:
            cluster.serves(second)
            after = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S)
        finally:
            cluster.registry.activate("tiny", first)
        cluster.serves(first)
        back = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S)
    assert [answer.release.rpartition("/")[2] for answer in (before, after, back)] == [first, second, first]


def test_a_withdrawn_item_is_in_no_answer_given_afterwards(cluster: Cluster, picture: Picture, project: str) -> None:
    data, item = picture(39)
    with cluster.client(project) as client:
        before = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S)
        client.withdraw("tiny", [item.item_id])
        after = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S)
        read_again = client.get(before.job).answer
    assert item.item_id in {one.item_id for one in before}
    assert item.item_id not in {one.item_id for one in after}
    assert len(after) == len(before)
    assert read_again is not None and item.item_id not in {one.item_id for one in read_again.influences}


def test_the_worker_says_in_its_metrics_which_release_it_serves(
    cluster: Cluster, picture: Picture, project: str
) -> None:
    data, item = picture(2)
    with cluster.client(project) as client:
        release = client.attribute(data, prompt=item.caption, timeout=PATIENCE_S).release.rpartition("/")[2]
    url = f"http://127.0.0.1:{cluster.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    assert f'byline_release_info{{release_id="{release}"}} 1.0' in text
    assert 'byline_jobs_completed_total{outcome="succeeded",stage="lookup"}' in text
