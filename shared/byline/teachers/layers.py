"""Which weights the teacher edits, and their per-sample gradients without per-sample backward passes.

Why it exists: all teachers restrict the unlearning step to a selection of layers (as published: the
key and value projections of cross-attention) and need, for every sample of a batch, the gradient of
that sample's loss with respect to them. A layer's gradient is the sum over its tokens of
(output gradient) x (input)^T, so it is enough to catch both; nothing of size weights x batch is
made before the caller wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from byline.errors import TeacherNotUsable

#: name of a selection -> predicate on a Linear layer's module name. ``attn2`` is cross-attention;
#: without it a filter on to_k and to_v would catch self-attention as well.
SELECTIONS: dict[str, Callable[[str], bool]] = {
    "cross_attention_kv": lambda name: ".attn2." in name and name.endswith((".to_k", ".to_v")),
    "cross_attention": lambda name: ".attn2." in name,
    "attention": lambda name: ".attn1." in name or ".attn2." in name,
    "linear": lambda _name: True,
}


def select_layers(network: torch.nn.Module, selection: str) -> dict[str, torch.nn.Linear]:
    """Linear layers of ``network`` in a named selection, by module name.

    Raises TeacherNotUsable when the selection is unknown or empty.
    """
    if selection not in SELECTIONS:
        raise TeacherNotUsable(f"layer selection {selection!r} is unknown; choose one of {sorted(SELECTIONS)}")
    chosen = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and SELECTIONS[selection](name)
    }
    if not chosen:
        raise TeacherNotUsable(f"the network has no layer in the selection {selection!r}")
    return chosen


@dataclass
class Capture:
    """Inputs and output gradients of the captured layers of the last forward pass.

    ``inputs[name]``: [batch, tokens, in]; ``gradients(losses)[name]``: [batch, tokens, out].
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    _leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    def gradients(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """d losses[i] / d output of sample i, for every layer; losses [batch] must be per sample."""
        names = list(self._leaves)
        found = torch.autograd.grad(losses.sum(), [self._leaves[n] for n in names])
        return {n: _as_tokens(g) for n, g in zip(names, found, strict=True)}


@contextmanager
def capture(layers: dict[str, torch.nn.Linear]) -> Iterator[Capture]:
    """Record inputs and make output gradients available while the context is open.

    A zero that requires grad is added to each output, so no weight needs a gradient and the graph
    starts at the first captured layer.
    """
    record = Capture()
    handles = []

    def hook_for(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            leaf = torch.zeros_like(output, requires_grad=True)
            record.inputs[name] = _as_tokens(inputs[0].detach())
            record._leaves[name] = leaf
            return output + leaf

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(hook_for(name)))
        with torch.enable_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()


def _as_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, features] or [batch, ..., features] as [batch, tokens, features]."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def weight_gradients(
    inputs: dict[str, torch.Tensor], output_gradients: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Per-sample weight gradients [batch, out, in] = sum over tokens of delta a^T, for every layer."""
    return {n: torch.einsum("bto,bti->boi", output_gradients[n], inputs[n]) for n in output_gradients}
