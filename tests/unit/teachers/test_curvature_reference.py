"""EK-FAC against what it approximates, and against another implementation of it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from byline.teachers.curvature import Curvature, LayerFactors
from byline.teachers.curvature_fit import covariance_sums, decompose, eigenvalue_sums
from byline.teachers.layers import capture, select_layers, weight_gradients

Samples = dict[str, torch.Tensor]


def losses_of(network: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (network(images) - targets).pow(2).flatten(1).mean(1)


def fit(network: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Curvature:
    """EK-FAC of the empirical Fisher of fixed data, through the sums the real fit uses, in uneven batches."""
    layers = select_layers(network, "all")
    batches = list(zip(images.split(7), targets.split(7), strict=True))

    def gradients(part: tuple[torch.Tensor, torch.Tensor]):
        with capture(layers) as record:
            return record.inputs, record.gradients(losses_of(network, *part))

    def total(parts):
        parts = list(parts)
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    own = {name: name for name in layers}
    bases = decompose(total(covariance_sums(*gradients(part), own) for part in batches), own)
    squares = total(eigenvalue_sums(*gradients(part), bases) for part in batches)
    factors = {n: LayerFactors(*bases[n], squares[n] / len(images)) for n in layers}
    return Curvature(factors, "all", "revision", len(images), 0)


def sample_gradients(network: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Samples:
    layers = select_layers(network, "all")
    with capture(layers) as record:
        deltas = record.gradients(losses_of(network, images, targets))
        return weight_gradients(record.inputs, deltas)


def network_and_data(samples: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    return network.requires_grad_(False), torch.randn(samples, 2, 6, 6), torch.randn(samples, 4)


def test_one_token_of_one_linear_layer_is_inverted_as_by_a_dense_solve() -> None:
    """Inputs and residuals independent, one token: F is A (x) B but for sampling, so EK-FAC is all but exact."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    inputs = torch.randn(20_000, 4) @ torch.randn(4, 4)
    targets = network(inputs) + torch.randn(len(inputs), 3) @ torch.randn(3, 3)
    curvature = fit(network, inputs, targets)
    gradients = sample_gradients(network, inputs, targets)["0"]
    flat = gradients.flatten(1).double()
    fisher = flat.T @ flat / len(flat)  # [rows * columns, rows * columns], bias included
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher))
    probes = torch.randn(5, 3, 5)
    ours = curvature.precondition({"0": probes}, 0.1)["0"]
    exact = torch.linalg.solve(damped, probes.flatten(1).double().T).T.reshape(ours.shape)
    diagonal = probes / (fisher.diagonal().reshape(3, 5) + 0.1 * fisher.diagonal().mean())
    assert (ours - exact).norm() < 0.03 * exact.norm() < (diagonal - exact).norm()


def test_ekfac_is_closer_to_the_inverted_fisher_than_diagonal_and_identity() -> None:
    network, images, targets = network_and_data(4000)
    # Correlated inputs, as pictures are: what a diagonal cannot see.
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1) + 0.5 * images.mean((1, 2, 3), keepdim=True) * 6
    curvature = fit(network, images, targets)
    gradients = sample_gradients(network, images, targets)
    queries = sample_gradients(network, images[:20].flip(3), targets[:20])
    plain, diagonal, ours = [], [], []
    for name, g in gradients.items():
        flat = g.flatten(1).double()
        fisher = flat.T @ flat / len(flat)
        damping = 0.1 * fisher.diagonal().mean()
        query = queries[name]
        exact = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), query.flatten(1).double().T).T
        candidates = (
            query,
            query.flatten(1) / (fisher.diagonal() + damping),
            curvature.precondition({name: query}, 0.1)[name],
        )
        for found, candidate in zip((plain, diagonal, ours), candidates, strict=True):
            found.append(nn.functional.cosine_similarity(candidate.flatten(1).double(), exact).mean())
    for name, a, b, c in zip(gradients, plain, diagonal, ours, strict=True):
        # Measured .86/.89/1.00 against .48/.57/.46 (diagonal) and .45/.55/.41 (identity).
        assert 1 - c < 0.5 * (1 - max(a, b)), (name, a, b, c)


@pytest.mark.skipif(importlib.util.find_spec("kronfluence") is None, reason="kronfluence is not installed (see below)")
def test_factors_and_influences_equal_those_of_an_independent_implementation(tmp_path: Path) -> None:
    """kronfluence (PyPI) on the same fixed data: its factor folder is read, and its scores are ours.

    It declares torchvision, which it does not import, so it is installed apart from the lock:
    ``pip install --no-deps kronfluence==1.0.1 einconv==0.1.0 einops==0.8.2 opt_einsum==3.4.0``.

    Both take the empirical Fisher here, as it draws no noise. Eigenvectors are compared through what
    they are for (sign and order are free); the score <(F + 0.1 mean)^-1 g_query, g_item> is theirs
    from end to end.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    network, images, targets = network_and_data(60)
    ours = fit(network, images, targets)
    items = sample_gradients(network, images, targets)
    queries = sample_gradients(network, images[:5] + 1, targets[:5])

    class Regression(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return losses_of(model, *batch).sum()

        def compute_measurement(self, batch, model):
            return losses_of(model, *batch).sum()

    network.requires_grad_(True)
    task = Regression()
    model = prepare_model(network, task)
    analyzer = Analyzer("check", model, task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    everything = TensorDataset(images, targets)
    analyzer.fit_all_factors("them", everything, per_device_batch_size=16, factor_args=arguments)
    analyzer.compute_pairwise_scores(
        "scores", "them", TensorDataset(images[:5] + 1, targets[:5]), everything, per_device_query_batch_size=5,
        per_device_train_batch_size=16, score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]

    theirs = Curvature.load(tmp_path / "check" / "factors_them", "revision", selection="all")
    assert theirs.layers.keys() == ours.layers.keys() and theirs.samples == 60
    ours_score = torch.zeros(5, 60)
    for name, factors in ours.layers.items():
        assert factors.eigenvalues.shape == theirs.layers[name].eigenvalues.shape, "bias as the last column, as theirs"
        a, b = (c.precondition(queries, 0.1)[name] for c in (ours, theirs))
        assert (a - b).norm() < 1e-3 * b.norm(), name
        ours_score += a.flatten(1) @ items[name].flatten(1).T
    assert torch.allclose(ours_score, scores.float(), rtol=1e-3, atol=1e-3 * scores.abs().max())
