"""Which weights the teacher edits, and their per-sample gradients without per-sample backward passes.

Why it exists: every teacher restricts the unlearning step to a selection of layers (as published: the
key and value projections of cross-attention) and needs, for every sample of a batch, the gradient of
that sample's loss with respect to them. A layer's gradient is the sum over its tokens of
(output gradient) x (input)^T, so it is enough to catch both; nothing of size weights x batch is made
before the caller wants it. A convolution is a Linear layer over patches, a bias one more input that
is always 1, so both kinds are one matrix [rows, columns] to everything above this module.

Parameters of normalisations (GroupNorm, LayerNorm) and embedding tables are outside every selection:
they have no Kronecker form, and are 0.4 % of a UNet's parameters (reference/measured.md C7.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from byline.errors import TeacherNotUsable

#: name of a selection -> predicate on a Linear layer's module name, each holding the one before it.
#: ``attn2`` is cross-attention; without it a filter on to_k and to_v would catch self-attention too.
#: ``all`` adds the convolutions.
SELECTIONS: dict[str, Callable[[str], bool]] = {
    "cross_attention_kv": lambda name: ".attn2." in name and name.endswith((".to_k", ".to_v")),
    "cross_attention": lambda name: ".attn2." in name,
    "attention": lambda name: ".attn1." in name or ".attn2." in name,
    "linear": lambda _name: True,
    "all": lambda _name: True,
}


@dataclass(frozen=True)
class EditableLayer:
    """A Linear or an ungrouped Conv2d whose weights the teacher edits, as one matrix.

    ``rows``: outputs; ``columns``: inputs x kernel height x kernel width, + 1 when there is a bias
    (the last column).
    """

    name: str
    module: nn.Linear | nn.Conv2d
    rows: int
    columns: int

    @classmethod
    def of(cls, name: str, module: nn.Linear | nn.Conv2d) -> EditableLayer:
        """Raises TeacherNotUsable for a convolution whose patches this module cannot make."""
        if isinstance(module, nn.Conv2d):
            if module.groups != 1:
                raise TeacherNotUsable(
                    f"{name} is a convolution in {module.groups} groups, which has no single factor; "
                    "choose a selection without convolutions"
                )
            if module.padding_mode != "zeros" or module.padding == "same":
                raise TeacherNotUsable(
                    f"{name} pads by {module.padding_mode!r} ({module.padding!r}); only explicit zero padding is "
                    "supported: choose a selection without convolutions"
                )
        columns = module.weight[0].numel() + (module.bias is not None)
        return cls(name, module, module.weight.shape[0], columns)

    @property
    def reads_text(self) -> bool:
        """Whether the layer reads nothing but the text states: its input is the same for every draw."""
        return SELECTIONS["cross_attention_kv"](self.name)

    def matrix(self) -> torch.Tensor:
        """The weights now, [rows, columns]; bias last."""
        weight = self.module.weight.flatten(1)
        return weight if self.module.bias is None else torch.cat([weight, self.module.bias[:, None]], dim=1)

    def parameters(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """A matrix [rows, columns] as the module's parameters, by full name and in their own shape."""
        shape = self.module.weight.shape
        if self.module.bias is None:
            return {f"{self.name}.weight": matrix.reshape(shape)}
        return {f"{self.name}.weight": matrix[:, :-1].reshape(shape), f"{self.name}.bias": matrix[:, -1]}

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """An input of the module as [batch, tokens, columns]: patches, and the bias's ones."""
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            padding = 0 if isinstance(conv.padding, str) else conv.padding
            if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and padding in (0, (0, 0)):
                tokens = features.flatten(2).transpose(1, 2)
            else:
                patches = functional.unfold(features, conv.kernel_size, conv.dilation, padding, conv.stride)
                tokens = patches.transpose(1, 2)  # [batch, positions, in * kh * kw]
        else:
            tokens = features.reshape(features.shape[0], -1, features.shape[-1])
        if self.module.bias is None:
            return tokens
        return torch.cat([tokens, tokens.new_ones(*tokens.shape[:2], 1)], dim=2)

    def output_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """An output of the module, or its gradient, as [batch, tokens, rows]."""
        if isinstance(self.module, nn.Conv2d):
            return output.flatten(2).transpose(1, 2)
        return output.reshape(output.shape[0], -1, output.shape[-1])


def select_layers(network: nn.Module, selection: str) -> dict[str, EditableLayer]:
    """Layers of ``network`` in a named selection, by module name and in the network's order.

    Raises TeacherNotUsable when the selection is unknown or empty, or has a layer that cannot be edited.
    """
    if selection not in SELECTIONS:
        raise TeacherNotUsable(f"layer selection {selection!r} is unknown; choose one of {sorted(SELECTIONS)}")
    kinds = (nn.Linear, nn.Conv2d) if selection == "all" else (nn.Linear,)
    chosen = {
        name: EditableLayer.of(name, module)
        for name, module in network.named_modules()
        if isinstance(module, kinds) and SELECTIONS[selection](name)
    }
    if not chosen:
        raise TeacherNotUsable(f"the network has no layer in the selection {selection!r}")
    return chosen


def includes(outer: str, inner: str) -> bool:
    """Whether selection ``outer`` has every layer of ``inner``, in any network."""
    order = list(SELECTIONS)
    return outer in order and inner in order and order.index(inner) <= order.index(outer)


class CapturedInputs(Mapping[str, torch.Tensor]):
    """Inputs of the captured layers, [batch, tokens, columns] each; made anew on every access.

    Patches of a 3 x 3 convolution are nine times its input: they live only while the caller holds them.
    """

    def __init__(self, layers: Mapping[str, EditableLayer]) -> None:
        """Empty until the forward pass has run."""
        self._layers = layers
        self._raw: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """[batch, tokens, columns]."""
        return self._layers[name].tokens(self._raw[name])

    def __iter__(self) -> Iterator[str]:
        """Names, in the order the layers ran."""
        return iter(self._raw)

    def __len__(self) -> int:
        """How many layers ran."""
        return len(self._raw)


class Capture:
    """Inputs and output gradients of the captured layers in one forward pass."""

    def __init__(self, layers: Mapping[str, EditableLayer]) -> None:
        """Filled by the hooks of ``capture``."""
        self.inputs = CapturedInputs(layers)
        self._layers = layers
        self._leaves: dict[str, torch.Tensor] = {}

    def gradients(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """d losses[i] / d output of sample i, [batch, tokens, rows] for every layer, in the order they ran.

        ``losses`` [batch] must be per sample: loss i a function of sample i only. Raises
        TeacherNotUsable when a layer did not run or does not see one row per sample.
        """
        for name in self._layers:
            if name not in self._leaves:
                raise TeacherNotUsable(f"{name} takes no part in the forward pass: choose a selection without it")
            if self._leaves[name].shape[0] != losses.shape[0]:
                raise TeacherNotUsable(
                    f"{name} saw {self._leaves[name].shape[0]} rows for {losses.shape[0]} samples, so its gradients "
                    "cannot be told apart by sample: choose a selection without it"
                )
        found = torch.autograd.grad(losses.sum(), list(self._leaves.values()))
        return {n: self._layers[n].output_tokens(g) for n, g in zip(self._leaves, found, strict=True)}

    def _add(self, name: str, features: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if name in self._leaves:
            raise TeacherNotUsable(
                f"{name} ran twice within one capture: either two forward passes were made, or the network uses the "
                "layer twice, which needs a selection without it"
            )
        leaf = torch.zeros_like(output, requires_grad=True)
        self.inputs._raw[name] = features.detach()
        self._leaves[name] = leaf
        return output + leaf


@contextmanager
def capture(layers: Mapping[str, EditableLayer]) -> Iterator[Capture]:
    """Record inputs and make output gradients available; make exactly one forward pass inside.

    A zero that requires grad is added to each output, so no weight needs a gradient and the graph
    starts at the first captured layer. A layer that runs twice is refused (TeacherNotUsable).
    """
    record = Capture(layers)
    handles = []

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return record._add(name, inputs[0], output)

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.module.register_forward_hook(hook_for(name)))
        with torch.enable_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()


def weight_gradients(
    inputs: Mapping[str, torch.Tensor], output_gradients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Per-sample weight gradients [batch, rows, columns] = sum over tokens of delta a^T, for every layer."""
    return {n: torch.einsum("bto,bti->boi", output_gradients[n], inputs[n]) for n in output_gradients}
