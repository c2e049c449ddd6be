from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from byline.errors import TeacherNotUsable
from byline.teachers.curvature import Curvature, LayerFactors
from byline.teachers.curvature_fit import draw, eigenvectors, fit_curvature
from byline.teachers.layers import select_layers
from byline.teachers.registry import ensure_curvature, holds_curvature


def fisher_gradients(bench, samples: int) -> dict[str, torch.Tensor]:
    """Per-sample gradients [samples, out, in] by one backward pass each: no hooks, no batching."""
    model = bench.model
    latents = model.encode_images([i.image for i in bench.items])
    states = model.encode_prompts([i.caption for i in bench.items])
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    layers = select_layers(model.unet, "cross_attention_kv")
    weights = [layer.module.weight for layer in layers.values()]
    found: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for s in range(samples):
            row = order[s % len(latents)]
            t, noise, xi = draw(0, s, samples, model)
            times = torch.tensor([t])
            output = model.predict(model.add_noise(latents[row][None], noise[None], times), times, states[row][None])
            loss = (output * xi).sum() * (2 / xi.numel()) ** 0.5
            for name, g in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                found[name].append(g)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {n: torch.stack(g) for n, g in found.items()}


@pytest.fixture(scope="module")
def small(bench) -> Curvature:
    latents = bench.model.encode_images([i.image for i in bench.items])
    states = bench.model.encode_prompts([i.caption for i in bench.items])
    return fit_curvature(bench.model, latents, states, samples=96, seed=0, batch=7)


def test_eigenvalues_are_the_brute_force_fisher_diagonal_in_the_eigenbasis(bench, small) -> None:
    gradients = fisher_gradients(bench, 96)
    for name, factors in small.layers.items():
        flat = gradients[name].flatten(1).double()
        fisher = flat.T @ flat / len(flat)  # [out * in, out * in], the matrix EK-FAC never forms
        basis = torch.kron(factors.gradient, factors.activation).double()
        diagonal = (basis.T @ fisher @ basis).diagonal().reshape(factors.eigenvalues.shape)
        assert torch.allclose(diagonal.float(), factors.eigenvalues, rtol=2e-3, atol=1e-6 * diagonal.max())


def test_the_natural_gradient_is_close_to_that_of_the_inverted_fisher(bench, small) -> None:
    """Against (F + damping)^-1 g by a dense solve: EK-FAC is far closer than the plain gradient."""
    gradients = fisher_gradients(bench, 96)
    for name, factors in small.layers.items():
        flat = gradients[name].flatten(1).double()
        fisher = flat.T @ flat / len(flat)
        damping = 0.1 * fisher.diagonal().mean()
        g = gradients[name][:8].mean(0)
        exact = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), g.flatten().double())
        ours = factors.precondition(g, 0.1).flatten().double()
        cosine = torch.nn.functional.cosine_similarity
        # 96 samples cannot fill a 512-dimensional Fisher: EK-FAC is an approximation, and this says how good.
        assert cosine(ours, exact, dim=0) > 2 * cosine(g.flatten().double(), exact, dim=0), name


def test_a_kronecker_fisher_is_inverted_exactly() -> None:
    """Where F is A (x) B the factors are not an approximation: equal to the dense solve."""
    generator = torch.Generator().manual_seed(0)
    root_a, root_b = torch.randn(5, 5, generator=generator), torch.randn(3, 3, generator=generator)
    a, b = root_a @ root_a.T, root_b @ root_b.T
    basis_a, basis_b = eigenvectors(a), eigenvectors(b)
    eigenvalues = torch.outer((basis_b.T @ b @ basis_b).diagonal(), (basis_a.T @ a @ basis_a).diagonal())
    factors = LayerFactors(basis_a, basis_b, eigenvalues)
    g = torch.randn(3, 5, generator=generator)
    fisher = torch.kron(b, a)
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(15)
    assert torch.allclose(factors.precondition(g, 0.1).flatten(), torch.linalg.solve(damped, g.flatten()), rtol=1e-3)


def test_the_fit_does_not_depend_on_the_batch_size(bench, small) -> None:
    latents = bench.model.encode_images([i.image for i in bench.items])
    states = bench.model.encode_prompts([i.caption for i in bench.items])
    other = fit_curvature(bench.model, latents, states, samples=96, seed=0, batch=64)
    name = next(iter(small.layers))
    probe = torch.randn(small.layers[name].eigenvalues.shape, generator=torch.Generator().manual_seed(1))
    first, second = (c.layers[name].precondition(probe, 0.1) for c in (small, other))
    assert (first - second).norm() < 1e-3 * first.norm()


def test_layers_that_read_the_text_share_one_activation_factor(small) -> None:
    first = next(iter(small.layers.values())).activation
    assert all(torch.equal(f.activation, first) for f in small.layers.values())


def test_saved_factors_load_and_refuse_another_model_or_an_altered_file(bench, small, tmp_path: Path) -> None:
    small.save(tmp_path)
    again = Curvature.load(tmp_path, bench.model.revision)
    name = next(iter(small.layers))
    assert torch.allclose(again.layers[name].eigenvalues, small.layers[name].eigenvalues)
    assert again.name == small.name
    assert len(load_file(tmp_path / "activation_eigenvectors.safetensors")) == 1, "the shared factor is written once"
    assert again.layers[list(small.layers)[-1]].activation is again.layers[name].activation
    with pytest.raises(TeacherNotUsable, match="fit again"):
        Curvature.load(tmp_path, "0" * 16)
    file = tmp_path / "lambda_matrix.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TeacherNotUsable, match="manifest"):
        Curvature.load(tmp_path, bench.model.revision)


@pytest.mark.parametrize("count", [torch.tensor([7]), torch.tensor(7)])
def test_a_folder_of_another_program_is_read_without_a_manifest(tmp_path: Path, count: torch.Tensor) -> None:
    """The published layout, by hand: four files keyed by module name, a sum and how many it is over."""
    generator = torch.Generator().manual_seed(0)
    name = "down.attn2.to_k"
    basis_a, basis_b = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (5, 3))
    total = torch.rand(3, 5, generator=generator)
    parts = {
        "activation_eigenvectors": basis_a, "gradient_eigenvectors": basis_b, "lambda_matrix": total,
        "num_lambda_processed": count,
    }  # fmt: skip
    for file, tensor in parts.items():
        save_file({name: tensor.contiguous()}, tmp_path / f"{file}.safetensors")
    with pytest.raises(TeacherNotUsable, match="selection must be given"):
        Curvature.load(tmp_path, "r")
    read = Curvature.load(tmp_path, "r", selection="cross_attention_kv")
    assert (read.selection, read.model_revision, read.samples) == ("cross_attention_kv", "r", 7)
    g = torch.randn(3, 5, generator=generator)
    eigenvalues = total / 7
    expected = basis_b @ ((basis_b.T @ g @ basis_a) / (eigenvalues + 0.1 * eigenvalues.mean())) @ basis_a.T
    assert torch.allclose(read.precondition({name: g}, 0.1)[name], expected, rtol=1e-4)
    save_file({name: total * 2}, tmp_path / "lambda_matrix.safetensors")
    other = Curvature.load(tmp_path, "r", selection="cross_attention_kv")
    assert other.name != read.name, "other factors, another teacher"
    again = tmp_path / "again"
    other.save(again)
    assert Curvature.load(again, "r").name == other.name
    save_file({name: total.bfloat16()}, tmp_path / "lambda_matrix.safetensors")
    with pytest.raises(TeacherNotUsable, match="float32"):
        Curvature.load(tmp_path, "r", selection="cross_attention_kv")
    save_file({name: total.T.contiguous()}, tmp_path / "lambda_matrix.safetensors")
    with pytest.raises(TeacherNotUsable, match="do not fit"):
        Curvature.load(tmp_path, "r", selection="cross_attention_kv")


def test_whitened_products_are_preconditioned_products(small) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {n: f.eigenvalues.shape for n, f in small.layers.items()}
    g, h = ({n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(2))
    left, right, expected = small.whiten(g, 0.1), small.whiten(h, 0.1), small.precondition(g, 0.1)
    for name in g:
        scale = expected[name].norm() * h[name].norm()
        assert ((left[name] * right[name]).sum() - (expected[name] * h[name]).sum()).abs() < 1e-4 * scale


def test_curvature_of_an_earlier_checkpoint_is_fitted_again(bench, small, tmp_path: Path) -> None:
    replace(small, model_revision="0" * 16).save(tmp_path)
    assert not holds_curvature(tmp_path, bench.model.revision)
    fitted = ensure_curvature(bench.model, bench.items, tmp_path, samples=24)
    assert fitted.model_revision == bench.model.revision
    assert holds_curvature(tmp_path, bench.model.revision)
