"""No teacher mixes devices: tensors of an accelerator meet none of the CPU's, and what is kept comes back to it.

There need not be one: ``Elsewhere`` is a tensor that says it is on another device, computes on the CPU, and refuses
what an accelerator would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from byline.diffusion.model import DiffusionModel
from byline.errors import JobCancelled
from byline.features.gradient import Gradient, fit_gradient_feature
from byline.teachers import curvature_fit, item_losses
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import CurvatureFit, fit_curvature, fit_shard, merge_shards
from byline.teachers.diagonal_fisher import fit_diagonal_fisher
from byline.teachers.files import TeacherFiles
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import GradientBasis, GradientSettings, item_features
from byline.teachers.gradient_fold import FoldedFeatures
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.partial_sums import PartialSums, merge
from byline.teachers.projected import ProjectedGradientTeacher
from byline.teachers.ranking import ignore_progress, never_cancelled
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_basis import Coordinates
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.token_gradients import TokenBasis, TokenGradients

#: A device that torch knows everywhere and asks no driver for.
DEVICE = "meta"
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
#: An accelerator's tensor may be indexed by one of the CPU.
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class Elsewhere(torch.Tensor):
    """A tensor on ``DEVICE``; ``held`` is what it computes with."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=torch.device(DEVICE)
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """Within it, and within ``FromPython``, tensors can be made on ``DEVICE`` and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FromPython(TorchFunctionMode):
    """What torch makes of Python's numbers and lists it makes past any dispatch: here on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") is not None:
            device = given.pop("device")
            return func(*args, **given).to(device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        return func(*args, **given)


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    given = [one for one in tree_leaves((args, dict(kwargs))) if isinstance(one, torch.Tensor)]
    there = [one for one in given if isinstance(one, Elsewhere)]
    here = [one for one in given if not isinstance(one, Elsewhere) and one.dim()]
    own = isinstance(given[0], Elsewhere) if given else False
    if there and here and func not in _MOVES and not (func in _INDEXED and own):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {DEVICE} and cpu")
    wanted = kwargs.get("device")
    stays = bool(there) if wanted is None else torch.device(wanted).type == DEVICE
    stays = own if func in _MOVES and wanted is None else stays
    known = {id(one.held): one for one in there}
    plain = dict(kwargs) | ({} if wanted is None else {"device": torch.device("cpu")})
    found = func(*tree_map(_held, args), **tree_map(_held, plain))

    def wrapped(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or not stays:
            return one
        before = known.get(id(one))
        return Elsewhere(one) if before is None else before

    return tree_map(wrapped, found)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Elsewhere) else one


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    torch.set_num_threads(1)
    with Accelerator(), FromPython():
        yield


def test_the_stand_in_refuses_what_an_accelerator_refuses() -> None:
    there = torch.ones(2, 2).to(DEVICE)
    assert there.device.type == DEVICE and (there @ there).cpu().tolist() == [[2, 2], [2, 2]]
    assert (there * 2.0 + torch.tensor(1.0)).sum().item() == 12
    for mixed in (lambda: there @ torch.ones(2, 2), lambda: torch.ones(2, 2).add_(there), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()


# -- fits -------------------------------------------------------------------------------------------

#: layer -> (rows, columns); the two layers read one input.
LAYERS = {"one": (4, 6), "two": (3, 6)}


class Model:
    """As much of a model as the sums of a fit ask for."""

    def __init__(self, device: str) -> None:
        self.device, self.revision = device, "r"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input and output gradients that depend on the draw alone, on the model's device."""

    def gradients(fit: CurvatureFit, rows: range) -> Any:
        made = [torch.Generator().manual_seed(row) for row in rows]
        inputs = torch.stack([torch.randn(5, 6, generator=one) for one in made]).to(fit.model.device)
        deltas = {
            name: torch.stack([torch.randn(5, size[0], generator=one) for one in made]).to(fit.model.device)
            for name, size in LAYERS.items()
        }
        return dict.fromkeys(LAYERS, inputs), deltas

    monkeypatch.setattr(curvature_fit, "_sampled_gradients", gradients)
    monkeypatch.setattr(CurvatureFit, "layers", LAYERS)


def fitted(device: str, directory: Path | None = None, shards: int = 1, **more: Any) -> Curvature:
    corpus = torch.zeros(3, 1, 2, 2), torch.zeros(3, 5, 6)
    return fit_curvature(
        Model(device), *corpus, samples=24, seed=0, batch=4, directory=directory, shards=shards, **more  # type: ignore[arg-type]
    )


def same(one: Curvature, other: Curvature) -> None:
    for name in LAYERS:
        for part in ("activation", "gradient", "eigenvalues"):
            ours, theirs = getattr(one.layers[name], part), getattr(other.layers[name], part)
            np.testing.assert_allclose(ours.cpu().numpy(), theirs.cpu().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
def test_curvature_is_fitted_on_the_models_device_with_files_and_without(
    drawn: None, tmp_path: Path, shards: int
) -> None:
    expected = fitted("cpu")
    for directory in (None, tmp_path):
        found = fitted(DEVICE, directory, shards)
        same(found, expected)
        assert found.device.type == DEVICE


def test_a_killed_fit_goes_on_there_from_its_files(drawn: None, tmp_path: Path, monkeypatch: Any) -> None:
    partial = curvature_fit._partial
    monkeypatch.setattr(curvature_fit, "_partial", lambda *which: replace(partial(*which), every=4))
    for stop in range(1, 12):
        calls = iter(range(stop))

        def check(calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise JobCancelled("killed")

        try:
            found = fitted(DEVICE, tmp_path, check=check)
        except JobCancelled:
            continue
        break
    same(found, fitted("cpu"))


def test_shards_of_several_workers_are_merged_there(drawn: None, tmp_path: Path) -> None:
    corpus = torch.zeros(3, 1, 2, 2), torch.zeros(3, 5, 6)
    fit = CurvatureFit(Model(DEVICE), *corpus, "cross_attention_kv", 24, 0, 4, 2, tmp_path)  # type: ignore[arg-type]
    for stage in ("covariances", "eigenvalues"):
        for shard in (0, 1):
            fit_shard(fit, stage, shard)  # type: ignore[arg-type]
    found = merge_shards(fit)
    same(found, fitted("cpu"))
    assert found.device.type == DEVICE


def test_sums_that_were_read_and_sums_that_were_computed_meet(tmp_path: Path) -> None:
    def add(rows: range) -> dict[str, torch.Tensor]:
        return {"a": torch.full((2,), float(len(rows))).to(DEVICE)}

    parts = [PartialSums(range(n, n + 4), 2, tmp_path / f"{n}") for n in (0, 4)]
    first = parts[0].compute(add, ignore_progress, never_cancelled)
    again = parts[0].compute(add, ignore_progress, never_cancelled)
    second = parts[1].compute(add, ignore_progress, never_cancelled)
    assert merge([first, second])["a"].tolist() == merge([again, second])["a"].tolist() == [8, 8]


# -- features ---------------------------------------------------------------------------------------


@pytest.fixture
def curvature(drawn: None) -> Curvature:
    return fitted("cpu")


def token_gradients(curvature: Curvature) -> TokenGradients:
    generator = torch.Generator().manual_seed(1)
    deltas, texts = torch.randn(20, 5, 7, generator=generator), torch.randn(4, 5, 6, generator=generator)
    basis = TokenBasis.fit(curvature, list(LAYERS), [deltas.flatten(0, 1)], 7, 0.1)
    encode: Callable[[list[str]], torch.Tensor] = lambda asked: texts[[int(one) for one in asked]]  # noqa: E731
    return TokenGradients.encode(basis, np.arange(20), deltas, [str(n % 4) for n in range(20)], encode)


def test_a_gradient_basis_is_fitted_and_used_where_the_curvature_is(curvature: Curvature) -> None:
    there = curvature.to(DEVICE)
    settings = GradientSettings("output_norm", 0.1)
    tokens, moved = token_gradients(curvature), token_gradients(there)
    ours, theirs = (GradientBasis.fit(t, c, settings, rank=7) for t, c in ((tokens, curvature), (moved, there)))
    assert theirs.query_map.device.type == theirs.codes.device.type == "cpu"
    rows, others = item_features(theirs, moved, there), item_features(ours, tokens, curvature)
    np.testing.assert_allclose(rows @ rows.T, others @ others.T, rtol=1e-3, atol=1e-3 * np.abs(others @ others.T).max())
    folded = FoldedFeatures.of(theirs, there, theirs.directions().to(DEVICE))
    assert folded is not None and {folded.scale.device.type, folded.directions.device.type} == {DEVICE}


def test_gradients_there_meet_token_gradients_and_sketch_coordinates(curvature: Curvature) -> None:
    generator = torch.Generator().manual_seed(2)
    plain = {n: torch.randn(2, rows, columns, generator=generator) for n, (rows, columns) in LAYERS.items()}
    moved, there = {n: g.to(DEVICE) for n, g in plain.items()}, curvature.to(DEVICE)
    tokens = token_gradients(curvature)
    asked = [tokens.basis.directions(c.precondition(g)) for c, g in ((curvature, plain), (there, moved))]
    np.testing.assert_allclose(*(tokens.scores(one) for one in asked), rtol=1e-4, atol=1e-5)
    kept = Coordinates({name: torch.arange(0, rows * columns, 2) for name, (rows, columns) in LAYERS.items()})
    picked = kept.pick(there.whiten(moved).items())
    assert picked.device.type == DEVICE
    np.testing.assert_allclose(picked.cpu().numpy(), kept.pick(curvature.whiten(plain).items()).numpy(), rtol=1e-4)
    assert there.fingerprint(LAYERS) == curvature.fingerprint(LAYERS) == replace(there, seed=1).fingerprint(LAYERS)


# -- a whole model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(bench: Any) -> DiffusionModel:
    """A model on ``DEVICE``, moved after it was loaded: diffusers has a use of its own for a device of this name."""
    model = DiffusionModel.load(bench.model.directory)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return Elsewhere(tensor.detach().clone())

    for module in (model.unet, model.vae, model.text.encoder):
        module._apply(move)
    model._alphas_cumprod, model.device = move(model._alphas_cumprod), DEVICE
    object.__setattr__(model.text, "device", DEVICE)
    return model


def test_every_teacher_runs_there_and_ranks_as_it_does_on_the_cpu(
    bench: Any, elsewhere: DiffusionModel, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(item_losses, "full_precision", lambda device: nullcontext())  # of a device that torch knows
    settings = UnlearningSettings(corpus_size=6, query_draws=16, item_draws=16)
    model, items, query = elsewhere, bench.items[:6], bench.query
    there = bench.curvature.to(DEVICE)
    for kind in (AbuPlusLinear, AbuPlus):
        ours, theirs = kind(bench.model, bench.curvature, settings), kind(model, there, settings)
        found, expected = (teacher.score(query, items).tau for teacher in (theirs, ours))
        assert np.corrcoef(found, expected)[0, 1] > 0.99
    linear = AbuPlusLinear(model, there, settings)
    sketches = fit_sketches(linear, items, dimensions=4, fidelity_queries=[query], store=tmp_path / "fit")
    assert sketches.tokens is not None
    found = SketchTeacher(model, there, sketches.basis, sketches).score(query, items).tau
    assert np.corrcoef(found, linear.score(query, items).tau)[0, 1] > 0.99
    truth = sketches.tokens.scores(sketches.tokens.basis.directions(linear.directions([query])))
    fit_gradient_feature(linear, sketches.tokens, [query], truth, tmp_path / "gradient")
    basis = GradientBasis.load(tmp_path / "gradient", model.revision)
    assert Gradient(model, there, basis).encode([query.image], [query.prompt]).shape == (1, basis.dimensions)
    corpus = model.encode_images([i.image for i in items]), model.encode_prompts([i.caption for i in items])
    fisher = fit_diagonal_fisher(model, *corpus, samples=16, seed=0)
    assert np.isfinite(AbuPlusLinear(model, fisher, settings).score(query, items).tau).all()
    trak = ProjectedGradientTeacher(
        "d_trak", "output_norm", model, TeacherFiles(tmp_path), settings, "cross_attention_kv"
    )
    trak.fit(items)
    assert np.isfinite(trak.score(query, items).tau).all()
