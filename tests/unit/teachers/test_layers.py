from collections.abc import Callable

import pytest
import torch
from torch import nn

from byline.errors import TeacherNotUsable
from byline.teachers.layers import SELECTIONS, EditableLayer, capture, includes, select_layers, weight_gradients


def direct_gradients(
    network: nn.Module, layers: dict[str, EditableLayer], losses_of: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Per-sample gradients [batch, rows, columns] by one backward pass per sample: no hooks."""
    parameters = {n: p for n, p in network.named_parameters() if n.rpartition(".")[0] in layers}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        losses = losses_of()
        rows = [
            dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True), strict=True))
            for loss in losses
        ]
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    found = {}
    for name in layers:
        weight = torch.stack([row[f"{name}.weight"] for row in rows]).flatten(2)
        bias = [row[f"{name}.bias"] for row in rows if f"{name}.bias" in row]
        found[name] = torch.cat([weight, torch.stack(bias)[:, :, None]], dim=2) if bias else weight
    return found


def captured_gradients(
    layers: dict[str, EditableLayer], losses_of: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    with capture(layers) as record:
        deltas = record.gradients(losses_of())
        return weight_gradients(record.inputs, deltas)


class Network(nn.Module):
    """A strided and padded convolution, a dilated one of another padding in each direction, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(3, 4, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.pointwise(torch.tanh(self.dilated(torch.tanh(self.strided(images))))))
        return self.out(hidden.flatten(2).transpose(1, 2))  # [batch, positions, 5]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().double().requires_grad_(False)


def test_captured_gradients_equal_one_backward_pass_per_sample(network) -> None:
    images = torch.randn(4, 2, 9, 7, generator=torch.Generator().manual_seed(0)).double()

    def losses() -> torch.Tensor:
        return network(images).pow(2).flatten(1).mean(1)

    layers = select_layers(network, "all")
    assert list(layers) == ["strided", "dilated", "pointwise", "out"]
    ours, direct = captured_gradients(layers, losses), direct_gradients(network, layers, losses)
    for name, layer in layers.items():
        assert ours[name].shape == (4, layer.rows, layer.columns)
        assert torch.allclose(ours[name], direct[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_captured_gradients_of_a_unet_equal_autograd_in_every_selection(bench, selection) -> None:
    model = bench.model
    latents = model.encode_images([i.image for i in bench.items[:3]])
    states = model.encode_prompts([i.caption for i in bench.items[:3]])
    times = torch.tensor([10, 400, 900])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def losses() -> torch.Tensor:
        return model.denoising_loss(latents, states, times, noise)

    layers = select_layers(model.unet, selection)
    ours, direct = captured_gradients(layers, losses), direct_gradients(model.unet, layers, losses)
    assert ours.keys() == layers.keys()
    for name in layers:
        scale = direct[name].abs().max()
        assert (ours[name] - direct[name]).abs().max() < 1e-4 * scale, name


def test_selections_hold_one_another_in_order(bench) -> None:
    chosen = [select_layers(bench.model.unet, selection) for selection in SELECTIONS]
    names = [set(layers) for layers in chosen]
    assert all(smaller < larger for smaller, larger in zip(names, names[1:], strict=False))
    assert includes("all", "attention") and not includes("attention", "all") and includes("linear", "linear")
    convolutions = {name for name, layer in chosen[-1].items() if isinstance(layer.module, nn.Conv2d)}
    assert names[-1] - names[-2] == convolutions and "conv_in" in convolutions


def test_only_keys_and_values_of_cross_attention_read_the_text_alone(bench) -> None:
    """The claim behind ``reads_text``: their inputs do not change with timestep, noise or image."""
    model = bench.model
    layers = select_layers(model.unet, "all")
    states = model.encode_prompts(["a red cat"])
    inputs = []
    for seed in (0, 1):
        noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
        with capture(layers) as record:
            model.predict(noisy, torch.tensor([seed * 500]), states)
        inputs.append(record.inputs)
    same = {name for name in layers if torch.equal(inputs[0][name], inputs[1][name])}
    assert same == {name for name, layer in layers.items() if layer.reads_text}
    assert same == set(select_layers(model.unet, "cross_attention_kv"))


def test_a_matrix_becomes_the_parameters_it_came_from(network) -> None:
    for name, layer in select_layers(network, "all").items():
        matrix = layer.matrix()
        assert matrix.shape == (layer.rows, layer.columns)
        parameters = layer.parameters(matrix)
        own = {f"{name}.{n}": p for n, p in layer.module.named_parameters()}
        assert parameters.keys() == own.keys()
        assert all(torch.equal(parameters[n], own[n]) for n in own)


def test_an_edited_matrix_acts_as_tokens_times_matrix(network) -> None:
    """outputs = tokens @ matrix^T: the one relation everything above relies on."""
    images = torch.randn(2, 2, 9, 7, generator=torch.Generator().manual_seed(1)).double()
    layers = select_layers(network, "all")
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.clone()))
        for name, layer in layers.items()
    ]
    with capture(layers) as record:
        network(images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        product = record.inputs[name] @ layer.matrix().T
        assert torch.allclose(product, layer.output_tokens(seen[name]), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 2, padding="same"),
    ],
)
def test_a_convolution_without_such_patches_is_refused(convolution) -> None:
    with pytest.raises(TeacherNotUsable, match="without convolutions"):
        select_layers(nn.Sequential(convolution), "all")


def test_a_layer_that_runs_twice_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(TeacherNotUsable, match="twice"), capture(select_layers(nn.Sequential(layer), "linear")):
        layer(layer(torch.ones(1, 3)))


def test_a_layer_that_does_not_run_is_named() -> None:
    network = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    with capture(select_layers(network, "linear")) as record:
        output = network["used"](torch.ones(2, 3))
        with pytest.raises(TeacherNotUsable, match="idle"):
            record.gradients(output.sum(1))


def test_rows_that_are_not_samples_are_refused() -> None:
    layer = nn.Linear(3, 3)
    with capture(select_layers(nn.Sequential(layer), "linear")) as record:
        output = layer(torch.ones(6, 3))  # two samples folded with three positions
        with pytest.raises(TeacherNotUsable, match="6 rows for 2 samples"):
            record.gradients(output.reshape(2, -1).sum(1))


def test_an_unknown_selection_names_the_choices(bench) -> None:
    with pytest.raises(TeacherNotUsable, match="cross_attention_kv"):
        select_layers(bench.model.unet, "everything")
