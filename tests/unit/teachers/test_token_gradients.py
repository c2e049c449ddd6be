from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byline.errors import TeacherNotUsable
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.preconditioner import NoCurvature
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet
from byline.teachers.token_gradients import TokenGradients


@pytest.fixture(scope="module")
def linear(bench) -> AbuPlusLinear:
    settings = replace(bench.settings, query_draws=16, item_draws=4, replicates=4, noise="shared")
    return AbuPlusLinear(bench.model, bench.curvature, settings, batch=64)


@pytest.fixture(scope="module")
def fitted(bench, linear, tmp_path_factory) -> SketchSet:
    """All directions of the output gradients: nothing is lost but eight bits' rounding."""
    return fit_sketches(
        linear, bench.items, dimensions=3, fidelity_queries=[bench.query], store=tmp_path_factory.mktemp("fit")
    )


@pytest.fixture(scope="module")
def tokens(fitted) -> TokenGradients:
    assert fitted.tokens is not None
    return fitted.tokens


def test_token_gradients_score_as_the_first_order_does(bench, linear, fitted, tokens) -> None:
    """Same sign, same unit, same noise, whatever little the three dimensions of the sketches keep."""
    full = linear.score(bench.query, bench.items)
    teacher = SketchTeacher(bench.model, bench.curvature, fitted.basis, fitted)
    found = teacher.score(bench.query, bench.items)
    assert np.abs(found.tau - full.tau).max() < 0.1 * np.abs(full.tau).max()
    assert np.corrcoef(found.tau, full.tau)[0, 1] > 0.999
    assert (found.standard_error > 0).all()
    assert fitted.fidelity["token_spearman"] > 0.98 > fitted.fidelity["spearman"]
    assert fitted.fidelity["token_rank"] == tokens.basis.rank


def test_flips_mean_keeps_both_orientations(bench, linear, tmp_path: Path) -> None:
    both = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, flips="mean"), batch=64)
    found = fit_sketches(both, bench.items[:6], dimensions=3, store=tmp_path)
    teacher = SketchTeacher(bench.model, bench.curvature, found.basis, found)
    expected, ranking = both.score(bench.query, bench.items[:6]), teacher.score(bench.query, bench.items[:6])
    assert np.abs(ranking.tau - expected.tau).max() < 0.1 * np.abs(expected.tau).max()
    upright = linear.score(bench.query, bench.items[:6])
    assert np.abs(ranking.tau - expected.tau).max() < np.abs(ranking.tau - upright.tau).max()


def test_fewer_directions_keep_less(bench, linear, fitted, tmp_path: Path) -> None:
    few = fit_sketches(
        linear, bench.items, dimensions=3, token_rank=2, fidelity_queries=[bench.query], store=tmp_path
    )
    assert few.tokens is not None and few.tokens.basis.rank == 2
    assert few.fidelity["token_spearman"] < fitted.fidelity["token_spearman"]


def test_a_score_does_not_depend_on_which_items_are_asked_about(bench, linear, tokens) -> None:
    directions = tokens.basis.directions(linear.directions([bench.query, replace(bench.query, prompt="a blue dog")]))
    whole = tokens.scores(directions)
    rows = np.array([17, 3, 3, 20])
    np.testing.assert_allclose(tokens.scores(directions, rows), whole[:, rows], rtol=1e-5)
    part = tokens.take(rows[[0, 1, 3]])
    assert part.item_ids.tolist() == tokens.item_ids[rows[[0, 1, 3]]].tolist() and len(part.states) <= 3
    np.testing.assert_allclose(part.scores(directions), whole[:, rows[[0, 1, 3]]], rtol=1e-5)
    both = tokens.take(np.arange(20)).joined(tokens.take(np.arange(20, 24)))
    np.testing.assert_allclose(both.scores(directions), whole, rtol=1e-5)


def test_what_is_saved_is_what_is_read(fitted, tokens, bench, linear, tmp_path: Path) -> None:
    fitted.save(tmp_path / "set")
    again = SketchSet.load(tmp_path / "set", bench.model.revision)
    assert again.tokens is not None
    directions = tokens.basis.directions(linear.directions([bench.query]))
    np.testing.assert_array_equal(again.tokens.scores(directions), tokens.scores(directions))
    (tmp_path / "set" / "tokens.safetensors").write_bytes(b"x")
    with pytest.raises(TeacherNotUsable, match="fit again"):
        SketchSet.load(tmp_path / "set", bench.model.revision)
    with pytest.raises(TeacherNotUsable, match="cannot be read"):
        TokenGradients.load(tmp_path / "set" / "tokens.safetensors")


def test_new_items_get_theirs_in_the_basis_of_the_others(bench, fitted, tokens) -> None:
    first = tokens.take(np.arange(20))
    known = replace(fitted, item_ids=fitted.item_ids[:20], sketches=fitted.sketches[:20], tokens=first)
    whole = SketchTeacher(bench.model, bench.curvature, fitted.basis, fitted)
    part = SketchTeacher(bench.model, bench.curvature, fitted.basis, known)
    expected, found = (t.score(bench.query, bench.items).tau for t in (whole, part))
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    with pytest.raises(TeacherNotUsable, match="must come with theirs"):
        known.with_items([999], fitted.sketches[:1])


def test_a_killed_fit_goes_on_to_the_same_bits(bench, linear, fitted, tokens, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill_late(done: int, total: int) -> None:
        if done >= 4:
            raise Killed

    small = AbuPlusLinear(bench.model, bench.curvature, linear.settings, batch=64, memory=1)
    with pytest.raises(Killed):
        fit_sketches(small, bench.items[:8], dimensions=3, store=tmp_path / "a", progress=kill_late)
    resumed = fit_sketches(small, bench.items[:8], dimensions=3, store=tmp_path / "a").tokens
    once = fit_sketches(small, bench.items[:8], dimensions=3, store=tmp_path / "b").tokens
    assert resumed is not None and once is not None
    assert bool((resumed.codes == once.codes).all()) and bool((resumed.scales == once.scales).all())


def test_layers_that_read_more_than_the_text_have_none(bench, linear, tmp_path: Path) -> None:
    wide = AbuPlusLinear(bench.model, NoCurvature("attention", bench.model.revision), linear.settings)
    found = fit_sketches(wide, bench.items[:4], dimensions=2, store=tmp_path)
    assert found.tokens is None
    with pytest.raises(TeacherNotUsable, match="cross_attention_kv"):
        wide.gradients.block(bench.items[:2]).token_gradients()
