"""Labels out of shared passes are those of the registered teachers, half by half, and go on after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.evaluation.study_teacher_labels import LabelMaker, LabelSettings, kernel_scores, repeated
from byline.teachers.files import TeacherFiles
from byline.teachers.item_gradients import ItemGradients, Objective
from byline.teachers.projected import ProjectedGradientTeacher
from byline.teachers.ranking import TeacherItem, TeacherQuery
from byline.teachers.recipes import Fitting
from byline.teachers.registry import load_ready_teacher

SETTINGS = LabelSettings(draws=16, query_draws=16, samples=32)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> LabelMaker:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("labels")
    model = DiffusionModel.load(write_tiny_pipeline(folder / "model", channels=8))
    pixels = np.random.default_rng(0).integers(0, 255, (14, 8, 8, 3), dtype=np.uint8)
    items = [TeacherItem(100 + i, Image.fromarray(p), f"a red cat w{i % 7}") for i, p in enumerate(pixels)]
    queries = [TeacherQuery(item.image, item.caption) for item in items[11:]]
    return LabelMaker(model, items[:11], queries, SETTINGS, folder / "cache", folder / "work", lambda *_: None)


def files(maker: LabelMaker) -> TeacherFiles:
    """Where the maker keeps fitted curvature."""
    kept = TeacherFiles.beside(maker.model.directory, maker.cache, maker.model.revision)
    [place] = kept.cache.glob("study-*")
    return TeacherFiles(place, kept.shipped)


def test_both_halves_of_the_first_order_teachers_are_the_registered_ones(maker: LabelMaker) -> None:
    found = maker.make()
    assert set(found) == {"abu_plus", "abu_plus_linear all", "trak", "d_trak"}
    for name, selection in (("abu_plus", "cross_attention_kv"), ("abu_plus_linear all", "all")):
        teacher = load_ready_teacher(
            "abu_plus_linear", maker.model, files(maker), SETTINGS.unlearning(11), lambda: maker.items,
            selection=selection, fitting=Fitting(SETTINGS.samples, SETTINGS.seed),
        )  # fmt: skip
        for q, ranking in enumerate(teacher.score_many(maker.queries, maker.items)):
            wanted = ranking.tau_halves
            assert np.allclose(found[name][:, q], wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max()), name
            assert np.abs(wanted[0] - wanted[1]).max() > 0


def test_projections_and_kernel_are_those_of_the_registered_teacher(maker: LabelMaker, tmp_path: Path) -> None:
    maker.make()
    kinds: tuple[tuple[str, Objective], ...] = (("trak", "denoising"), ("d_trak", "output_norm"))
    for method, objective in kinds:
        teacher = ProjectedGradientTeacher(
            method, objective, maker.model, TeacherFiles(tmp_path / method), SETTINGS.unlearning(11),
            "cross_attention_kv",
        )  # fmt: skip
        teacher.fit(maker.items)
        [theirs] = (tmp_path / method).rglob("features-*[0-9a-f].npy")
        width = np.load(theirs).shape[2]
        items, queries = (np.load(next(maker.work.rglob(f"{objective}-{kind}.npy")))[:, :, -width:]
                          for kind in ("items", "queries"))  # fmt: skip
        assert np.allclose(items, np.load(theirs), atol=1e-4 * np.abs(items).max()), method
        # The registered one has one query gradient for both halves of the items' noise: the mean of ours.
        found = kernel_scores(items, np.repeat(queries.mean(1, keepdims=True), 2, axis=1), SETTINGS.damping)
        wanted = np.stack([r.tau_halves for r in teacher.score_many(maker.queries, maker.items)], axis=1)
        assert np.allclose(found, wanted, atol=2e-3 * np.abs(wanted).max()), method


def test_equal_query_halves_leave_the_mean_of_the_item_halves() -> None:
    rng = np.random.default_rng(0)
    items, query = rng.normal(size=(20, 2, 6)).astype(np.float32), rng.normal(size=(3, 1, 6)).astype(np.float32)
    found = kernel_scores(items, np.repeat(query, 2, axis=1), 0.1)
    mean = items.mean(1).astype(np.float64)
    kernel = mean.T @ mean
    kernel += 0.1 * np.trace(kernel) / 6 * np.eye(6)
    assert np.allclose(found.mean(0), query[:, 0] @ np.linalg.inv(kernel) @ mean.T, atol=1e-5)


def test_a_repetition_of_a_kernel_on_few_items_agrees_with_itself() -> None:
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, 1, 80)) + 0.5 * rng.normal(size=(n, 2, 80)) for n in (20, 5))
    halves = repeated(items.astype(np.float32), queries.astype(np.float32), 0.1)
    alone = kernel_scores(items[:, [1, 1]].astype(np.float32), queries[:, [1, 1]].astype(np.float32), 0.1)
    assert np.allclose(halves[1], alone[1])
    assert np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1] > 0.3


def test_a_second_call_reads_what_the_first_kept(maker: LabelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = maker.make()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be computed again")

    monkeypatch.setattr(ItemGradients, "block", refuse)
    second = maker.make()
    assert all(np.array_equal(first[name], second[name]) for name in first)
