"""The gradient feature: an inner product that is the first-order score, alike for query and item, of one fit only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import ModelNotUsable, TeacherNotUsable
from byline.features import load_extractor
from byline.features.gradient import NAME, Gradient, fit_gradient_feature
from byline.teachers import TeacherQuery
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.files import TeacherFiles, curvature_name
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import BASIS, FOLDER, GradientBasis, GradientSettings, item_features
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.token_gradients import TokenGradients

MANY = GradientSettings("output_norm", 0.1, draws=64)


@pytest.fixture(scope="module")
def linear(bench) -> AbuPlusLinear:
    settings = replace(bench.settings, query_draws=64, item_draws=64, replicates=8, noise="shared",
                       objective="output_norm")  # fmt: skip
    return AbuPlusLinear(bench.model, bench.curvature, settings, batch=64)


@pytest.fixture(scope="module")
def tokens(bench, linear, tmp_path_factory) -> TokenGradients:
    found = fit_sketches(linear, bench.items, dimensions=3, store=tmp_path_factory.mktemp("fit")).tokens
    assert found is not None
    return found


@pytest.fixture(scope="module")
def basis(bench, tokens) -> GradientBasis:
    """All directions that the items span: nothing is lost but rounding."""
    return GradientBasis.fit(tokens, bench.curvature, MANY, rank=10_000)


@pytest.fixture(scope="module")
def queries(bench) -> list[TeacherQuery]:
    return [bench.query, TeacherQuery(bench.items[9].image, "a blue dog")]


def test_the_inner_product_is_the_first_order_score(bench, linear, tokens, basis, queries) -> None:
    """Same sign, same unit, for a query's whole gradient put through the basis."""
    exact = tokens.scores(tokens.basis.directions(linear.directions(queries)))
    assert basis.dimensions <= len(bench.items)
    gradients = _query_gradients(linear, queries)
    asked = basis.features(gradients, bench.curvature, basis.directions()).numpy()
    found = asked @ item_features(basis, tokens, bench.curvature).T
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()  # eight bits, several times
    assert all(np.corrcoef(a, b)[0, 1] > 0.99 for a, b in zip(found, exact, strict=True))


def test_a_cheap_gradient_of_query_and_item_orders_as_the_first_order_score_does(
    bench, linear, tokens, basis, queries
) -> None:
    exact = tokens.scores(tokens.basis.directions(linear.directions(queries)))
    encoder = Gradient(bench.model, bench.curvature, basis)
    items = encoder.encode([item.image for item in bench.items], [item.caption for item in bench.items])
    asked = encoder.encode([query.image for query in queries], [query.prompt for query in queries])
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(asked @ items.T, exact, strict=True)]
    assert min(found) > 0.9, found


def test_leading_columns_are_the_smaller_basis(bench, tokens, basis) -> None:
    few = GradientBasis.fit(tokens, bench.curvature, MANY, dimensions=3, rank=10_000)
    assert few.dimensions == 3
    whole = item_features(basis, tokens, bench.curvature)
    np.testing.assert_allclose(item_features(few, tokens, bench.curvature), whole[:, :3], atol=1e-6)
    energy = (whole**2).mean(0)
    np.testing.assert_allclose(energy, basis.spread.numpy(), rtol=0.05)
    assert (np.diff(basis.spread.numpy()) <= 0).all()


def test_a_row_depends_on_neither_its_batch_nor_what_was_asked_before(bench, basis) -> None:
    encoder = Gradient(bench.model, bench.curvature, basis)
    images, texts = [i.image for i in bench.items[:20]], [i.caption for i in bench.items[:20]]
    together = encoder.encode(images, texts)
    scale = np.abs(together).max()
    for n in (0, 17):
        np.testing.assert_allclose(encoder.encode(images[n : n + 1], texts[n : n + 1])[0], together[n],
                                   atol=1e-4 * scale)  # fmt: skip
    assert encoder.encode([], []).shape == (0, encoder.dim)


def test_what_was_fitted_is_found_beside_the_model_or_in_the_cache_and_says_what_it_is_worth(
    bench, linear, tokens, queries, tmp_path: Path
) -> None:
    cache = TeacherFiles.beside(bench.model.directory, tmp_path, bench.model.revision)
    with pytest.raises(ModelNotUsable, match="sketches fit"):
        load_extractor(NAME, model=bench.model, cache=tmp_path)
    truth = tokens.scores(tokens.basis.directions(linear.directions(queries)))
    with cache.publishing(FOLDER, bench.model.revision) as folder:
        fidelity = fit_gradient_feature(linear, tokens, queries, truth, folder)
    with cache.publishing(curvature_name(bench.curvature.selection), bench.model.revision) as folder:
        bench.curvature.save(folder)
    assert 0.5 < fidelity["map20"] <= 1 and fidelity["draws"] == 4 and fidelity["queries"] == 2
    extractor = load_extractor(f"minilm+{NAME}", model=bench.model, cache=tmp_path)
    assert extractor.dims == (384, len(bench.items)) and extractor.spec.columns(NAME) == slice(384, 384 + 24)
    other = GradientBasis.fit(tokens, bench.curvature, replace(MANY, draws=8))
    hashes = {Gradient(bench.model, bench.curvature, b).preprocessing_hash for b in (other, _stored(cache, bench))}
    assert len(hashes) == 2


def test_a_basis_of_another_model_or_an_altered_file_is_refused(bench, basis, tmp_path: Path) -> None:
    basis.save(tmp_path, {})
    assert GradientBasis.load(tmp_path, basis.model_revision).name == basis.name
    with pytest.raises(TeacherNotUsable, match="revision"):
        GradientBasis.load(tmp_path, "other")
    other = DiffusionModel.load(write_tiny_pipeline(tmp_path / "other", seed=1))
    with pytest.raises(ModelNotUsable, match="belong|fitted with"):
        Gradient(other, bench.curvature, basis)
    path = tmp_path / BASIS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TeacherNotUsable, match="manifest"):
        GradientBasis.load(tmp_path, basis.model_revision)
    path.unlink()
    with pytest.raises(TeacherNotUsable, match="fit again"):
        GradientBasis.load(tmp_path, basis.model_revision)


def test_a_basis_is_refused_beside_a_curvature_of_the_same_name_fitted_on_another_corpus(
    bench, basis, tmp_path: Path
) -> None:
    rows = bench.items[:12]
    latents = bench.model.encode_images([item.image for item in rows])
    states = bench.model.encode_prompts([item.caption for item in rows])
    other = fit_curvature(bench.model, latents, states, samples=512, seed=0)
    basis.save(tmp_path, {})
    again = GradientBasis.load(tmp_path, basis.model_revision)
    assert other.name == again.preconditioner
    Gradient(bench.model, bench.curvature, again)
    with pytest.raises(ModelNotUsable, match="another fit"):
        Gradient(bench.model, other, again)


def _stored(cache: TeacherFiles, bench) -> GradientBasis:
    folder = cache.find(FOLDER, bench.model.revision)
    assert folder is not None
    return GradientBasis.load(folder, bench.model.revision)


def _query_gradients(linear: AbuPlusLinear, queries: list[TeacherQuery]) -> dict:
    from byline.teachers.layers import select_layers
    from byline.teachers.natural_gradient import query_gradients

    layers = select_layers(linear.model.unet, linear.curvature.selection)
    return query_gradients(linear.model, layers, queries, linear.settings)


def test_multiplied_out_beforehand_the_features_are_the_same(bench, basis) -> None:
    encoder = Gradient(bench.model, bench.curvature, basis)
    assert encoder._folded is not None
    images, texts = [item.image for item in bench.items[:5]], [item.caption for item in bench.items[:5]]
    slowly = basis.features(encoder._plain(images, texts), bench.curvature, basis.directions()).numpy()
    np.testing.assert_allclose(encoder.encode(images, texts), slowly, rtol=1e-4, atol=1e-4 * np.abs(slowly).max())


def test_layers_of_different_activation_factors_are_not_folded(bench, basis) -> None:
    name = basis.layers[0]
    other = replace(bench.curvature.layers[name], activation=-bench.curvature.layers[name].activation)
    apart = replace(bench.curvature, layers={**bench.curvature.layers, name: other})
    encoder = Gradient(bench.model, apart, replace(basis, fingerprint=apart.fingerprint(basis.layers)))
    assert encoder._folded is None
    again = encoder.encode([bench.items[0].image], [bench.items[0].caption])
    # The same curvature, written with other signs of an eigenvector.
    whole = Gradient(bench.model, bench.curvature, basis).encode([bench.items[0].image], [bench.items[0].caption])
    np.testing.assert_allclose(again, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())
