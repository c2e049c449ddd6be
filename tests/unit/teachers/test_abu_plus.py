from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers import TeacherItem
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_losses import full_precision
from byline.teachers.preconditioner import NoCurvature


@contextmanager
def unet_rows(model) -> Iterator[list[int]]:
    """Rows of every call of the UNet while open."""
    calls: list[int] = []
    handle = model.unet.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        handle.remove()


def killed_after(calls: int):
    """A check that lets ``calls`` chunks pass."""
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise JobCancelled("killed by the test")

    return check


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.fixture(scope="module")
def exact(bench) -> AbuPlus:
    return AbuPlus(bench.model, bench.curvature, bench.settings)


@pytest.fixture(scope="module")
def ranking(bench, exact):
    return exact.score(bench.query, bench.items)


def test_unlearning_the_query_raises_its_own_loss(bench, exact) -> None:
    """The sign of everything: an ascent step on the query must hurt the query itself."""
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query)
    twin = TeacherItem(0, bench.query.image, bench.query.prompt)
    assert exact.rise(direction, step, [twin]).mean() > 0


def test_tau_is_linear_and_odd_in_the_step(bench, exact) -> None:
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query) / 10
    up, down, twice = (exact.rise(direction, f * step, bench.items).mean(1) for f in (1, -1, 2))
    assert np.linalg.norm(up + down) < 0.05 * np.linalg.norm(up)
    assert np.linalg.norm(twice - 2 * up) < 0.05 * np.linalg.norm(twice)


def test_tau_does_not_depend_on_batch_size_or_candidate_order(bench, exact, ranking) -> None:
    small = AbuPlus(bench.model, bench.curvature, bench.settings, batch=40)
    backwards = small.score(bench.query, bench.items[::-1])
    assert np.allclose(backwards.tau[::-1], ranking.tau, rtol=0.02, atol=0.02 * np.abs(ranking.tau).max())
    assert np.array_equal(backwards.item_ids[::-1], ranking.item_ids)


def test_a_candidate_subset_gets_the_scores_of_the_whole(bench, exact, ranking) -> None:
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query)
    whole, part = (exact.rise(direction, step, items) for items in (bench.items, bench.items[5:9]))
    assert np.allclose(whole[5:9], part)


def test_first_order_agrees_with_the_exact_form(bench, ranking) -> None:
    linear = AbuPlusLinear(bench.model, bench.curvature, bench.settings).score(bench.query, bench.items)
    assert spearman(linear.tau, ranking.tau) > 0.99
    slope = np.polyfit(linear.tau, ranking.tau, 1)[0]
    assert 0.9 < slope < 1.1


def test_the_standard_error_is_that_of_the_replicates(bench, ranking) -> None:
    """Scores from other noise scatter around these with about the stated error."""
    other = AbuPlus(bench.model, bench.curvature, replace(bench.settings, seed=1))
    direction = AbuPlus(bench.model, bench.curvature, bench.settings).direction(bench.query)
    step = 1e-3
    per_draw = other.rise(direction, step, bench.items) / (24 * step)
    again = per_draw.mean(1)
    pooled = np.sqrt(ranking.standard_error**2 * 2)
    assert 0.3 < np.median(np.abs(again - ranking.tau) / pooled) < 2.0


def test_cancellation_is_seen_between_calls_of_the_unet(bench) -> None:
    teacher = AbuPlus(bench.model, bench.curvature, bench.settings, batch=32)
    with unet_rows(bench.model) as calls:
        direction = teacher.direction(bench.query)
        calls.clear()
        with pytest.raises(JobCancelled):
            teacher.rise(direction, 1e-3, bench.items, check=killed_after(3))
    assert calls == [32] * 6, "three chunks, each before and after the edit"


def test_a_step_lost_in_rounding_is_refused(bench) -> None:
    settings = replace(bench.settings, corpus_size=10**12)
    with pytest.raises(TeacherNotUsable, match="rounding"):
        AbuPlus(bench.model, bench.curvature, settings).score(bench.query, bench.items)


def test_baselines_are_measured_once_for_all_queries_layers_and_dampings(bench, tmp_path: Path) -> None:
    items = bench.items[:8]
    AbuPlus(bench.model, bench.curvature, bench.settings, cache=tmp_path).fit(items)
    with unet_rows(bench.model) as calls:
        AbuPlus(bench.model, bench.curvature, bench.settings, cache=tmp_path).fit(items)
        assert not calls, "nothing is left to fit"
        other = AbuPlus(
            bench.model, NoCurvature("attention", bench.model.revision), replace(bench.settings, damping=0.3),
            cache=tmp_path,
        )  # fmt: skip
        direction = other.direction(replace(bench.query, prompt="a blue dog"))
        calls.clear()
        other.rise(direction, 1e-3, items)
        assert calls == [128], "eight items of sixteen draws, after the edit only"


def test_cached_and_uncached_scores_are_the_same_bits(bench, tmp_path: Path) -> None:
    items = bench.items[:10]
    fresh = AbuPlus(bench.model, bench.curvature, bench.settings).score(bench.query, items)
    cached = AbuPlus(bench.model, bench.curvature, bench.settings, cache=tmp_path)
    cached.fit(bench.items[5:])
    found = cached.score(bench.query, items)
    for name in ("tau", "standard_error", "tau_halves"):
        assert np.array_equal(getattr(found, name), getattr(fresh, name))


def test_a_killed_fit_and_a_killed_score_go_on_to_the_same_bits(bench, tmp_path: Path) -> None:
    items = bench.items[:12]
    whole = AbuPlus(bench.model, bench.curvature, bench.settings, batch=32).score(bench.query, items)

    def teacher() -> AbuPlus:
        return AbuPlus(bench.model, bench.curvature, bench.settings, batch=32, cache=tmp_path)

    with pytest.raises(JobCancelled):
        teacher().fit(items, check=killed_after(2))
    with unet_rows(bench.model) as calls:
        teacher().fit(items)
        assert len(calls) == 6 - 2, "the finished chunks were not measured again"
    with pytest.raises(JobCancelled):
        # directions() may check as well; the last check but one lets some chunks pass.
        teacher().score(bench.query, items, check=killed_after(6))
    done = []
    resumed = teacher().score(bench.query, items, progress=lambda n, total: done.append((n, total)))
    assert np.array_equal(resumed.tau, whole.tau) and np.array_equal(resumed.tau_halves, whole.tau_halves)
    assert done[0][0] > 2, "it went on where it was killed"
    assert done[-1] == (12, 12) and done == sorted(done)
    assert not list((tmp_path / "unfinished").iterdir()), "what is finished is cleared away"


def test_the_unfinished_score_of_another_query_is_not_taken_for_this_ones(bench, tmp_path: Path) -> None:
    items = bench.items[:6]
    other = replace(bench.query, image=bench.items[7].image)
    with pytest.raises(JobCancelled):
        AbuPlus(bench.model, bench.curvature, bench.settings, 32, tmp_path).score(other, items, check=killed_after(5))
    found = AbuPlus(bench.model, bench.curvature, bench.settings, 32, tmp_path).score(bench.query, items)
    assert np.array_equal(found.tau, AbuPlus(bench.model, bench.curvature, bench.settings, 32).score(
        bench.query, items).tau)  # fmt: skip


def test_few_draws_of_many_items_still_fill_the_batch(bench) -> None:
    few = AbuPlus(bench.model, bench.curvature, replace(bench.settings, item_draws=8), batch=64)
    direction = few.direction(bench.query)
    with unet_rows(bench.model) as calls:
        few.rise(direction, 1e-3, bench.items)
    assert calls == [64] * 6, "24 items of 8 draws in 3 calls, before and after"


def test_flips_are_the_higher_or_the_mean_of_both_orientations(bench) -> None:
    items = bench.items[:4]
    mirrored = [replace(i, image=i.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for i in items]
    shared = replace(bench.settings, noise="shared")

    def score(chosen: list[TeacherItem], flips: str):
        return AbuPlus(bench.model, bench.curvature, replace(shared, flips=flips)).score(bench.query, chosen)

    upright, flipped = score(items, "none"), score(mirrored, "none")
    most, mean = score(items, "max"), score(items, "mean")
    assert np.abs(upright.tau - flipped.tau).max() > 0
    assert np.allclose(most.tau, np.maximum(upright.tau, flipped.tau), rtol=1e-5)
    assert np.allclose(mean.tau, (upright.tau + flipped.tau) / 2, rtol=1e-4, atol=1e-5 * np.abs(mean.tau).max())
    assert (most.samples == 32).all() and (upright.samples == 16).all()
    for flips, found in (("max", most), ("mean", mean)):
        assert np.allclose(score(mirrored, flips).tau, found.tau, rtol=1e-5), "which way it faces does not matter"


def test_each_orientation_has_noise_of_its_own_unless_it_is_shared(bench, exact) -> None:
    both = AbuPlus(bench.model, bench.curvature, replace(bench.settings, flips="max"))
    keys = {cell.key for cell in both._cells(bench.items)}
    assert len(keys) == 24 * 2 * 8 and len({cell.key for cell in exact._cells(bench.items)}) == 24 * 8


def test_skew_divides_each_draws_rise_by_the_sum_of_its_losses(bench) -> None:
    skewed = AbuPlus(bench.model, bench.curvature, replace(bench.settings, aggregation="skew"))
    direction = skewed.direction(bench.query)
    step = skewed.calibrate(direction, bench.query)
    found = skewed.score(bench.query, bench.items[:6])
    before, after = skewed._losses(
        skewed._cells(bench.items[:6]), skewed._edited(direction, step), skewed._unfinished(bench.query), lambda: None
    )
    expected = ((after - before) / (after + before)).reshape(6, -1).mean(1) / (24 * step)
    assert np.allclose(found.tau, expected, rtol=1e-5)
    # In the linear regime it is the rise over twice the loss, so of the same sign and order of size.
    plain = ((after - before) / (2 * before)).reshape(6, -1).mean(1) / (24 * step)
    assert np.allclose(found.tau, plain, rtol=0.05, atol=0.05 * np.abs(plain).max())


def test_unit_aggregation_is_refused_with_the_form_that_has_it(bench) -> None:
    with pytest.raises(TeacherNotUsable, match="abu_plus_linear"):
        AbuPlus(bench.model, bench.curvature, replace(bench.settings, aggregation="unit"))


def test_antithetic_noise_estimates_the_same_influence(bench, ranking) -> None:
    settings = replace(bench.settings, antithetic=True, item_draws=32)
    paired = AbuPlus(bench.model, bench.curvature, settings).score(bench.query, bench.items)
    assert paired.teacher_id.endswith("-antithetic")
    error = np.sqrt(paired.standard_error**2 + ranking.standard_error**2)
    assert np.median(np.abs(paired.tau - ranking.tau) / error) < 2
    with pytest.raises(TeacherNotUsable, match="multiple"):
        AbuPlus(bench.model, bench.curvature, replace(bench.settings, antithetic=True, item_draws=24))


def test_a_race_scores_those_who_stay_as_without_it_and_spends_less(bench) -> None:
    settings = replace(bench.settings, item_draws=64)
    whole = AbuPlus(bench.model, bench.curvature, settings).score(bench.query, bench.items)
    done: list[int] = []
    racer = AbuPlus(bench.model, bench.curvature, replace(settings, racing=1))
    found = racer.score(bench.query, bench.items, progress=lambda n, _total: done.append(n))
    stayed = found.samples == 64
    assert 1 <= stayed.sum() < 18 and found.samples.min() == 2 * 8 and found.draws == 64
    assert np.array_equal(found.tau[stayed], whole.tau[stayed])
    assert np.array_equal(found.standard_error[stayed], whole.standard_error[stayed])
    assert found.order()[0] == whole.order()[0]
    assert np.isfinite(found.standard_error).all() and np.isfinite(found.tau_halves).all()
    assert done == sorted(done) and done[-1] == 24


def test_every_layer_with_bias_and_convolutions_is_edited_in_a_linear_step(bench) -> None:
    everything = AbuPlus(bench.model, NoCurvature("all", bench.model.revision), bench.settings)
    assert any(isinstance(layer.module, torch.nn.Conv2d) for layer in everything._layers.values())
    direction = everything.direction(bench.query)
    edited = everything._edited(direction, 1e-3)
    parameters = dict(bench.model.unet.named_parameters())
    assert {name.rpartition(".")[2] for name in edited} == {"weight", "bias"}
    assert all(parameters[name].shape == value.shape for name, value in edited.items())
    step = everything.calibrate(direction, bench.query)
    up, down, twice = (everything.rise(direction, f * step / 10, bench.items[:8]).mean(1) for f in (1, -1, 2))
    assert np.linalg.norm(up + down) < 0.05 * np.linalg.norm(up)
    assert np.linalg.norm(twice - 2 * up) < 0.05 * np.linalg.norm(twice)


def test_the_difference_of_losses_is_taken_in_full_float32() -> None:
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_the_teacher_id_changes_with_settings(bench, exact) -> None:
    other = AbuPlus(bench.model, bench.curvature, replace(bench.settings, damping=0.2))
    assert other.teacher_id != exact.teacher_id
