"""Label snapshots: there and back through a real Postgres."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from byline.catalog.blobs import BlobStore
from byline.db.session import make_engine, transaction
from byline.errors import LabelsNotUsable
from byline.rankings.snapshot import (
    ARRAYS,
    METADATA,
    SnapshotHeader,
    SnapshotQuery,
    export_snapshot,
    import_snapshot,
    read_snapshot,
    write_snapshot,
)

HEADER = SnapshotHeader("openclipart", "abc123", "openclipart", "abu_plus_linear:1", "python -m somewhere --seed 1")


def _queries(count: int, n: int, seed: int = 0) -> list[SnapshotQuery]:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(2**62, n, replace=False)).astype(np.int64)
    out = []
    for index in range(count):
        halves = (rng.normal(size=(2, n)) * 10.0 ** rng.integers(-9, 0)).astype(np.float32)
        out.append(
            SnapshotQuery(
                prompt=f"a red apple {index}",
                seed=index * 2**33,
                split=("train", "validation", "test")[index % 3],
                near_duplicate_group=2**60 + index,
                source="corpus",
                candidate_set="corpus",
                draws=128,
                image=rng.bytes(5000),
                item_ids=ids,
                tau=halves.mean(0),
                standard_error=np.abs(halves[0] - halves[1]) / 2,
                tau_halves=halves if index != 1 else None,
                samples=(None, np.full(n, 128, np.int32), rng.integers(2, 128, n).astype(np.int32))[index % 3],
            )
        )
    return out


@pytest.fixture
def engine(database_url: str):
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def _import(engine, blobs, path, **changes):
    wanted = {"model_id": "openclipart", "model_revision": "abc123", "corpus_id": "openclipart"}
    return import_snapshot(engine, blobs, path, **{**wanted, **changes})


def test_what_is_exported_after_an_import_is_the_snapshot_itself(engine, tmp_path: Path):
    write_snapshot(tmp_path / "first", HEADER, _queries(7, 40))
    blobs = BlobStore(tmp_path / "blobs")
    report = _import(engine, blobs, tmp_path / "first")
    assert (report.queries, report.rankings, report.present) == (7, 7, 0)
    assert export_snapshot(engine, blobs, tmp_path / "second", HEADER) == 7
    for name in (METADATA, ARRAYS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_values_survive_to_three_digits_and_images_ids_and_splits_exactly(tmp_path: Path):
    queries = _queries(5, 200)
    write_snapshot(tmp_path, HEADER, queries)
    header, again = read_snapshot(tmp_path)
    assert header == HEADER
    for before, after in zip(queries, again, strict=True):
        np.testing.assert_array_equal(after.item_ids, before.item_ids)
        np.testing.assert_allclose(after.tau, before.tau, rtol=1e-3, atol=1e-8 * np.abs(before.tau).max())
        np.testing.assert_allclose(
            after.standard_error, before.standard_error, rtol=1e-3, atol=1e-8 * before.standard_error.max()
        )
        assert (after.tau_halves is None) == (before.tau_halves is None)
        np.testing.assert_array_equal(after.samples, before.samples)
        assert (after.image, after.prompt, after.seed, after.split) == (
            before.image,
            before.prompt,
            before.seed,
            before.split,
        )
        assert after.near_duplicate_group == before.near_duplicate_group


def test_importing_twice_adds_nothing_and_a_second_teacher_adds_only_its_rankings(engine, tmp_path: Path):
    blobs = BlobStore(tmp_path / "blobs")
    queries = _queries(4, 20)
    write_snapshot(tmp_path / "a", HEADER, queries)
    _import(engine, blobs, tmp_path / "a")
    again = _import(engine, blobs, tmp_path / "a")
    assert (again.queries, again.rankings, again.present) == (0, 0, 4)
    write_snapshot(tmp_path / "b", replace(HEADER, teacher_id="abu_plus:2"), queries)
    other = _import(engine, blobs, tmp_path / "b")
    assert (other.queries, other.rankings) == (0, 4)


@pytest.mark.parametrize("field", ["model_id", "model_revision", "corpus_id"])
def test_labels_of_another_model_or_corpus_are_refused_and_change_nothing(engine, tmp_path: Path, field):
    write_snapshot(tmp_path / "a", HEADER, _queries(2, 10))
    with pytest.raises(LabelsNotUsable, match=field):
        _import(engine, BlobStore(tmp_path / "blobs"), tmp_path / "a", **{field: "another"})
    with transaction(engine) as connection:
        assert connection.execute(text("select count(*) from queries")).scalar_one() == 0


def test_a_query_that_exists_with_another_image_is_refused_whole(engine, tmp_path: Path):
    blobs = BlobStore(tmp_path / "blobs")
    queries = _queries(3, 10)
    write_snapshot(tmp_path / "a", HEADER, queries[:1])
    _import(engine, blobs, tmp_path / "a")
    write_snapshot(tmp_path / "b", HEADER, [queries[1], replace(queries[0], image=b"other")])
    with pytest.raises(LabelsNotUsable, match="another image"):
        _import(engine, blobs, tmp_path / "b")
    with transaction(engine) as connection:
        assert connection.execute(text("select count(*) from queries")).scalar_one() == 1


def test_a_damaged_snapshot_is_refused(tmp_path: Path):
    with pytest.raises(LabelsNotUsable):
        read_snapshot(tmp_path)
    write_snapshot(tmp_path, HEADER, _queries(2, 10))
    (tmp_path / ARRAYS).write_bytes((tmp_path / ARRAYS).read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(LabelsNotUsable, match="digest"):
        read_snapshot(tmp_path)
    document = json.loads((tmp_path / METADATA).read_text())
    (tmp_path / METADATA).write_text(json.dumps({**document, "format": "other"}))
    with pytest.raises(LabelsNotUsable, match="format"):
        read_snapshot(tmp_path)


def test_three_hundred_queries_over_the_demo_corpus_fit_into_fifteen_megabytes(tmp_path: Path):
    write_snapshot(tmp_path, HEADER, _queries(300, 2509))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 15e6


def test_there_is_nothing_to_export_for_an_unknown_teacher(engine, tmp_path: Path):
    with pytest.raises(LabelsNotUsable):
        export_snapshot(engine, BlobStore(tmp_path / "blobs"), tmp_path / "x", HEADER)


def test_what_clients_asked_and_repeats_are_never_exported(engine, tmp_path: Path):
    blobs, queries = BlobStore(tmp_path / "blobs"), _queries(3, 40)
    given = [queries[0], replace(queries[1], source="live"), replace(queries[2], candidate_set="repeat-40")]
    write_snapshot(tmp_path / "given", HEADER, given)
    _import(engine, blobs, tmp_path / "given")
    assert export_snapshot(engine, blobs, tmp_path / "exported", HEADER) == 1
    assert [query.prompt for query in read_snapshot(tmp_path / "exported")[1]] == [queries[0].prompt]
