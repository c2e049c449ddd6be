"""Choosing budgets of equal agreement, and the arithmetic of the benchmark's ratios, on numbers made up."""

import json
from pathlib import Path

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.evaluation.bench_agreement import Curve, agreement, cheapest, evenly
from byline.evaluation.bench_plan import Findings
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.bench_teacher_report import PublishedCost, figures


def test_agreement_is_perfect_with_itself_and_chance_with_noise() -> None:
    scores = np.random.default_rng(0).standard_normal((3, 400))
    same = agreement(scores, scores * 2 + 1)
    assert same["spearman"] == pytest.approx(1) and same["overlap100"] == 1 and same["map100"] == 1
    other = agreement(scores, np.random.default_rng(1).standard_normal((3, 400)))
    assert abs(other["spearman"]) < 0.15 and other["overlap100"] < 0.4
    with pytest.raises(LabelsNotUsable):
        agreement(scores, scores[:, :5])


def test_cheapest_reaches_the_target_and_weighs_both_budgets() -> None:
    curves = {64: Curve(1.2, 8.0), 256: Curve(1.1, 8.0)}
    target = curves[256].at(40)
    limits = {"unit": 8, "most": 128, "target": target}
    few = cheapest(curves, query_cost=1, item_cost=1000, **limits)  # type: ignore[arg-type]
    many = cheapest(curves, query_cost=1000, item_cost=1, **limits)  # type: ignore[arg-type]
    assert (few.query_draws, few.item_draws) == (256, 40)
    assert (many.query_draws, many.item_draws) == (64, 80)
    assert few.agreement >= target - 1e-9 and many.agreement >= target - 1e-9
    best = cheapest(curves, 0.99, unit=8, most=128, query_cost=1, item_cost=1)
    assert (best.query_draws, best.item_draws) == (256, 128)  # out of reach: the best there is


def test_a_curve_recovers_the_noise_that_made_it() -> None:
    """Scores = truth + noise / sqrt(draws): the fitted curve has that noise, and gives budgets between those seen."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(200_000)
    draws = [8, 16, 32, 64]
    found = [float(np.corrcoef(truth, truth + rng.standard_normal(200_000) * (10 / t) ** 0.5)[0, 1]) for t in draws]
    curve = Curve.fit(draws, found)
    assert curve.floor == pytest.approx(1, abs=0.02) and curve.noise == pytest.approx(10, rel=0.05)
    assert curve.draws(curve.at(24)) == pytest.approx(24)
    assert curve.draws(1.5) is None
    with pytest.raises(LabelsNotUsable):
        Curve.fit([8], [0.5])


def test_evenly_takes_different_replicates_over_the_whole_range() -> None:
    for wanted in range(1, 9):
        taken = evenly(8, wanted)
        assert len(set(taken)) == wanted and max(taken) < 8
    assert evenly(8, 4) == [0, 2, 4, 6]


def _rows() -> list[dict[str, object]]:
    common = {"items": 100, "queries": 1, "query_draws": 1000, "item_draws": 64}
    published = common | {
        "form": "published",
        "seconds": 15.0,
        "breakdown": {"restore": 1.0, "gradient": 3.0, "step": 1.0, "losses": 10.0},
    }
    before = common | {"form": "published baselines", "seconds": 10.0}
    linear = {"form": "first_order", "query_draws": 100, "item_draws": 32, "forwards_per_second": 10.0}
    many = linear | {"items": 200, "queries": 50, "seconds": 30.0}
    many["breakdown"] = {"query_gradients": 10.0, "corpus_pass": 20.0}
    few = linear | {"items": 100, "queries": 1, "seconds": 10.0}
    few["breakdown"] = {"query_gradients": 0.2, "corpus_pass": 9.8}
    return [published, before, many, few]


def test_published_cost_counts_one_sweep_a_query_or_two_and_never_the_reload() -> None:
    cost = PublishedCost(_rows())
    assert cost.seconds(100, 1, "recomputed") == pytest.approx(4 + 20)
    assert cost.seconds(200, 50, "once") == pytest.approx(50 * 4 + 51 * 20)
    assert cost.seconds(200, 50, "recomputed") == pytest.approx(50 * (4 + 40))
    with pytest.raises(LabelsNotUsable):
        PublishedCost(_rows()[1:])


def test_headline_is_the_largest_run_against_the_form_that_computes_baselines_once() -> None:
    findings = Findings(rows=_rows(), curves={100: Curve(1.0, 8.0)}, published_curve=Curve(1.0, 16.0))
    found = figures(findings, corpus_size=400)
    assert found["many_queries_ratio"] == pytest.approx((50 * 4 + 51 * 20) / 30)
    assert found["many_queries"]["whole_corpus_extrapolated"]["ratio"] == pytest.approx((200 + 51 * 40) / 50)
    assert found["many_queries"]["ratio_equal_draws"] == pytest.approx((50 * 4 + 51 * 20) / (100 + 40))
    assert found["item_draws_for_equal_agreement"] == {"100": pytest.approx(32)}
    extrapolated = [row for row in found["rows"] if row.get("extrapolated")]
    assert extrapolated and all(row["form"].startswith("published, baselines") for row in extrapolated)


def test_a_finished_step_never_runs_again_and_a_torn_line_does(tmp_path: Path) -> None:
    ran = []

    def step() -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
        ran.append(1)
        return [{"seconds": 1.5}], {"x": np.arange(3)}

    first = RowFile(tmp_path).once("a", step)
    again = RowFile(tmp_path).once("a", step)
    assert len(ran) == 1 and first[0] == again[0] and (again[1]["x"] == np.arange(3)).all()
    lines = tmp_path / "rows.jsonl"
    lines.write_text(lines.read_text()[:-5])
    RowFile(tmp_path).once("a", step)
    assert len(ran) == 2
    assert RowFile(tmp_path).once("a", step)[0] == [{"seconds": 1.5}] and len(ran) == 2
    assert json.loads(lines.read_text().splitlines()[-1])["step"] == "a"
