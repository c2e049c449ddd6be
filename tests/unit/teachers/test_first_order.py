from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.preconditioner import NoCurvature


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@contextmanager
def attention_with_forward_mode(unet) -> Iterator[None]:
    """Forward-mode derivatives exist for plain attention only."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        unet.set_attn_processor(before)


def directional_derivatives(teacher: AbuPlusLinear, direction, item) -> np.ndarray:
    """d loss / d step of every draw of an item along ``direction`` by torch.func.jvp: no backward pass, no hook."""
    model, scheme = teacher.model, teacher.scheme
    timesteps, noise = scheme.draw(
        scheme.key(item.item_id, item.caption), range(scheme.draws), model.latent_shape, model.num_timesteps
    )
    clean = model.encode_images([item.image]).expand(scheme.draws, -1, -1, -1)
    states = model.encode_prompts([item.caption]).expand(scheme.draws, -1, -1)
    noisy, target = model.add_noise(clean, noise, timesteps), model.target(clean, noise, timesteps)
    weights, tangents = {}, {}
    for name, layer in teacher._layers.items():
        weights |= layer.parameters(layer.matrix())
        tangents |= layer.parameters(direction[name])

    def losses(parameters):
        output = torch.func.functional_call(
            model.unet, parameters, (noisy, timesteps), {"encoder_hidden_states": states, "return_dict": False}
        )[0]
        return (output - target).pow(2).flatten(1).mean(1)

    with attention_with_forward_mode(model.unet):
        return torch.func.jvp(losses, (weights,), (tangents,))[1].double().numpy()


def plain(bench, selection: str, **settings) -> AbuPlusLinear:
    """A teacher that needs no fitted curvature."""
    return AbuPlusLinear(
        bench.model, NoCurvature(selection, bench.model.revision), replace(bench.settings, **settings), batch=16
    )


@pytest.fixture(scope="module")
def linear(bench) -> AbuPlusLinear:
    return AbuPlusLinear(bench.model, bench.curvature, replace(bench.settings, query_draws=32, item_draws=8), batch=40)


@pytest.fixture(scope="module")
def directions(bench, linear):
    return linear.directions([bench.query, replace(bench.query, prompt="a blue dog")])


def test_tau_is_the_derivative_along_the_natural_gradient(bench, linear, directions) -> None:
    tau = linear.replicates(directions, bench.items[:3])  # [n, r, q]
    for row in range(3):
        expected = directional_derivatives(linear, {n: d[1] for n, d in directions.items()}, bench.items[row])
        for replicate in range(linear.scheme.replicates):
            mean = expected[list(linear.scheme.draws_of(replicate))].mean() / bench.settings.corpus_size
            assert tau[row, replicate, 1] == pytest.approx(mean, rel=1e-4, abs=1e-4 * np.abs(tau).max())


def test_tau_is_the_derivative_over_all_layers_too(bench) -> None:
    teacher = plain(bench, "all", query_draws=8, item_draws=8, noise="shared", antithetic=True, replicates=2)
    direction = teacher.directions([bench.query])
    tau = teacher.replicates(direction, bench.items[:2]).mean(1)[:, 0]
    for row in range(2):
        expected = directional_derivatives(teacher, {n: d[0] for n, d in direction.items()}, bench.items[row])
        assert tau[row] == pytest.approx(expected.mean() / bench.settings.corpus_size, rel=1e-4)


def test_the_exact_finite_step_ranks_as_the_first_order_does(bench) -> None:
    settings = replace(bench.settings, noise="shared", antithetic=True, item_draws=16)
    exact = AbuPlus(bench.model, bench.curvature, settings).score(bench.query, bench.items)
    first = AbuPlusLinear(bench.model, bench.curvature, settings).score(bench.query, bench.items)
    assert spearman(exact.tau, first.tau) > 0.99
    assert np.polyfit(first.tau, exact.tau, 1)[0] == pytest.approx(1, abs=0.1)
    assert np.array_equal(first.samples, np.full(len(bench.items), 16))


def test_tau_does_not_depend_on_chunk_batch_or_company(bench, linear, directions) -> None:
    whole = linear.replicates(directions, bench.items)
    scale = 1e-4 * np.abs(whole).max()
    assert np.allclose(linear.replicates(directions, bench.items, chunk=7), whole, rtol=1e-4, atol=scale)
    small = AbuPlusLinear(bench.model, bench.curvature, linear.settings, batch=3)
    second = {n: d[1:] for n, d in directions.items()}
    alone = small.replicates(second, bench.items[10:12])
    assert np.allclose(alone[:, :, 0], whole[10:12, :, 1], rtol=1e-4, atol=scale)


def test_a_selections_tau_is_the_sum_of_its_layers(bench) -> None:
    wide = plain(bench, "attention", query_draws=8, item_draws=4, replicates=2)
    narrow = plain(bench, "cross_attention_kv", query_draws=8, item_draws=4, replicates=2)
    directions = wide.directions([bench.query])
    layers = wide.layer_replicates(directions, bench.items[:4])
    assert layers.shape == (len(directions), 4, 2, 1)
    assert np.allclose(layers.sum(0), wide.replicates(directions, bench.items[:4]), rtol=1e-5)
    kept = [i for i, name in enumerate(directions) if name in narrow._layers]
    expected = narrow.replicates(narrow.directions([bench.query]), bench.items[:4])
    assert np.allclose(layers[kept].sum(0), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["replicates", "layer_replicates"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_pass_killed_anywhere_resumes_to_the_same_bits(bench, linear, directions, tmp_path, method, stop) -> None:
    run = getattr(linear, method)
    items = bench.items[:18]
    whole = run(directions, items, chunk=6)
    calls, seen = 0, []

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise JobCancelled("killed by the test")

    with pytest.raises(JobCancelled):
        run(directions, items, check=kill, chunk=6, store=tmp_path / "tau.npy")
    calls = -100
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    resumed = run(directions, items, progress, kill, chunk=6, store=tmp_path / "tau.npy")
    # A chunk is 6 items x 8 draws = 48 samples, two batches; whole chunks are not computed again.
    assert calls == -100 + 2 * (3 - (stop - 1) // 2)
    assert np.array_equal(resumed, whole)
    assert seen == [(6, 18), (12, 18), (18, 18)]


def test_a_store_of_other_inputs_is_refused(bench, linear, directions, tmp_path: Path) -> None:
    items, store = bench.items[:4], tmp_path / "deep" / "tau.npy"
    linear.replicates(directions, items, store=store)
    other = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, seed=1))
    scaled = {n: 2 * d for n, d in directions.items()}
    for teacher, asked, candidates in (
        (other, directions, items),
        (linear, scaled, items),
        (linear, directions, items[::-1]),
        (linear, directions, [replace(items[0], caption="another"), *items[1:]]),
    ):
        with pytest.raises(TeacherNotUsable, match="remove it"):
            teacher.replicates(asked, candidates, store=store)
    with pytest.raises(TeacherNotUsable, match="remove it"):
        linear.replicates(directions, items, store=store, flipped=True)


def test_a_store_killed_while_it_was_made_is_made_again(bench, linear, directions, tmp_path: Path) -> None:
    (tmp_path / "tau.npy").write_bytes(b"half a header")
    found = linear.replicates(directions, bench.items[:2], store=tmp_path / "tau.npy")
    assert np.array_equal(found, linear.replicates(directions, bench.items[:2]))


def test_flips_take_the_higher_orientation_or_the_mean(bench, linear, directions) -> None:
    items = bench.items[:6]
    upright, mirrored = (linear.replicates(directions, items, flipped=f)[:, :, 0].mean(1) for f in (False, True))
    assert (upright > mirrored).any() and (upright < mirrored).any()
    for flips, expected in (("max", np.maximum(upright, mirrored)), ("mean", (upright + mirrored) / 2)):
        teacher = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, flips=flips), batch=40)
        ranking = teacher.score(bench.query, items)
        assert np.allclose(ranking.tau, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert np.array_equal(ranking.samples, np.full(6, 16))


def test_scores_of_a_killed_run_over_both_orientations_are_kept(bench, linear, tmp_path: Path) -> None:
    teacher = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, flips="max"), batch=40)
    done: list[tuple[int, int]] = []
    first = teacher.score_many([bench.query], bench.items[:3], progress=lambda *p: done.append(p), store=tmp_path)
    assert done == [(3, 6), (6, 6)]
    passes = 0

    def count() -> None:
        nonlocal passes
        passes += 1

    again = teacher.score_many([bench.query], bench.items[:3], check=count, store=tmp_path)
    assert passes == 1, "only the query's own gradient"
    assert np.array_equal(first[0].tau, again[0].tau)


def test_the_chunk_follows_from_the_memory_it_may_take(bench) -> None:
    narrow, wide = plain(bench, "cross_attention_kv"), plain(bench, "all")
    assert wide.gradients.bytes_per_item() > 4 * 8 * sum(e.rows * e.columns for e in wide._layers.values()) * 0.9
    assert narrow.chunk_for(0) > wide.chunk_for(0)
    assert narrow.chunk_for(narrow.memory // 3) == 2
    assert narrow.chunk_for(narrow.memory * 2) == 1


def test_aggregation_changes_the_scores_and_the_id_but_not_the_direction(bench, linear, directions) -> None:
    taus, ids = [linear.replicates(directions, bench.items[:4]).mean((1, 2))], {linear.teacher_id}
    for aggregation in ("skew", "unit"):
        teacher = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, aggregation=aggregation))
        same = teacher.directions([bench.query])
        assert all((same[n][0] - d[0]).norm() < 1e-3 * d[0].norm() for n, d in directions.items())
        taus.append(teacher.replicates(directions, bench.items[:4]).mean((1, 2)))
        ids.add(teacher.teacher_id)
    assert len(ids) == 3
    ratios = [taus[0] / t for t in taus[1:]]
    assert all(r.std() / np.abs(r).mean() > 1e-3 for r in ratios), "not a mere rescaling"


def test_nothing_asked_is_nothing_answered(bench, linear) -> None:
    assert linear.score_many([], bench.items) == []
    assert len(linear.score(bench.query, []).tau) == 0
    linear.fit(bench.items)


def test_the_two_halves_of_tau_share_neither_the_items_noise_nor_the_querys(bench) -> None:
    teacher = AbuPlusLinear(bench.model, bench.curvature, bench.settings)
    halves = teacher.direction_halves([bench.query])
    whole = teacher.directions([bench.query])
    ranking = teacher.score(bench.query, bench.items[:6])
    for name, half in halves.items():
        torch.testing.assert_close(half.mean(0), whole[name], rtol=0, atol=1e-4 * float(whole[name].abs().max()))
    for parity in (0, 1):
        direction = {name: half[parity] for name, half in halves.items()}
        scores = teacher.replicates(direction, bench.items[:6])[:, parity::2, 0].mean(1)
        np.testing.assert_allclose(ranking.tau_halves[parity], scores, rtol=0, atol=1e-4 * np.abs(scores).max())
    one, other = (
        teacher.replicates({n: h[p] for n, h in halves.items()}, bench.items[:6])[:, :, 0].mean(1) for p in (0, 1)
    )
    apart = np.abs(one - other) / 2
    assert (ranking.standard_error >= apart * 0.999).all()
    assert not np.allclose(apart, 0)


def test_either_objective_is_the_same_in_both_forms_and_another_teacher(bench, tmp_path: Path) -> None:
    """D-TRAK's function instead of the loss: unlearned and measured alike, and never mixed with the loss."""
    rankings = {}
    for objective in ("denoising", "output_norm"):
        settings = replace(bench.settings, objective=objective)
        exact = AbuPlus(bench.model, bench.curvature, settings, cache=tmp_path).score(bench.query, bench.items)
        linear = AbuPlusLinear(bench.model, bench.curvature, settings).score(bench.query, bench.items)
        assert spearman(exact.tau, linear.tau) > 0.99
        rankings[objective] = linear
    assert rankings["denoising"].teacher_id != rankings["output_norm"].teacher_id
    assert spearman(*(ranking.tau for ranking in rankings.values())) < 0.99
