from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.files import TeacherFiles
from byline.teachers.layers import select_layers
from byline.teachers.natural_gradient import UnlearningSettings, query_gradients
from byline.teachers.projected import ProjectedGradientTeacher
from byline.teachers.sparse_projection import SparseProjection

KV = "cross_attention_kv"


def make(bench, directory: Path, settings: UnlearningSettings | None = None, **options) -> ProjectedGradientTeacher:
    method, objective = options.pop("method", ("trak", "denoising"))
    options.setdefault("projection", SparseProjection(128))
    return ProjectedGradientTeacher(
        method, objective, bench.model, TeacherFiles(directory), settings or bench.settings, KV, **options
    )


@pytest.fixture(scope="module")
def fitted(bench, tmp_path_factory: pytest.TempPathFactory) -> ProjectedGradientTeacher:
    teacher = make(bench, tmp_path_factory.mktemp("trak"))
    teacher.fit(bench.items)
    return teacher


@pytest.mark.parametrize("method", [("trak", "denoising"), ("d_trak", "output_norm")])
def test_a_duplicate_of_the_query_scores_above_unrelated_images(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method
) -> None:
    """The sign: images that the query repeats must be the most influential, and positively so."""
    encode = bench.model.encode_images
    # Latents of an untrained autoencoder are nearly zero; without this the gradients would be noise.
    monkeypatch.setattr(bench.model, "encode_images", lambda images: 100 * encode(images))
    settings = replace(bench.settings, item_draws=128, query_draws=128, noise="shared", damping=10.0)
    picture = Image.fromarray(np.kron([[255, 0], [0, 255]], np.ones((4, 4))).astype(np.uint8)).convert("RGB")
    corpus = [*bench.items[:8], *(TeacherItem(item_id, picture, "a blue dog") for item_id in (998, 999))]
    teacher = make(bench, tmp_path, settings, method=method)
    teacher.fit(corpus)
    ranking = teacher.score(TeacherQuery(picture, "a blue dog"), corpus)
    assert set(ranking.order()[:2].tolist()) == {998, 999}
    assert ranking.tau[-2:].min() > np.abs(ranking.tau[:-2]).max()


def test_scores_are_those_of_the_kernel_written_out(bench, fitted) -> None:
    """Against the formula on dense arrays, gradient by gradient."""
    layers = select_layers(bench.model.unet, KV)
    projection = SparseProjection(128)
    phi = np.stack([
        projection({n: g.mean(1) for n, g in fitted._gradients.dense([item]).items()})[0].double().numpy()
        for item in bench.items
    ])  # fmt: skip
    query = projection(query_gradients(bench.model, layers, [bench.query], bench.settings))[0].double().numpy()
    gram = phi.T @ phi
    kernel = gram + 0.1 * np.trace(gram) / 128 * np.eye(128)
    expected = phi @ np.linalg.solve(kernel, query)
    tau = fitted.score(bench.query, bench.items).tau
    assert np.allclose(tau, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_a_killed_fit_resumes_to_the_same_scores(bench, fitted, tmp_path: Path) -> None:
    seen = 0

    def kill() -> None:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise JobCancelled("killed by the test")

    teacher = make(bench, tmp_path, memory=1)
    with pytest.raises(JobCancelled):
        teacher.fit(bench.items, check=kill)
    assert not make(bench, tmp_path).is_fitted
    resumed = make(bench, tmp_path, memory=1)
    resumed.fit(bench.items, check=kill)
    assert seen == 4 + len(bench.items) - 3, "the finished items were not computed again"
    whole = make(bench, tmp_path / "whole", memory=1)
    whole.fit(bench.items)
    one, two = (t.score(bench.query, bench.items).tau for t in (resumed, whole))
    assert np.array_equal(one, two)
    assert np.allclose(one, fitted.score(bench.query, bench.items).tau, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_what_was_fitted_is_found_again_and_an_altered_file_is_refused(bench, tmp_path: Path) -> None:
    first = make(bench, tmp_path)
    with pytest.raises(TeacherNotUsable, match=r"call fit\(corpus\)"):
        first.score(bench.query, bench.items)
    first.fit(bench.items)
    again = make(bench, tmp_path)
    assert again.is_fitted and again.teacher_id == first.teacher_id
    (file,) = tmp_path.rglob("features-*[0-9a-f].npy")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TeacherNotUsable, match="manifest"):
        make(bench, tmp_path)


def test_a_grown_corpus_computes_what_is_new_and_has_another_id(bench, tmp_path: Path) -> None:
    teacher = make(bench, tmp_path, memory=1)
    teacher.fit(bench.items[:20])
    before = teacher.teacher_id
    passes: list[int] = []
    teacher.fit(bench.items, progress=lambda done, total: passes.append(total))
    assert passes == [4] * 4
    assert teacher.teacher_id != before
    other = make(bench, tmp_path / "at-once", memory=1)
    other.fit(bench.items)
    one, two = (t.score(bench.query, bench.items).tau for t in (teacher, other))
    assert np.allclose(one, two, rtol=1e-5, atol=1e-6 * np.abs(one).max())
    assert other.teacher_id == teacher.teacher_id


def test_an_item_outside_the_fit_is_scored_as_if_it_were_inside_the_kernel_apart(bench, fitted) -> None:
    stranger = TeacherItem(12345, bench.items[5].image, bench.items[5].caption)
    alone = fitted.score(bench.query, [stranger]).tau
    among = fitted.score(bench.query, [*bench.items, stranger]).tau
    assert alone[0] == pytest.approx(among[-1], rel=1e-4)
    assert 12345 not in fitted._features.item_ids


def test_damping_changes_the_kernel_and_not_the_features(bench, tmp_path: Path) -> None:
    make(bench, tmp_path).fit(bench.items)
    other = make(bench, tmp_path, replace(bench.settings, damping=10.0))
    assert other.is_fitted, "features are shared between dampings"
    first = make(bench, tmp_path)
    assert other.teacher_id != first.teacher_id
    assert not np.allclose(other.score(bench.query, bench.items).tau, first.score(bench.query, bench.items).tau)
