from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageOps

from byline.errors import JobCancelled
from byline.teachers import TeacherItem
from byline.teachers.item_gradients import ItemGradients, _squared_norms
from byline.teachers.latents import LatentCache
from byline.teachers.layers import select_layers
from byline.teachers.natural_gradient import query_gradient, query_gradients
from byline.teachers.noise import NoiseScheme

SHARED = NoiseScheme("shared", 3, 8, 2)


def slow_gradients(bench, layers, scheme, item, replicate, objective, aggregation):
    """One replicate's gradient by autograd on the weights themselves, a draw at a time."""
    model = bench.model
    parameters = {f"{n}.{p}": v for n, e in layers.items() for p, v in e.module.named_parameters()}
    total = {n: torch.zeros(e.rows, e.columns) for n, e in layers.items()}
    key = scheme.key(item.item_id, item.caption)
    for draw in scheme.draws_of(replicate):
        timesteps, noise = scheme.draw(key, [draw], model.latent_shape, model.num_timesteps)
        clean, states = model.encode_images([item.image]), model.encode_prompts([item.caption])
        for value in parameters.values():
            value.requires_grad_(True)
        output = model.predict(model.add_noise(clean, noise, timesteps), timesteps, states)
        wanted = 0.0 if objective == "output_norm" else model.target(clean, noise, timesteps)
        loss = (output - wanted).pow(2).mean()
        found = torch.autograd.grad(loss, list(parameters.values()))
        for value in parameters.values():
            value.requires_grad_(False)
        by_name = dict(zip(parameters, found, strict=True))
        gradient = {
            n: torch.cat(
                [by_name[f"{n}.weight"].flatten(1)]
                + ([] if e.module.bias is None else [by_name[f"{n}.bias"][:, None]]), 1
            )
            for n, e in layers.items()
        }  # fmt: skip
        scale = {
            "sum": 1.0,
            "skew": float(0.5 / loss.detach()),
            "unit": float(1 / torch.cat([g.flatten() for g in gradient.values()]).norm()),
        }[aggregation]
        for name in total:
            total[name] += scale * gradient[name] / scheme.draws_per_replicate
    return total


def close(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-4) -> bool:
    return bool((a - b).norm() <= relative * b.norm())


@pytest.mark.parametrize(
    ("selection", "aggregation", "objective"),
    [
        ("all", "sum", "denoising"),
        ("all", "unit", "denoising"),
        ("all", "skew", "output_norm"),
        ("cross_attention_kv", "unit", "denoising"),
        ("attention", "skew", "denoising"),
    ],
)
def test_a_replicates_gradient_is_the_mean_of_its_draws_gradients(bench, selection, aggregation, objective) -> None:
    layers = select_layers(bench.model.unet, selection)
    scheme = NoiseScheme("item", 3, 8, 2)
    fast = ItemGradients(bench.model, layers, scheme, 8, aggregation, objective).dense(bench.items[4:6])
    slow = slow_gradients(bench, layers, scheme, bench.items[5], 1, objective, aggregation)
    assert list(fast) == list(layers)
    for name, gradient in fast.items():
        assert gradient.shape == (2, 2, layers[name].rows, layers[name].columns)
        assert close(gradient[1, 1], slow[name], 1e-3), name


@pytest.mark.parametrize("scheme", [SHARED, NoiseScheme("item", 0, 12, 3), NoiseScheme("shared", 0, 12, 3, True)])
def test_gradients_do_not_depend_on_the_batch_or_on_company(bench, scheme) -> None:
    layers = select_layers(bench.model.unet, "cross_attention")
    whole = ItemGradients(bench.model, layers, scheme, 128).dense(bench.items[:5])
    for batch in (1, 3, 7):
        again = ItemGradients(bench.model, layers, scheme, batch).dense(bench.items[3:5])
        assert all(close(again[n], whole[n][3:5]) for n in layers)


def test_layers_multiply_out_the_same_by_tokens_and_by_replicates(bench) -> None:
    layers = select_layers(bench.model.unet, "cross_attention")
    block = ItemGradients(bench.model, layers, SHARED).block(bench.items[:3])
    text = [n for n, layer in layers.items() if layer.reads_text]
    assert text and len(text) < len(layers)
    for name in layers:
        assert close(block.gradients(name), block.replicate_gradients(name).mean(1), 1e-5)
    assert not set(text) & set(block._matrices), "text-fed layers are kept as tokens"
    assert len(block._inputs) == 1, "all of them read the same states, kept once"


def test_a_flipped_item_is_its_mirror_image(bench) -> None:
    layers = select_layers(bench.model.unet, "cross_attention_kv")
    gradients = ItemGradients(bench.model, layers, SHARED)
    mirrored = TeacherItem(9, ImageOps.mirror(bench.items[0].image), bench.items[0].caption)
    flipped, plain = gradients.dense(bench.items[:1], flipped=True), gradients.dense([mirrored])
    upright = gradients.dense(bench.items[:1])
    assert all(close(flipped[n], plain[n], 1e-5) for n in layers)
    assert not any(close(flipped[n], upright[n], 0.01) for n in layers)


def test_unit_aggregation_weighs_a_single_draw_to_norm_one(bench) -> None:
    layers = select_layers(bench.model.unet, "all")
    scheme = NoiseScheme("item", 1, 2, 2)
    found = ItemGradients(bench.model, layers, scheme, 4, "unit").dense(bench.items[:2])
    norms = sum(g.pow(2).sum((2, 3)) for g in found.values()).sqrt()
    assert torch.allclose(norms, torch.ones(2, 2), atol=1e-4)


def test_a_norm_is_the_same_by_tokens_and_by_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = torch.randn(3, 4, 20, generator=generator), torch.randn(3, 50, 6, generator=generator)
    for deltas, inputs in ((few, torch.randn(3, 4, 30)), (many, torch.randn(3, 50, 5))):
        wanted = torch.einsum("bto,bti->boi", deltas, inputs).pow(2).sum((1, 2))
        assert torch.allclose(_squared_norms(deltas, inputs), wanted, rtol=1e-4)


def test_queries_in_one_batch_get_the_gradients_they_get_alone(bench) -> None:
    layers = select_layers(bench.model.unet, "cross_attention_kv")
    settings = replace(bench.settings, query_draws=20)
    queries = [bench.query, replace(bench.query, prompt="a blue dog"), replace(bench.query, image=bench.items[9].image)]
    together = query_gradients(bench.model, layers, queries, settings, batch=16)
    for row, query in enumerate(queries):
        alone = query_gradient(bench.model, layers, query, settings, batch=128)
        assert all(close(together[n][row], alone[n]) for n in layers)


def test_a_querys_noise_is_no_items_noise(bench) -> None:
    """Shared between the two it would bias every score of the item that resembles the query."""
    layers = select_layers(bench.model.unet, "cross_attention_kv")
    twin = TeacherItem(0, bench.query.image, bench.query.prompt)
    settings = replace(bench.settings, query_draws=8, seed=3)
    ours = query_gradient(bench.model, layers, bench.query, settings)
    theirs = ItemGradients(bench.model, layers, NoiseScheme("shared", 3, 8, 1)).dense([twin])
    assert not any(close(ours[n], theirs[n][0, 0], 0.05) for n in layers)


def test_bfloat16_gradients_point_where_float32_ones_do(bench) -> None:
    layers = select_layers(bench.model.unet, "all")
    whole = ItemGradients(bench.model, layers, SHARED).dense(bench.items[:2])
    half = ItemGradients(bench.model, layers, SHARED, autocast=True).dense(bench.items[:2])
    a, b = (torch.cat([g.flatten() for g in found.values()]) for found in (whole, half))
    assert b.dtype == torch.float32
    assert 0.98 < torch.nn.functional.cosine_similarity(a, b, dim=0) < 1


def test_check_stops_between_batches(bench) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise JobCancelled("stop")

    gradients = ItemGradients(bench.model, select_layers(bench.model.unet, "cross_attention_kv"), SHARED, 8)
    with pytest.raises(JobCancelled):
        gradients.block(bench.items[:6], check=check)
    assert calls == 3


def test_latents_are_kept_for_items_and_not_for_queries(bench, monkeypatch) -> None:
    size = 4 * int(np.prod(bench.model.latent_shape))
    cache = LatentCache(bench.model, limit=3 * size)
    wanted = bench.model.encode_images([i.image for i in bench.items[:4]])
    query = TeacherItem(-1, bench.items[9].image, "")
    assert torch.allclose(cache.encode([*bench.items[:4], query])[:4], wanted, atol=1e-5)
    encoded: list[int] = []
    encode = bench.model.encode_images
    monkeypatch.setattr(bench.model, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    assert torch.allclose(cache.encode(bench.items[1:4]), wanted[1:], atol=1e-5)
    assert encoded == [], "the three last ones fit"
    cache.encode([query, bench.items[0], bench.items[3]])
    assert encoded == [2], "the query is never kept, the first item had to go"
