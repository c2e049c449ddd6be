import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers import TeacherItem
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.packed_directions import BLOCK, PackedDirections, principal_directions
from byline.teachers.preconditioner import NoCurvature
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_basis import Coordinates, SketchBasis
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet


@pytest.fixture(scope="module")
def linear(bench) -> AbuPlusLinear:
    settings = replace(bench.settings, query_draws=16, item_draws=4, replicates=4, noise="shared")
    return AbuPlusLinear(bench.model, bench.curvature, settings, batch=64)


@pytest.fixture(scope="module")
def sketches(bench, linear, tmp_path_factory) -> SketchSet:
    """Sixteen bits of all coordinates, as many dimensions as items: nothing is lost but rounding."""
    return fit_sketches(
        linear, bench.items, dimensions=24, bits=16, token_rank=0, fidelity_queries=[bench.query],
        store=tmp_path_factory.mktemp("fit"),
    )  # fmt: skip


def test_with_nothing_cut_a_sketch_scores_as_the_first_order_does(bench, linear, sketches) -> None:
    """Same sign, same unit, same noise."""
    full = linear.score(bench.query, bench.items)
    teacher = SketchTeacher(bench.model, bench.curvature, sketches.basis, sketches)
    found = teacher.score(bench.query, bench.items)
    assert np.allclose(found.tau, full.tau, rtol=0.01, atol=0.01 * np.abs(full.tau).max())
    assert np.array_equal(found.item_ids, full.item_ids)
    assert np.isfinite(found.standard_error).all() and (found.standard_error > 0).all()
    assert sketches.fidelity["spearman"] > 0.99


def test_a_querys_replicates_average_to_its_sketch_and_spread_as_its_noise(bench, sketches) -> None:
    one = SketchTeacher(bench.model, bench.curvature, sketches.basis, query_draws=16)
    found = one.query_sketches([bench.query, replace(bench.query, prompt="a blue dog")])
    assert found.shape == (2, 4, 24) and found.dtype == np.float32
    assert np.allclose(one.query_sketch(bench.query), found[0], rtol=1e-3, atol=1e-4 * np.abs(found).max())
    few = SketchTeacher(bench.model, bench.curvature, sketches.basis, sketches, query_draws=6)
    assert few.query_sketch(bench.query).shape == (2, 24), "replicates divide the draws"
    many = SketchTeacher(bench.model, bench.curvature, sketches.basis, sketches, query_draws=64)
    errors = [t.score(bench.query, bench.items).standard_error.mean() for t in (few, many)]
    assert errors[0] > 1.5 * errors[1]
    assert few.teacher_id != many.teacher_id


def test_an_item_missing_in_the_set_is_computed_and_kept(bench, sketches) -> None:
    part = SketchSet(sketches.basis, sketches.item_ids[:20], sketches.sketches[:20], {}, "")
    teacher = SketchTeacher(bench.model, bench.curvature, sketches.basis, part)
    whole = SketchTeacher(bench.model, bench.curvature, sketches.basis, sketches)
    calls: list[tuple[int, int]] = []
    found = teacher.score(bench.query, bench.items, progress=lambda *p: calls.append(p))
    assert calls[-1] == (4, 4)
    expected = whole.score(bench.query, bench.items)
    assert np.allclose(found.tau, expected.tau, rtol=0.01, atol=0.01 * np.abs(expected.tau).max())
    calls.clear()
    teacher.fit(bench.items, progress=lambda *p: calls.append(p))
    assert calls == []


def test_coordinates_of_largest_energy_are_kept_wherever_they_lie() -> None:
    energy = {"a": torch.tensor([[1.0, 9.0], [3.0, 2.0]]), "b": torch.tensor([[8.0, 0.0, 4.0]])}
    kept = Coordinates.of_largest(energy, 3)
    assert {n: k.tolist() for n, k in kept.kept.items()} == {"a": [1], "b": [0, 2]}
    assert kept.pick(energy_as_gradient := [(n, e[None]) for n, e in energy.items()]).tolist() == [[9.0, 8.0, 4.0]]
    assert Coordinates.of_largest(energy, 99).count == 7
    assert Coordinates.of_largest(energy, 99).pick(energy_as_gradient).shape == (1, 7)


def test_principal_directions_are_those_of_the_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((20, 4)) @ rng.standard_normal((4, BLOCK + 90)) + 3).astype(np.float32)  # not centred
    found = torch.cat([principal_directions(rows, 3, 16).block(i) for i in (0, 1)])
    exact = torch.linalg.svd(torch.from_numpy(rows), full_matrices=False).Vh[:3]
    assert torch.allclose((exact @ found).abs(), torch.eye(3), atol=1e-2)
    assert principal_directions(rows, 500, 16).shape == (BLOCK + 90, 5), "no more than the rows span"


@pytest.mark.parametrize(("bits", "room"), [(1, 0.012), (2, 0.006), (16, 0.001)])
def test_coarse_directions_keep_inner_products(bits: int, room: float) -> None:
    """The error is that of a random sign per coordinate: about 1 / sqrt(m) of the vectors, and unbiased."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.linalg.qr(torch.randn(3 * BLOCK + 7, 11, generator=generator)).Q
    packed = PackedDirections.pack(exact.split(BLOCK), bits)
    assert packed.shape == exact.shape
    assert packed.codes.nbytes <= (exact.numel() + 5 * len(exact)) * bits / 8
    found = packed.project(exact.T)
    assert torch.allclose(found, torch.eye(11), atol=3 * room)
    assert float((found - torch.eye(11)).pow(2).mean().sqrt()) < room
    with pytest.raises(TeacherNotUsable, match="1, 2 or 16"):
        PackedDirections.pack(exact.split(BLOCK), 3)


def test_a_basis_of_single_bits_ranks_almost_as_the_whole_gradients(bench, linear, tmp_path: Path) -> None:
    one = fit_sketches(linear, bench.items, dimensions=24, fidelity_queries=[bench.query], store=tmp_path)
    assert one.basis.directions.bits == 1
    assert one.fidelity["spearman"] > 0.9


def test_items_outside_the_basis_are_projected_in_the_same_pass(bench, linear, tmp_path: Path) -> None:
    found = fit_sketches(
        linear, bench.items, dimensions=24, bits=16, basis_items=16, fidelity_queries=[bench.query], store=tmp_path
    )
    assert found.sketches.shape == (24, 16) and found.fidelity["basis_items"] == 16
    again = SketchTeacher(bench.model, bench.curvature, found.basis).item_sketches(bench.items)
    assert np.allclose(again, found.sketches, rtol=0.01, atol=0.01 * np.abs(again).max())
    assert 0.5 < found.fidelity["spearman"]


def test_fewer_dimensions_keep_less_and_say_so(bench, linear, sketches, tmp_path: Path) -> None:
    small = fit_sketches(
        linear, bench.items, dimensions=3, coordinates=64, fidelity_queries=[bench.query], store=tmp_path
    )
    assert small.basis.dimensions == 3 and small.basis.coordinates.count == 64
    assert small.sketches.shape == (24, 3)
    assert small.fidelity["spearman"] < sketches.fidelity["spearman"]
    assert {"map20", "map100", "queries", "draws", "dimensions"} <= set(small.fidelity)


def test_a_killed_fit_resumes_to_the_same_bits(bench, linear, sketches, tmp_path: Path) -> None:
    def fit(**more) -> SketchSet:
        return fit_sketches(
            small, bench.items, dimensions=24, bits=16, fidelity_queries=[bench.query],
            store=tmp_path / "fit", **more,
        )  # fmt: skip

    small = AbuPlusLinear(bench.model, bench.curvature, linear.settings, batch=64, memory=1)
    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise JobCancelled("killed by the test")

    with pytest.raises(JobCancelled):
        fit(check=kill)
    resumed_calls = []
    resumed = fit(check=lambda: resumed_calls.append(1))
    assert len(resumed_calls) < 24 + 1 + 5, "finished chunks were kept"
    whole = fit_sketches(
        small, bench.items, dimensions=24, bits=16, fidelity_queries=[bench.query],
        store=tmp_path / "whole",
    )  # fmt: skip
    assert np.array_equal(resumed.sketches, whole.sketches)
    assert np.array_equal(resumed.basis.directions.codes, whole.basis.directions.codes)
    assert resumed.basis.name == whole.basis.name
    assert resumed.fidelity == whole.fidelity
    with pytest.raises(TeacherNotUsable, match="remove it"):
        fit_sketches(small, bench.items[::-1], dimensions=24, bits=16, store=tmp_path / "fit")


def test_a_saved_set_comes_back_and_an_altered_one_does_not(bench, sketches, tmp_path: Path) -> None:
    sketches.save(tmp_path)
    again = SketchSet.load(tmp_path, bench.model.revision)
    assert np.array_equal(again.item_ids, sketches.item_ids)
    assert np.allclose(again.sketches, sketches.sketches, atol=1e-3 * np.abs(sketches.sketches).max())
    assert np.array_equal(again.basis.directions.codes, sketches.basis.directions.codes)
    assert again.basis.name == sketches.basis.name and again.basis.settings == sketches.basis.settings
    assert again.teacher_id == sketches.teacher_id
    for name, value in sketches.fidelity.items():
        assert again.fidelity[name] == value or np.isnan(value)
    assert json.loads((tmp_path / "manifest.json").read_text())["model_revision"] == bench.model.revision
    with pytest.raises(TeacherNotUsable, match="fit the sketches again"):
        SketchSet.load(tmp_path, "another revision")
    path = tmp_path / "sketches.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(TeacherNotUsable, match="manifest describes"):
        SketchSet.load(tmp_path, bench.model.revision)
    with pytest.raises(TeacherNotUsable, match="fit them first"):
        SketchSet.load(tmp_path / "nowhere", bench.model.revision)
    path.rename(tmp_path / "basis.safetensors")
    with pytest.raises(TeacherNotUsable, match="fit the sketches again"):
        SketchBasis.load(tmp_path / "basis.safetensors", bench.model.revision)


def test_further_items_join_a_set_in_its_basis(sketches) -> None:
    new = np.full((2, 24), 7, dtype=np.float32)
    grown = sketches.with_items([int(sketches.item_ids[3]), 999], new)
    assert len(grown.item_ids) == 25
    assert np.array_equal(grown.sketches[grown.rows_of([999, int(sketches.item_ids[3])])], new)
    assert grown.rows_of([5]).tolist() == [-1]
    with pytest.raises(TeacherNotUsable):
        sketches.with_items([1], new)


def test_sketches_of_another_curvature_are_refused(bench, sketches) -> None:
    with pytest.raises(TeacherNotUsable, match="load that one"):
        SketchTeacher(bench.model, NoCurvature("cross_attention_kv", bench.model.revision), sketches.basis)


def refitted(bench) -> Curvature:
    """A fit of the same name on another state of the corpus."""
    rows = bench.items[:12]
    latents, states = bench.model.encode_images([i.image for i in rows]), bench.model.encode_prompts(
        [i.caption for i in rows]
    )
    return fit_curvature(bench.model, latents, states, samples=512, seed=0)


def test_sketches_of_a_curvature_of_the_same_name_fitted_on_another_corpus_are_refused(
    bench, sketches, tmp_path: Path
) -> None:
    other = refitted(bench)
    assert other.name == bench.curvature.name == sketches.basis.preconditioner
    sketches.save(tmp_path)
    for basis in (sketches.basis, SketchBasis.load(tmp_path / "basis.safetensors", bench.model.revision)):
        basis.require(bench.curvature)
        with pytest.raises(TeacherNotUsable, match="another fit"):
            SketchTeacher(bench.model, other, basis)


def test_the_fingerprint_of_a_curvature_survives_its_files_and_a_restriction(bench, tmp_path: Path) -> None:
    layers = list(bench.curvature.layers)
    bench.curvature.save(tmp_path)
    again = Curvature.load(tmp_path, bench.model.revision)
    assert again.fingerprint(layers) == bench.curvature.fingerprint(reversed(layers))
    assert again.fingerprint(layers[:1]) != again.fingerprint(layers)


def test_a_basis_without_a_fingerprint_of_its_own_has_the_one_of_its_manifest(
    bench, sketches, tmp_path: Path
) -> None:
    older = replace(sketches, basis=replace(sketches.basis, fingerprint=""))
    older.save(tmp_path)
    SketchSet.load(tmp_path, bench.model.revision).basis.require(refitted(bench))  # by name alone, as before
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": sketches.basis.fingerprint}))
    with pytest.raises(TeacherNotUsable, match="another fit"):
        SketchSet.load(tmp_path, bench.model.revision).basis.require(refitted(bench))


def test_flips_mean_sketches_both_orientations_and_max_is_refused(bench, linear, tmp_path: Path) -> None:
    both = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, flips="mean"), batch=64)
    found = fit_sketches(both, bench.items[:6], dimensions=6, bits=16, token_rank=0, store=tmp_path)
    assert np.isnan(found.fidelity["map100"])
    teacher = SketchTeacher(bench.model, bench.curvature, found.basis, found)
    expected = both.score(bench.query, bench.items[:6])
    ranking = teacher.score(bench.query, bench.items[:6])
    assert np.allclose(ranking.tau, expected.tau, rtol=0.01, atol=0.01 * np.abs(expected.tau).max())
    assert np.array_equal(ranking.samples, expected.samples)
    higher = AbuPlusLinear(bench.model, bench.curvature, replace(linear.settings, flips="max"))
    with pytest.raises(TeacherNotUsable, match="inner product"):
        fit_sketches(higher, bench.items, store=tmp_path)


def test_convolutions_can_be_sketched_too(bench, tmp_path: Path) -> None:
    settings = replace(bench.settings, query_draws=4, item_draws=2, replicates=2)
    linear = AbuPlusLinear(bench.model, NoCurvature("all", bench.model.revision), settings)
    items: list[TeacherItem] = bench.items[:8]
    found = fit_sketches(linear, items, dimensions=8, coordinates=4096, fidelity_queries=[bench.query], store=tmp_path)
    assert any("conv" in name for name in found.basis.coordinates.kept)
    assert found.fidelity["spearman"] > 0.5 and found.fidelity["coordinates"] == 4096
