"""Scores from stored gradients are the teachers' own, and a killed pass goes on where it stopped."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import TeacherNotUsable
from byline.evaluation.retraining_head import HeadSettings, score_head
from byline.evaluation.retraining_scores import ScoreBook, ScoreSettings
from byline.evaluation.retraining_study import SIZES, Study
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.layers import SELECTIONS
from byline.teachers.preconditioner import NoCurvature

SETTINGS = ScoreSettings(query_draws=8, item_draws=8, samples=32, dampings=(0.1, 10.0), forms=("sum", "unit"))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> ScoreBook:
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(20):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    captions = [f"cat {n}" for n in range(20)]
    table = pa.table({"item_id": list(range(20)), "caption": captions, "image": pictures})
    pq.write_table(table, root / "items.parquet")
    source = write_tiny_pipeline(root / "source", channels=8)
    # A few dozen steps at a high rate: a UNet at its first weights has zero output and hardly a gradient inside.
    settings = replace(SIZES["tiny"], items=20, queries=3, steps=40, rate=5e-3)
    study = Study(settings, root / "items.parquet", source, root / "work")
    study.prepare()
    return ScoreBook(study, SETTINGS)


@pytest.mark.parametrize("selection", ["cross_attention_kv", "linear", "all"])
def test_products_with_stored_gradients_are_the_teachers_scores(book: ScoreBook, selection: str) -> None:
    found = book.first_order_scores(book.study.queries, "sum")
    for damping in SETTINGS.dampings:
        settings = replace(SETTINGS.unlearning(20), damping=damping)
        teacher = AbuPlusLinear(book.model, book.curvature("all").restrict(selection), settings)
        tau = np.stack([r.tau for r in teacher.score_many(book.study.queries, book.study.items)])
        np.testing.assert_allclose(found[f"abu_plus_linear {selection} {damping:g} sum"], tau,
                                   rtol=1e-3, atol=1e-4 * np.abs(tau).max())  # fmt: skip


def test_the_other_objective_is_the_teachers_too(book: ScoreBook) -> None:
    found = book.first_order_scores(book.study.queries, "output_norm", only="abu_plus_linear all 0.1 output_norm")
    settings = replace(SETTINGS.unlearning(20), objective="output_norm")
    teacher = AbuPlusLinear(book.model, book.curvature("all"), settings)
    tau = np.stack([r.tau for r in teacher.score_many(book.study.queries, book.study.items)])
    np.testing.assert_allclose(found["abu_plus_linear all 0.1 output_norm"], tau,
                               rtol=1e-3, atol=1e-4 * np.abs(tau).max())  # fmt: skip


def test_the_plain_gradient_is_the_teacher_without_curvature(book: ScoreBook) -> None:
    teacher = AbuPlusLinear(book.model, NoCurvature("all", book.model.revision), SETTINGS.unlearning(20))
    tau = np.stack([r.tau for r in teacher.score_many(book.study.queries, book.study.items)])
    found = book.first_order_scores(book.study.queries, "sum", only="gradient_linear all sum")
    assert list(found) == ["gradient_linear all sum"]
    np.testing.assert_allclose(found["gradient_linear all sum"], tau, rtol=1e-3, atol=1e-4 * np.abs(tau).max())


def test_kernels_are_those_of_the_registered_teachers_up_to_their_random_projection(book: ScoreBook) -> None:
    # The registered ones refer damping to the mean over the 2048 projected dimensions, not over the 20 items.
    same = ScoreBook(book.study, replace(SETTINGS, dampings=(0.1 * 20 / 2048,)))
    for teacher in ("trak", "d_trak"):
        dense = same.kernel_scores(book.study.queries, teacher)[f"{teacher} cross_attention_kv {0.1 * 20 / 2048:g}"]
        projected = book.registered(teacher)
        assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(dense, projected, strict=True)) > 0.9


def test_every_variant_is_scored_once_and_what_cannot_run_is_named(book: ScoreBook) -> None:
    skipped = book.ensure(["abu_plus_linear", "similarity:pixels", "nobody"])
    assert list(skipped) == ["nobody"]
    names = book.names()
    assert len([n for n in names if n.startswith("abu_plus_linear")]) == len(SELECTIONS) * 2 * 2
    assert {"random", "caption words", "similarity:pixels"} < set(names)
    assert all(book.get(n).shape == (3, len(book.study.items)) for n in names)
    with pytest.raises(TeacherNotUsable, match="nobody"):
        book.get("nobody")


def test_a_killed_pass_resumes_to_the_same_bits(book: ScoreBook, tmp_path: Path) -> None:
    whole = np.array(book.gradients("unit").rows)
    other = ScoreBook(book.study, SETTINGS)
    other._gradient_directory = tmp_path
    passes: list[int] = []

    def killed(stage: str, done: int, total: int) -> None:
        passes.append(done)
        raise KeyboardInterrupt

    other._report = killed
    with pytest.raises(KeyboardInterrupt):
        other.gradients("unit")
    other._report = lambda stage, done, total: None
    assert passes == [16]  # killed after the first chunk of two
    assert np.array_equal(np.array(other.gradients("unit").rows), whole)


def test_a_head_learns_from_the_studys_teacher_and_scores_its_queries(book: ScoreBook) -> None:
    settings = HeadSettings(queries=8, features="denoiser+gradient", hidden=(8,), out_dim=8, max_steps=2, basis_draws=2)
    scores = score_head(book, "abu_plus_linear all 0.1 sum", settings)
    assert scores.shape == (3, len(book.study.items))
    assert np.isfinite(scores).all() and scores.std() > 0
    again = score_head(book, "abu_plus_linear all 0.1 sum", settings)  # by the basis that was kept
    np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-5)
