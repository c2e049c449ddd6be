from pathlib import Path

import pytest
import torch

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers.curvature_fit import draw
from byline.teachers.diagonal_fisher import DiagonalFisher, fit_diagonal_fisher
from byline.teachers.layers import select_layers
from byline.teachers.preconditioner import NoCurvature

SAMPLES = 36


@pytest.fixture(scope="module")
def corpus(bench) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        bench.model.encode_images([i.image for i in bench.items]),
        bench.model.encode_prompts([i.caption for i in bench.items]),
    )


@pytest.fixture(scope="module")
def fitted(bench, corpus) -> DiagonalFisher:
    return fit_diagonal_fisher(bench.model, *corpus, selection="all", samples=SAMPLES, seed=0, batch=9)


def test_the_diagonal_is_the_mean_squared_gradient_of_single_backward_passes(bench, corpus, fitted) -> None:
    model, (latents, states) = bench.model, corpus
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    layers = select_layers(model.unet, "all")
    names = ["conv_in", *select_layers(model.unet, "cross_attention_kv")]
    weights = [layers[name].module.weight for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for s in range(SAMPLES):
            t, noise, _ = draw(0, s, SAMPLES, model, "fisher")
            row = order[s % len(latents)]
            loss = model.denoising_loss(latents[row][None], states[row][None], torch.tensor([t]), noise[None])
            for sums, g in zip(total, torch.autograd.grad(loss[0], weights), strict=True):
                sums += g.detach() ** 2 / SAMPLES
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for name, expected in zip(names, total, strict=True):
        ours = fitted.squares[name][:, : expected[0].numel()]
        assert torch.allclose(ours, expected.flatten(1), rtol=1e-3, atol=1e-6 * expected.max()), name


def test_the_fit_resumes_bit_equal_and_shards_add_up(bench, corpus, fitted, tmp_path: Path) -> None:
    calls = []

    def kill() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise JobCancelled("killed by the test")

    def fit(**options):
        return fit_diagonal_fisher(bench.model, *corpus, selection="all", samples=SAMPLES, seed=0, batch=9, **options)

    with pytest.raises(JobCancelled):
        fit(directory=tmp_path, check=kill)
    resumed, sharded = fit(directory=tmp_path, check=kill), fit(shards=3)
    for name, expected in fitted.squares.items():
        assert torch.equal(resumed.squares[name], expected)
        assert torch.allclose(sharded.squares[name], expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_whitened_products_are_preconditioned_products(fitted) -> None:
    generator = torch.Generator().manual_seed(0)
    g, h = ({n: torch.randn(s.shape, generator=generator) for n, s in fitted.squares.items()} for _ in range(2))
    plain = NoCurvature("all", fitted.model_revision)
    for preconditioner in (fitted, plain):
        left, right = preconditioner.whiten(g, 0.1), preconditioner.whiten(h, 0.1)
        expected = preconditioner.precondition(g, 0.1)
        for name in g:
            assert torch.allclose((left[name] * right[name]).sum(), (expected[name] * h[name]).sum(), rtol=1e-3)


def test_without_damping_a_weight_that_never_moves_stays(fitted) -> None:
    still = DiagonalFisher({"layer": torch.tensor([[0.0, 4.0]])}, "all", "r", 1, 0)
    moved = still.precondition({"layer": torch.tensor([[0.0, 2.0]])}, 0.0)["layer"]
    assert torch.equal(moved, torch.tensor([[0.0, 0.5]]))


def test_a_larger_selection_serves_a_smaller_one_and_not_the_reverse(bench, fitted) -> None:
    smaller = fitted.restrict("cross_attention_kv")
    assert set(smaller.squares) == set(select_layers(bench.model.unet, "cross_attention_kv"))
    assert smaller.name != fitted.name
    for holder in (smaller, NoCurvature("attention", "r")):
        with pytest.raises(TeacherNotUsable, match="fit it for 'all'"):
            holder.restrict("all")
    with pytest.raises(TeacherNotUsable, match="conv_in"):
        smaller.precondition({"conv_in": torch.zeros(1, 1)}, 0.1)


def test_a_saved_diagonal_loads_and_refuses_another_model_or_an_altered_file(fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    again = DiagonalFisher.load(tmp_path, fitted.model_revision)
    assert again.name == fitted.name
    assert all(torch.equal(again.squares[n], s) for n, s in fitted.squares.items())
    with pytest.raises(TeacherNotUsable, match="fit again"):
        DiagonalFisher.load(tmp_path, "0" * 16)
    file = tmp_path / "diagonal.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TeacherNotUsable, match="manifest"):
        DiagonalFisher.load(tmp_path, fitted.model_revision)
    with pytest.raises(TeacherNotUsable, match="fit it"):
        DiagonalFisher.load(tmp_path / "nowhere", fitted.model_revision)
