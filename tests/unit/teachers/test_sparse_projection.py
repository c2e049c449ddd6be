import pytest
import torch

from byline.errors import TeacherNotUsable
from byline.teachers.sparse_projection import SparseProjection


def gradients(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = {"a": torch.randn(1, 30, 40, generator=generator), "b": torch.randn(1, 500, 9, generator=generator)}
    return {n: 0.5 * g + torch.randn(count, *g.shape[1:], generator=generator) for n, g in common.items()}


def flat(g: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten(1) for v in g.values()], dim=1)


def test_inner_products_are_kept_within_the_johnson_lindenstrauss_error() -> None:
    g = gradients(24)
    x = flat(g)
    exact, ours = x @ x.T, (lambda y: y @ y.T)(SparseProjection(2048)(g))
    error = (ours - exact) / (x.norm(dim=1)[:, None] * x.norm(dim=1)) * 2048**0.5
    assert error.abs().max() < 5, "no more than five standard deviations"
    assert error.square().mean().sqrt() < 1.5
    assert error.square().mean().sqrt() > 0.3, "a projection of 5,700 numbers to 2,048 is not lossless"


def test_it_is_unbiased_over_seeds() -> None:
    g = {n: v[:2] for n, v in gradients(2).items()}
    x = flat(g)
    found = torch.stack([(lambda y: y[0] @ y[1])(SparseProjection(64, seed=s)(g)) for s in range(300)])
    assert abs(found.mean() - x[0] @ x[1]) < 4 * found.std() / 300**0.5


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_order_of_layers() -> None:
    g = gradients(7)
    projection = SparseProjection(256)
    together = projection(g)
    alone = torch.cat([projection({n: v[i : i + 1] for n, v in g.items()}) for i in range(7)])
    assert torch.equal(together, alone)
    assert torch.allclose(together, projection(dict(reversed(g.items()))), atol=1e-4)
    assert torch.equal(together, SparseProjection(256)(g)), "a new object of the same seed is the same projection"


def test_leading_dimensions_are_kept() -> None:
    g = {n: v.reshape(2, 3, *v.shape[1:]) for n, v in gradients(6).items()}
    flat_rows = SparseProjection(64)({n: v.flatten(0, 1) for n, v in g.items()})
    assert torch.equal(SparseProjection(64)(g), flat_rows.reshape(2, 3, 64))


def test_layers_of_equal_shape_and_other_seeds_go_elsewhere() -> None:
    g = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    results = [SparseProjection(64)({"a": g}), SparseProjection(64)({"b": g}), SparseProjection(64, seed=1)({"a": g})]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_dimensions_that_do_not_split_into_blocks_are_refused() -> None:
    with pytest.raises(TeacherNotUsable, match="choose a multiple"):
        SparseProjection(30, 4)
