"""The teachers a worker keeps: few, and shared while the corpus grows."""

from __future__ import annotations

import numpy as np
import pytest

from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.abu_plus import AbuPlus
from services.workers.teacher_bench import KEPT_TEACHERS

from .conftest import Bench, png

DRAWS = 16


def exact(bench: Bench) -> AbuPlus:
    found = bench.teachers.teacher("abu_plus", DRAWS)
    assert isinstance(found, AbuPlus)
    return found


def test_items_that_are_added_scale_tau_and_load_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = exact(bench)
    picture = decode_image(bench.blobs.get(bench.items[0].image_sha256))
    query, item = TeacherQuery(picture, "a red cat"), TeacherItem(1, picture, bench.items[0].caption)
    before = first.score(query, [item])
    bench.catalog.add_items("tiny", [Item(7, "a red cat w7", image_sha256=bench.blobs.put(png(7)))])

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the size of a corpus is no reason to read it, or a curvature")

    monkeypatch.setattr(bench.catalog, "items", refuse)
    monkeypatch.setattr("services.workers.teacher_bench.load_ready_teacher", refuse)
    second = exact(bench)
    assert (first.settings.corpus_size, second.settings.corpus_size) == (6, 7)
    assert second.curvature is first.curvature and second.teacher_id != first.teacher_id
    assert first.settings.corpus_size == 6, "a job that holds the teacher of before goes on with it"
    np.testing.assert_allclose(second.score(query, [item]).tau, before.tau * 6 / 7, rtol=0.05)


def test_no_more_than_a_few_teachers_are_kept_and_those_used_last(bench: Bench) -> None:
    kept = exact(bench)
    for draws in range(8, 8 * (KEPT_TEACHERS + 3), 8):
        bench.teachers.teacher("abu_plus_linear", draws)
        assert exact(bench) is kept
        assert len(bench.teachers._teachers) <= KEPT_TEACHERS
