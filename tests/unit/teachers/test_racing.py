import numpy as np
import pytest

from byline.teachers.racing import CONFIDENCE, bounds, still_in, student_quantile

#: Exact quantiles, from tables of Student's t.
TABLE = [(0.95, 5, 2.0150), (0.95, 10, 1.8125), (0.975, 6, 2.4469), (0.99, 8, 2.8965), (0.95, 30, 1.6973)]


@pytest.mark.parametrize(("probability", "degrees", "exact"), TABLE)
def test_the_quantile_is_students(probability: float, degrees: float, exact: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(exact, abs=3e-3)


def field(seed: int, noise: float = 1.0, common: float = 0.0, n: int = 300, r: int = 8) -> tuple[np.ndarray, ...]:
    """True scores [n] with a heavy tail, and replicates [1, r, n] with noise of its own and in common."""
    rng = np.random.default_rng(seed)
    truth = rng.exponential(size=n) ** 1.5 * 2
    spread = noise * (0.5 + rng.random(n))
    values = truth + spread * rng.normal(size=(r, n)) + common * rng.normal(size=(r, 1))
    return truth, values[None]


def race(values: np.ndarray, top: int, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Means [n] as a race leaves them, and how many replicates each candidate got."""
    _, count, n = values.shape
    alive, runs = np.arange(n), np.zeros(n, dtype=int)
    for r in range(count):
        runs[alive] += 1
        if r + 1 < count:
            alive = alive[still_in(values[:, : r + 1, alive], top, confidence)]
    return np.array([values[:, : runs[i], i].mean(1).max() for i in range(n)]), runs


def overlap(a: np.ndarray, b: np.ndarray, top: int) -> float:
    return len(set(np.argsort(-a)[:top]) & set(np.argsort(-b)[:top])) / top


def test_a_race_names_the_same_top_as_the_full_budget_for_half_of_it() -> None:
    whole, raced, spent = [], [], []
    for seed in range(20):
        truth, values = field(seed)
        scores, runs = race(values, 20)
        whole.append(overlap(values[0].mean(0), truth, 20))
        raced.append(overlap(scores, truth, 20))
        spent.append(runs.mean() / 8)
    assert np.mean(spent) < 0.55
    assert np.mean(raced) > np.mean(whole) - 0.01


def test_the_leaders_get_the_full_budget() -> None:
    _, values = field(3)
    _, runs = race(values, 20)
    assert (runs[np.argsort(-values[0].mean(0))[:20]] == 8).all()
    assert runs.min() == 2 and (runs == 8).sum() >= 20


def test_candidates_of_the_true_top_are_dropped_no_more_often_than_the_level_says() -> None:
    lost = total = 0
    for seed in range(60):
        truth, values = field(seed, noise=2.0)
        _, runs = race(values, 20)
        best = np.argsort(-truth)[:20]
        lost += int((runs[best] < 8).sum())
        total += 20
    assert lost / total < 0.05


def test_more_confidence_costs_more_draws() -> None:
    _, values = field(5, noise=2.0)
    spent = [race(values, 20, confidence)[1].sum() for confidence in (0.8, 0.95, 0.999)]
    assert spent[0] < spent[1] < spent[2]


def test_noise_in_common_decides_nothing() -> None:
    _, values = field(7)
    _, moved = field(7, common=0.0)
    moved = moved + 1000 * np.arange(8)[None, :, None]
    assert np.array_equal(race(values, 20)[1], race(moved, 20)[1])


def test_candidates_that_differ_in_nothing_all_stay() -> None:
    values = np.random.default_rng(0).normal(size=(1, 3, 50))
    assert still_in(values, 20).sum() > 40
    assert still_in(np.zeros((1, 3, 50)), 20).all()


def test_nothing_is_decided_before_there_is_a_spread_or_among_too_few() -> None:
    _, values = field(1)
    assert still_in(values[:, :1], 20).all()
    assert still_in(values[:, :, :20], 20).all()


def test_a_candidate_whose_two_replicates_agree_by_chance_has_no_narrow_interval() -> None:
    values = np.random.default_rng(0).normal(size=(1, 2, 100))
    values[0, :, 0] = 0.123
    lower, upper = bounds(values)
    width = upper - lower
    assert width[0] > 0.5 * np.median(width)


def test_of_two_orientations_the_better_one_races() -> None:
    _, values = field(9)
    low = values - 1000
    alone = race(values, 20)
    for both in (np.concatenate([values, low]), np.concatenate([low, values])):
        scores, runs = race(both, 20)
        assert np.array_equal(runs, alone[1]) and np.array_equal(scores, alone[0])
