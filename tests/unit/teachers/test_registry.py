from pathlib import Path

import numpy as np
import pytest

from byline.config import LAYER_SELECTIONS, TEACHER_NAMES
from byline.errors import JobCancelled, ModelNotUsable, TeacherNotUsable
from byline.features.pretrained import FAMILIES
from byline.teachers.files import TeacherFiles
from byline.teachers.layers import SELECTIONS
from byline.teachers.registry import TEACHERS, Fitting, UnfittedTeacher, load_ready_teacher, load_teacher

FITTING = Fitting(samples=64, dimensions=128, sketch_dimensions=16, sketch_coordinates=256)
#: Their weights are downloaded by name, which a test must not do; ``features`` tests them from a folder.
DOWNLOADED = {f"similarity:{name}" for name in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TeacherFiles:
    return TeacherFiles(tmp_path_factory.mktemp("fitted"))


def test_the_settings_know_exactly_the_registered_teachers_and_selections() -> None:
    assert set(TEACHER_NAMES) == set(TEACHERS)
    assert set(LAYER_SELECTIONS) == set(SELECTIONS)


def test_every_registered_teacher_fits_scores_and_repeats_itself(bench, files) -> None:
    """All of them through one protocol: finite, deterministic, independent of the candidates' order, own ids."""
    ids: dict[str, str] = {}
    for name in sorted(set(TEACHERS) - DOWNLOADED):
        first = load_teacher(name, bench.model, files, bench.settings, fitting=FITTING)
        first.fit(bench.items)
        again = load_teacher(name, bench.model, files, bench.settings, fitting=FITTING)
        assert not isinstance(again, UnfittedTeacher), f"{name}: what was fitted is found again"
        one, two = first.score(bench.query, bench.items), again.score(bench.query, bench.items[::-1])
        assert np.array_equal(one.item_ids, two.item_ids[::-1]), name
        assert np.isfinite(one.tau).all() and np.isfinite(one.standard_error).all(), name
        assert np.ptp(one.tau) > 0, f"{name} tells items apart"
        scale = np.abs(one.tau).max()
        assert np.allclose(one.tau, two.tau[::-1], rtol=5e-3, atol=5e-3 * scale), name
        (many,) = again.score_many([bench.query], bench.items)
        assert np.allclose(many.tau, one.tau, rtol=5e-3, atol=5e-3 * scale), name
        assert one.teacher_id == two.teacher_id == first.teacher_id == again.teacher_id, name
        ids[name] = one.teacher_id
    assert len(set(ids.values())) == len(ids)


def test_a_teacher_that_is_not_fitted_says_so_and_is_fitted_once(bench, tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path)
    teacher = load_teacher("abu_plus_linear", bench.model, files, bench.settings, fitting=FITTING)
    with pytest.raises(TeacherNotUsable, match=r"call fit\(corpus\)"):
        teacher.score(bench.query, bench.items)
    steps: list[tuple[int, int]] = []
    teacher.fit(bench.items, progress=lambda done, total: steps.append((done, total)))
    assert steps and steps[-1][0] == steps[-1][1]

    def never() -> list:
        raise AssertionError("the corpus is read only to fit")

    ready = load_ready_teacher("abu_plus_linear", bench.model, files, bench.settings, never, fitting=FITTING)
    assert ready.teacher_id == teacher.teacher_id


def test_a_cancelled_fit_leaves_nothing_that_looks_fitted(bench, tmp_path: Path) -> None:
    def stop() -> None:
        raise JobCancelled("stop")

    files = TeacherFiles(tmp_path)
    with pytest.raises(JobCancelled):
        load_ready_teacher("abu_plus", bench.model, files, bench.settings, lambda: bench.items,
                           fitting=FITTING, check=stop)  # fmt: skip
    assert isinstance(load_teacher("abu_plus", bench.model, files, bench.settings), UnfittedTeacher)


def test_factors_of_more_layers_serve_fewer_without_a_fit(bench, tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path)
    load_ready_teacher("abu_plus_linear", bench.model, files, bench.settings, lambda: bench.items,
                       selection="attention", fitting=FITTING)  # fmt: skip
    narrow = load_teacher("abu_plus_linear", bench.model, files, bench.settings)
    wide = load_teacher("abu_plus_linear", bench.model, files, bench.settings, selection="attention")
    assert not isinstance(narrow, UnfittedTeacher)
    assert narrow.teacher_id != wide.teacher_id
    assert isinstance(
        load_teacher("abu_plus_linear", bench.model, files, bench.settings, selection="all"), UnfittedTeacher
    )


@pytest.mark.parametrize("wrong", [{"name": "abu_minus"}, {"selection": "best"}])
def test_an_unknown_name_lists_the_choices(bench, tmp_path: Path, wrong: dict[str, str]) -> None:
    name = wrong.get("name", "abu_plus")
    with pytest.raises(TeacherNotUsable, match="choose one of"):
        load_teacher(name, bench.model, TeacherFiles(tmp_path), bench.settings,
                     selection=wrong.get("selection", "all"))  # fmt: skip


def test_an_encoder_without_weights_is_named(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotUsable, match="dino"):
        load_teacher("similarity:dino", bench.model, TeacherFiles(tmp_path), bench.settings)
