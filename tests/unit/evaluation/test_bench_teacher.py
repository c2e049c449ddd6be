"""The benchmark at its smallest, on a pipeline of random weights: every step runs, is kept, and adds up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.cli.bench_teacher import measure
from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.evaluation.bench_plan import SIZES, Bench
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.bench_teacher_report import draw
from byline.evaluation.published_teacher import PublishedSettings, PublishedTeacher
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherItem, TeacherQuery


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    model = DiffusionModel.load(write_tiny_pipeline(folder / "model"))
    pixels = np.random.default_rng(0).integers(0, 255, (15, 8, 8, 3), dtype=np.uint8)
    items = [TeacherItem(100 + i, Image.fromarray(p), f"a red cat w{i % 7}") for i, p in enumerate(pixels)]
    latents = model.encode_images([item.image for item in items])
    states = model.encode_prompts([item.caption for item in items])
    curvature = fit_curvature(model, latents, states, samples=96, seed=0)
    curvature.save(folder / "curvature")
    queries = [TeacherQuery(item.image, item.caption) for item in items[12:]]
    return Bench(model, curvature, folder / "curvature", items[:12], queries, 12, SIZES["tiny"], RowFile(folder / "r"))


def _slopes(bench: Bench, teacher: PublishedTeacher, direction: dict[str, torch.Tensor]) -> np.ndarray:
    """d loss of each item / d step along ``direction``, by autograd, under the published noise, written out anew."""
    latents, states = teacher.prepare(bench.items)
    draws, size = teacher.settings.item_draws, teacher.settings.images_per_batch
    slopes = []
    for number in range(len(latents)):
        generator = torch.Generator().manual_seed(teacher.settings.seed + number // size)
        noise = torch.randn(size, draws, *bench.model.latent_shape, generator=generator)[number % size]
        weights = {name: bench.model.unet.get_submodule(name).weight.requires_grad_(True) for name in direction}
        loss = bench.model.denoising_loss(
            latents[number].expand(draws, -1, -1, -1), states[number].expand(draws, -1, -1),
            torch.arange(0, 1000, 1000 / draws).long(), noise,
        )  # fmt: skip
        found = torch.autograd.grad(loss.double().mean(), list(weights.values()))
        slopes.append(sum(float((g * direction[name]).sum()) for name, g in zip(weights, found, strict=True)))
        for weight in weights.values():
            weight.requires_grad_(False)
    return np.array(slopes)


def test_published_scores_are_rises_along_the_damped_natural_gradient(bench: Bench) -> None:
    """The step is ours to the bit of rounding; the rise is the slope along it; a query leaves nothing behind."""
    teacher = PublishedTeacher(bench.model, bench.factors, PublishedSettings(64, 20))
    prepared = teacher.prepare(bench.items)
    teacher.restore()
    before = teacher.losses(*prepared)
    gradient = teacher.query_gradient(bench.queries[0])
    direction = bench.curvature.precondition(gradient, 0.1)
    for name, found in teacher.direction(gradient).items():
        assert torch.allclose(found, direction[name], rtol=1e-3, atol=1e-4 * float(direction[name].abs().max()))
    slopes = _slopes(bench, teacher, direction)

    settings = UnlearningSettings(12, query_draws=16, item_draws=16)
    step = AbuPlus(bench.model, bench.curvature, settings).calibrate(direction, bench.queries[0])
    first = teacher.score(bench.queries[0], prepared, before, step).rises
    teacher.score(bench.queries[1], prepared, before, step)
    again = teacher.score(bench.queries[0], prepared, before, step).rises
    teacher.restore()
    assert torch.equal(first, again)
    assert torch.equal(teacher.losses(*prepared), before)
    assert np.corrcoef(first.mean(1), slopes)[0, 1] > 0.99


def test_published_gradient_is_that_of_the_mean_loss(bench: Bench) -> None:
    """A step along the plain gradient raises the query's loss by |gradient|^2 times the step."""
    teacher = PublishedTeacher(bench.model, bench.factors, PublishedSettings(64, 16, query_batch=64))
    teacher.restore()
    query = bench.queries[0]
    gradient = teacher.query_gradient(query)
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.randint(0, 1000, (64,), generator=generator)
    noise = torch.randn(64, *bench.model.latent_shape, generator=generator)
    latent, states = bench.model.encode_images([query.image]), bench.model.encode_prompts([query.prompt])

    def loss() -> float:
        with torch.no_grad():
            found = bench.model.denoising_loss(
                latent.expand(64, -1, -1, -1), states.expand(64, -1, -1), timesteps, noise
            )
        return float(found.double().mean())

    square = sum(float(g.pow(2).sum()) for g in gradient.values())
    step = 1e-3 / square
    low = loss()
    for name, g in gradient.items():
        bench.model.unet.get_submodule(name).weight.data.add_(g, alpha=step)
    high = loss()
    teacher.restore()
    assert high - low == pytest.approx(step * square, rel=0.05)


def test_every_step_runs_once_and_the_result_adds_up(bench: Bench, tmp_path: Path) -> None:
    result = measure(bench)
    forms = {row["form"] for row in result["rows"]}  # type: ignore[attr-defined]
    assert {"published", "first_order", "exact", "exact_racing"} <= forms
    assert result["many_queries_ratio"] > 0 and result["single_query_ratio"] > 0  # type: ignore[operator]
    assert result["gate"]["spearman"] > 0.95  # type: ignore[index]
    measured = [row for row in result["rows"] if row["form"] == "published"]  # type: ignore[attr-defined]
    assert len(measured) == bench.size.agreement_queries
    draws = bench.size.agreement_items * bench.size.draws
    assert all(row["forwards"] == draws + bench.size.published_query_draws for row in measured)
    assert draw(result, tmp_path / "figure.png") and (tmp_path / "figure.png").stat().st_size > 1000

    resumed = measure(Bench(**{**bench.__dict__, "rows": RowFile(bench.rows.directory)}))
    assert resumed == result  # to the digit, times included: nothing ran again
