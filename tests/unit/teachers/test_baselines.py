import os
import time
from pathlib import Path

import numpy as np
import pytest

from byline.teachers.baselines import LossFiles, LossMemory, remove_older


def cells(count: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f"{i // 4}/caption/upright", i % 4) for i in range(start, start + count)]


def values(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3))


@pytest.mark.parametrize("on_disk", [True, False])
def test_losses_come_back_bit_for_bit_and_what_is_missing_is_said_to_be(tmp_path: Path, on_disk: bool) -> None:
    store = LossFiles(tmp_path, 3, "m") if on_disk else LossMemory(3)
    store.add(cells(8), values(8))
    store.add(cells(4, 8), values(4, 1))
    store.refresh()
    losses, known = store.read(cells(16)[::-1])
    assert known.tolist() == [False] * 4 + [True] * 12
    assert np.array_equal(losses[known][::-1], np.concatenate([values(8), values(4, 1)]))
    assert np.isnan(losses[~known]).all()


def test_writers_at_the_same_time_see_each_others_rows_after_a_refresh(tmp_path: Path) -> None:
    first, second = LossFiles(tmp_path, 3, "m"), LossFiles(tmp_path, 3, "m")
    first.add(cells(4), values(4))
    second.add(cells(8), values(8))  # four of them again
    first.add(cells(4, 8), values(4, 2))
    for store in (first, second, LossFiles(tmp_path, 3, "m")):
        store.refresh()
        losses, known = store.read(cells(12))
        assert known.all() and np.array_equal(losses, np.concatenate([values(8), values(4, 2)]))


def segment(directory: Path) -> Path:
    (path,) = directory.glob("*.losses")
    return path


def test_a_row_cut_off_by_a_kill_is_not_seen_and_the_rest_is(tmp_path: Path) -> None:
    LossFiles(tmp_path, 3, "m").add(cells(8), values(8))
    os.truncate(segment(tmp_path), segment(tmp_path).stat().st_size - 5)
    store = LossFiles(tmp_path, 3, "m")
    assert store.read(cells(8))[1].tolist() == [True] * 7 + [False]
    store.add(cells(1, 7), values(8)[7:])
    store.refresh()
    assert np.array_equal(store.read(cells(8))[0], values(8))


@pytest.mark.parametrize("byte", [0, 15, 16, 20, 40])
def test_an_altered_row_is_not_trusted_and_can_be_measured_again(tmp_path: Path, byte: int) -> None:
    LossFiles(tmp_path, 3, "m").add(cells(8), values(8))
    content = bytearray(segment(tmp_path).read_bytes())
    row = (len(content) - 256) // 8
    content[256 + 2 * row + byte] ^= 1
    segment(tmp_path).write_bytes(content)
    store = LossFiles(tmp_path, 3, "m")
    losses, known = store.read(cells(8))
    assert known.tolist() == [True, True, False, True, True, True, True, True]
    assert np.array_equal(losses[known], values(8)[known])
    store.add(cells(1, 2), values(8)[2:3])
    assert np.array_equal(LossFiles(tmp_path, 3, "m").read(cells(8))[0], values(8))


def test_zeros_left_by_a_lost_power_supply_are_no_rows(tmp_path: Path) -> None:
    LossFiles(tmp_path, 3, "m").add(cells(2), values(2))
    with segment(tmp_path).open("ab") as file:
        file.write(bytes(4096))
    store = LossFiles(tmp_path, 3, "m")
    assert store.read(cells(4))[1].tolist() == [True, True, False, False]


def test_losses_of_another_meaning_or_width_are_not_used(tmp_path: Path) -> None:
    LossFiles(tmp_path, 3, "model a").add(cells(2), values(2))
    assert not LossFiles(tmp_path, 3, "model b").read(cells(2))[1].any()
    assert not LossFiles(tmp_path, 6, "model a").read(cells(2))[1].any()
    assert LossFiles(tmp_path, 3, "model a").read(cells(2))[1].all()


def test_a_folder_removed_by_whoever_finished_first_does_not_stop_the_other(tmp_path: Path) -> None:
    mine, theirs = LossFiles(tmp_path / "q", 3, "m"), LossFiles(tmp_path / "q", 3, "m")
    mine.add(cells(4), values(4))
    theirs.discard()
    mine.add(cells(4, 4), values(4, 1))
    mine.refresh()
    assert mine.read(cells(8))[1].tolist() == [False] * 4 + [True] * 4 or mine.read(cells(8))[1].all()


def test_only_folders_nobody_has_touched_are_removed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        LossFiles(tmp_path / name, 3, "m").add(cells(2), values(2))
    for path in (tmp_path / "old", segment(tmp_path / "old")):
        os.utime(path, (1000, 1000))
    remove_older(tmp_path, time.time() - 3600)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
