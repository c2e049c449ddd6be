from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import (
    CurvatureFit,
    fit_curvature,
    fit_shard,
    gram,
    merge_shards,
    merged_bases,
    publish_bases,
    shared_inputs,
)
from byline.teachers.layers import select_layers

SAMPLES = 45


@pytest.fixture(scope="module")
def corpus(bench) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        bench.model.encode_images([i.image for i in bench.items]),
        bench.model.encode_prompts([i.caption for i in bench.items]),
    )


@pytest.fixture(scope="module")
def fit(bench, corpus) -> Callable[..., Curvature]:
    def run(**options: object) -> Curvature:
        settings = {"selection": "all", "samples": SAMPLES, "seed": 0, "batch": 4} | options
        return fit_curvature(bench.model, *corpus, **settings)

    return run


@pytest.fixture(scope="module")
def whole(fit) -> Curvature:
    return fit()


@pytest.fixture(scope="module")
def sharded(fit) -> Curvature:
    return fit(shards=3)


def work(bench, corpus, directory: Path) -> CurvatureFit:
    return CurvatureFit(bench.model, *corpus, "all", SAMPLES, 0, batch=4, shards=3, directory=directory, every=8)


def same_bits(a: Curvature, b: Curvature) -> bool:
    return a.layers.keys() == b.layers.keys() and all(
        torch.equal(getattr(a.layers[n], part), getattr(b.layers[n], part))
        for n in a.layers
        for part in ("activation", "gradient", "eigenvalues")
    )


def natural(curvature: Curvature) -> dict[str, torch.Tensor]:
    """What a fit is for, free of the sign and order of eigenvectors: natural gradients of a fixed probe."""
    generator = torch.Generator().manual_seed(1)
    probe = {n: torch.randn(f.eigenvalues.shape, generator=generator) for n, f in curvature.layers.items()}
    return curvature.precondition(probe, 0.1)


def kill_at(call: int) -> Callable[[], None]:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == call:
            raise JobCancelled("killed by the test")

    return check


# One call per batch: 12 of covariances, 12 of eigenvalues. Killed within a stage, at its last batch, at its first.
@pytest.mark.parametrize("call", [6, 12, 13, 20])
def test_a_killed_fit_resumes_bit_equal(fit, whole, tmp_path: Path, call: int) -> None:
    with pytest.raises(JobCancelled):
        fit(directory=tmp_path, check=kill_at(call))
    seen: list[int] = []
    resumed = fit(directory=tmp_path, progress=lambda done, _total: seen.append(done))
    assert same_bits(resumed, whole)
    assert seen[-1] == 2 * SAMPLES and seen == sorted(seen)


def test_finished_draws_are_not_drawn_again(bench, corpus, whole, tmp_path: Path) -> None:
    one = CurvatureFit(bench.model, *corpus, "all", SAMPLES, 0, batch=4, directory=tmp_path, every=8)
    with pytest.raises(JobCancelled):
        fit_shard(one, "covariances", 0, check=kill_at(8))
    seen: list[int] = []
    fit_shard(one, "covariances", 0, progress=lambda done, _total: seen.append(done))
    assert seen[0] == 24 + 4, "seven batches of four were done, six of them written"
    seen.clear()
    fit_shard(one, "covariances", 0, progress=lambda done, _total: seen.append(done))
    assert not seen, "a finished shard is read"


def test_shards_add_up_to_the_whole(whole, sharded) -> None:
    for name, expected in natural(whole).items():
        assert (natural(sharded)[name] - expected).norm() < 2e-3 * expected.norm(), name


def test_interrupted_shards_of_several_workers_merge_bit_equal(bench, corpus, sharded, tmp_path: Path) -> None:
    for stage in ("covariances", "eigenvalues"):
        for shard in (2, 0, 1):
            with pytest.raises(JobCancelled):
                fit_shard(work(bench, corpus, tmp_path), stage, shard, check=kill_at(4))
        for shard in (1, 2, 0):
            fit_shard(work(bench, corpus, tmp_path), stage, shard)
    assert same_bits(merge_shards(work(bench, corpus, tmp_path)), sharded)


def test_a_missing_shard_is_named(bench, corpus, tmp_path: Path) -> None:
    fit_shard(work(bench, corpus, tmp_path), "covariances", 1)
    with pytest.raises(TeacherNotUsable, match=r"\[0, 2\]"):
        merged_bases(work(bench, corpus, tmp_path))


def test_workers_that_decompose_at_once_use_the_basis_published_first(bench, corpus, tmp_path: Path) -> None:
    """Two machines may round an eigendecomposition differently; the eigenvalues need one basis."""
    fit = work(bench, corpus, tmp_path)
    for shard in range(3):
        fit_shard(fit, "covariances", shard)
    first = merged_bases(fit)
    late = publish_bases(fit, {n: (a + 1e-6, b + 1e-6) for n, (a, b) in first.items()})
    assert all(torch.equal(first[n][k], late[n][k]) for n in first for k in (0, 1))
    assert [p.name for p in tmp_path.glob(".*")] == [], "no temporary file is left"


def test_sums_of_another_corpus_or_seed_are_not_taken_over(fit, bench, corpus, whole, tmp_path: Path) -> None:
    fit(directory=tmp_path)
    other = fit(directory=tmp_path, seed=1)
    assert not same_bits(other, whole)
    latents, states = corpus
    moved = fit_curvature(
        bench.model, latents.flip(0), states, selection="all", samples=SAMPLES, seed=0, batch=4, directory=tmp_path
    )
    assert not same_bits(moved, whole)


def test_the_fit_does_not_depend_on_the_batch_size(fit, whole) -> None:
    other = natural(fit(batch=64))
    for name, expected in natural(whole).items():
        assert (other[name] - expected).norm() < 2e-3 * expected.norm(), name


def test_layers_of_one_input_share_one_factor(bench, corpus, whole) -> None:
    sharing = shared_inputs(CurvatureFit(bench.model, *corpus, "all", SAMPLES, 0))
    assert list(sharing) == list(select_layers(bench.model.unet, "all"))
    text_fed = [n for n, layer in select_layers(bench.model.unet, "all").items() if layer.reads_text]
    assert len({sharing[n] for n in text_fed}) == 1
    assert len({id(whole.layers[n].activation) for n in text_fed}) == 1
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert sharing[f"{block}.to_q"] == sharing[f"{block}.to_k"] == sharing[f"{block}.to_v"]
    assert sharing["conv_in"] == "conv_in" != sharing["conv_out"]


def test_factors_of_all_layers_serve_a_smaller_selection(fit, whole) -> None:
    """EK-FAC is block-diagonal by layer: restricting equals fitting less."""
    smaller, expected = whole.restrict("cross_attention_kv"), fit(selection="cross_attention_kv")
    assert smaller.layers.keys() == expected.layers.keys() and smaller.name == expected.name
    for name, value in natural(expected).items():
        assert (natural(smaller)[name] - value).norm() < 2e-3 * value.norm()
    with pytest.raises(TeacherNotUsable, match="'all'"):
        smaller.restrict("all")
    with pytest.raises(TeacherNotUsable, match="conv_in"):
        smaller.precondition({"conv_in": torch.zeros(1, 1)}, 0.1)


def test_the_halved_product_is_the_product() -> None:
    rows = torch.randn(50, 1153, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(gram(rows), rows.T @ rows, rtol=1e-12, atol=1e-12)
