"""The teachers on a CUDA device agree with themselves on the CPU, fits with files and resumed ones included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import JobCancelled
from byline.features.gradient import Gradient, fit_gradient_feature
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.diagonal_fisher import fit_diagonal_fisher
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import GradientBasis
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.registry import ensure_curvature
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_fit import fit_sketches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SETTINGS = UnlearningSettings(corpus_size=12, query_draws=32, item_draws=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(place: Path) -> DiffusionModel:
    return DiffusionModel.load(place, "cuda")


@pytest.fixture(scope="module")
def items() -> list[TeacherItem]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    return [TeacherItem(100 + i, Image.fromarray(p), f"a red cat w{i % 7}") for i, p in enumerate(pixels)]


@pytest.fixture(scope="module")
def corpus(model: DiffusionModel, items: list[TeacherItem]) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_images([i.image for i in items]), model.encode_prompts([i.caption for i in items])


@pytest.fixture(scope="module")
def curvature(model: DiffusionModel, corpus: tuple[torch.Tensor, torch.Tensor]) -> Curvature:
    return fit_curvature(model, *corpus, samples=128, seed=0)


def test_a_fit_with_files_is_that_without_also_after_a_kill(
    model: DiffusionModel, corpus: tuple[torch.Tensor, torch.Tensor], curvature: Curvature, tmp_path: Path
) -> None:
    calls = iter(range(3))

    def check() -> None:
        if next(calls, None) is None:
            raise JobCancelled("killed")

    with pytest.raises(JobCancelled):
        fit_curvature(model, *corpus, samples=128, seed=0, batch=16, directory=tmp_path, check=check)
    found = fit_curvature(model, *corpus, samples=128, seed=0, batch=16, directory=tmp_path, shards=2)
    for name, factors in curvature.layers.items():
        scale, ones = float(factors.eigenvalues.mean()), torch.ones_like(factors.eigenvalues)
        ours, theirs = (f.precondition(ones, 0.1) for f in (found.layers[name], factors))
        torch.testing.assert_close(ours * scale, theirs * scale, rtol=1e-2, atol=1e-2)
    assert found.device.type == curvature.device.type == "cuda"
    assert fit_diagonal_fisher(model, *corpus, samples=32, seed=0).squares.popitem()[1].device.type == "cuda"


def test_curvature_that_was_shipped_is_loaded_onto_the_device(
    model: DiffusionModel, items: list[TeacherItem], tmp_path: Path
) -> None:
    for _ in range(2):  # fitted, then read
        assert ensure_curvature(model, items, tmp_path, samples=32).device.type == "cuda"


def test_every_form_of_the_teacher_ranks_as_it_does_on_the_cpu(
    place: Path, model: DiffusionModel, items: list[TeacherItem], curvature: Curvature, tmp_path: Path
) -> None:
    query, on_cpu = TeacherQuery(items[3].image, items[3].caption), DiffusionModel.load(place)
    for kind in (AbuPlus, AbuPlusLinear):
        found = kind(model, curvature, SETTINGS).score(query, items).tau
        expected = kind(on_cpu, curvature.to("cpu"), SETTINGS).score(query, items).tau
        assert np.corrcoef(found, expected)[0, 1] > 0.99
    linear = AbuPlusLinear(model, curvature, SETTINGS)
    sketches = fit_sketches(linear, items, dimensions=6, fidelity_queries=[query], store=tmp_path)
    assert sketches.tokens is not None
    scores = SketchTeacher(model, curvature, sketches.basis, sketches).score(query, items).tau
    assert np.corrcoef(scores, linear.score(query, items).tau)[0, 1] > 0.9
    truth = sketches.tokens.scores(sketches.tokens.basis.directions(linear.directions([query])))
    fit_gradient_feature(linear, sketches.tokens, [query], truth, tmp_path / "gradient")
    basis = GradientBasis.load(tmp_path / "gradient", model.revision)
    assert Gradient(model, curvature, basis).encode([query.image], [query.prompt]).shape == (1, basis.dimensions)
