from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from byline.errors import JobCancelled
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.similarity import SimilarityTeacher


def test_pixels_are_the_correlation_of_thumbnails(bench) -> None:
    teacher = SimilarityTeacher("pixels", bench.model)
    query = bench.items[3].image
    darker = Image.fromarray(np.asarray(query) // 2)
    negative = Image.fromarray(255 - np.asarray(query))
    items = [TeacherItem(n, image, "x") for n, image in enumerate([query, darker, negative, bench.items[4].image])]
    tau = teacher.score(TeacherQuery(query, "anything"), items).tau
    assert tau[0] == pytest.approx(1, abs=1e-6)
    assert tau[1] == pytest.approx(1, abs=1e-3), "brightness and contrast do not count"
    assert tau[2] == pytest.approx(-1, abs=1e-6)
    assert abs(tau[3]) < 0.5


def test_a_plain_picture_is_similar_to_nothing(bench) -> None:
    plain = TeacherItem(1, Image.new("RGB", (8, 8), (10, 10, 10)), "x")
    assert SimilarityTeacher("pixels", bench.model).score(bench.query, [plain]).tau.tolist() == [0.0]


def test_the_unets_own_features_rank_the_same_picture_and_caption_first(bench) -> None:
    twin = replace(bench.items[3], item_id=999)
    ranking = SimilarityTeacher("denoiser", bench.model).score(bench.query, [*bench.items[4:], twin])
    assert ranking.order()[0] == 999


def test_scores_without_noise_have_no_error_and_no_samples(bench) -> None:
    ranking = SimilarityTeacher("pixels", bench.model).score(bench.query, bench.items)
    assert not ranking.standard_error.any() and ranking.draws == 0
    assert np.array_equal(ranking.tau_halves, np.stack([ranking.tau] * 2))


def test_items_are_encoded_once_and_a_cancel_is_seen(bench) -> None:
    teacher = SimilarityTeacher("pixels", bench.model)

    def stop() -> None:
        raise JobCancelled("stop")

    with pytest.raises(JobCancelled):
        teacher.fit(bench.items, check=stop)
    teacher.fit(bench.items)
    teacher.score(bench.query, bench.items, check=stop)
