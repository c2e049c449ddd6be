import json
from pathlib import Path

import pytest

from byline.errors import TeacherNotUsable
from byline.teachers.files import TeacherFiles, curvature_name


def fitted(directory: Path, revision: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"model_revision": revision}))
    return directory


def test_what_the_model_came_with_wins_over_the_cache(tmp_path: Path) -> None:
    files = TeacherFiles.beside(tmp_path / "model", tmp_path / "cache", "r1")
    assert files.find("curvature", "r1") is None
    kept = fitted(files.target("curvature"), "r1")
    assert files.find("curvature", "r1") == kept
    shipped = fitted(tmp_path / "model" / "curvature", "r1")
    assert files.find("curvature", "r1") == shipped


def test_a_fit_of_an_earlier_checkpoint_is_not_found(tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path / "cache", tmp_path / "model")
    fitted(tmp_path / "model" / "curvature", "old")
    assert files.find("curvature", "new") is None
    assert files.find("curvature") is not None


def test_nothing_is_found_until_a_fit_has_ended_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path / "cache")
    with pytest.raises(RuntimeError), files.publishing("curvature", "r1") as building:
        fitted(building / "part", "r1")
        raise RuntimeError("killed")
    assert list((tmp_path / "cache").iterdir()) == []
    with files.publishing("curvature", "r1") as building:
        assert files.find("curvature", "r1") is None
        (building / "manifest.json").write_text('{"model_revision": "r1"}')
    assert files.find("curvature", "r1") == tmp_path / "cache" / "curvature"


def test_the_first_of_two_workers_wins_and_an_outdated_fit_is_replaced(tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path / "cache")
    fitted(files.target("curvature"), "old")
    with files.publishing("curvature", "r1") as building:
        (building / "manifest.json").write_text('{"model_revision": "r1", "by": "first"}')
    with files.publishing("curvature", "r1") as building:
        (building / "manifest.json").write_text('{"model_revision": "r1", "by": "second"}')
    assert json.loads((files.target("curvature") / "manifest.json").read_text())["by"] == "first"


def test_a_fit_that_was_not_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherNotUsable, match="could not be kept"), TeacherFiles(tmp_path).publishing("x", "r1"):
        pass


def test_only_the_published_selection_has_the_plain_name() -> None:
    assert curvature_name("cross_attention_kv") == "curvature"
    assert curvature_name("all") == "curvature-all"
