"""Items' gradients of text-fed layers, kept so small that a query meets all of them exactly, or nearly so.

Why it exists: a few hundred principal directions do not hold the gradients of a corpus whose captions all differ: on
the demo, 768 of them reach mAP(100) 0.68 against the full first-order ranking (docs/teacher.md). But the gradient of a
K or V projection is a sum over the caption's tokens of (output gradient) x (text state), and the text states are the
same for every layer and draw. So an item is its tokens' output gradients over all layers, here in r directions and
eight bits, and

    tau(item) = sum over tokens t of < code_t, M a_t > / N,    M = (directions)^T (F + damping)^-1 grad L(query)

is the first-order score itself. It costs r x (text width) products a token, 0.15 ms an item on one core (2,509 items of
the demo in 0.36 s): a scan for corpora of some thousands, the re-ranking of a shortlist by sketches beyond.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from byline.errors import TeacherNotUsable
from byline.teachers.curvature import Curvature
from byline.teachers.item_gradients import GradientBlock

FORMAT = "byline-token-gradients-1"
TOKENS = "tokens.safetensors"
#: Captions whose text states are multiplied out at a time.
_TEXTS = 256


@dataclass(frozen=True)
class TokenBasis:
    """``directions`` of the output gradients of ``layers``, stacked in order, R rows in all.

    ``item_map`` and ``query_map`` [R, r]: an item's stacked output gradients times the first, a query's
    stacked natural gradient under the second. They are dual, so that inner products survive, and made
    in coordinates in which the natural gradient is about isotropic: what it amplifies must not be cut.
    """

    layers: tuple[str, ...]
    item_map: torch.Tensor
    query_map: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.item_map.shape[1]

    @classmethod
    def fit(
        cls, curvature: Curvature, layers: Sequence[str], deltas: Iterable[torch.Tensor], rank: int, damping: float
    ) -> TokenBasis:
        """The leading ``rank`` directions of stacked output gradients, ``deltas`` [tokens, R] part by part."""
        into, back = [], []
        for name in layers:
            factors = curvature.layers[name]
            spread, vectors = factors.eigenvalues.mean(1).cpu(), factors.gradient.cpu()
            weight = (spread + damping * spread.mean()).rsqrt()
            into.append(vectors * weight)  # [rows, rows]
            back.append(vectors / weight)
        sizes = [len(m) for m in into]
        gram = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
        for part in deltas:
            white = torch.cat([d @ m for d, m in zip(part.split(sizes, dim=1), into, strict=True)], dim=1)
            gram += (white.T @ white).double()
        _, principal = torch.linalg.eigh(gram)
        leading = principal.flip(1)[:, :rank].float()
        parts = leading.split(sizes)
        item_map = torch.cat([m @ part for m, part in zip(into, parts, strict=True)])
        query_map = torch.cat([m @ part for m, part in zip(back, parts, strict=True)])
        # As they will be read back: what is encoded with them must be what is decoded with them.
        return cls(tuple(layers), item_map.half().float(), query_map.half().float())

    def directions(self, natural: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        """M [k, r, columns] of natural gradients, per layer [k, rows, columns]."""
        stacked = torch.cat([natural[name] for name in self.layers], dim=1)
        found: NDArray[np.float32] = (self.query_map.T.to(stacked) @ stacked).float().cpu().numpy()
        return found


@dataclass(frozen=True)
class TokenGradients:
    """``codes`` int8 [n, tokens, r] with ``scales`` [n, tokens]; ``states`` int8 [captions, tokens, columns] with
    ``state_scales`` [captions, tokens]; ``text`` int64 [n], the caption of an item; ``item_ids`` int64 [n]."""

    basis: TokenBasis
    item_ids: NDArray[np.int64]
    codes: torch.Tensor
    scales: torch.Tensor
    text: NDArray[np.int64]
    states: torch.Tensor
    state_scales: torch.Tensor

    @classmethod
    def encode(
        cls, basis: TokenBasis, item_ids: NDArray[np.int64], deltas: torch.Tensor,
        captions: Sequence[str], encode_prompts: Callable[[list[str]], torch.Tensor],
    ) -> TokenGradients:  # fmt: skip
        """From stacked output gradients ``deltas`` [n, tokens, R] of items with ``captions`` [n].

        ``encode_prompts`` gives text states [k, tokens, columns]; each distinct caption is encoded once.
        """
        codes, scales = [], []
        for part in deltas.split(256):
            values = part.float().cpu() @ basis.item_map
            scale = values.abs().amax(2).clamp_min(torch.finfo(torch.float32).tiny) / 127
            codes.append((values / scale[:, :, None]).round().to(torch.int8))
            scales.append(scale)
        first: dict[str, int] = {}
        text = np.array([first.setdefault(caption, len(first)) for caption in captions], dtype=np.int64)
        distinct = list(first)
        states, state_scales = [], []
        for start in range(0, len(distinct), _TEXTS):
            found = encode_prompts(distinct[start : start + _TEXTS]).float().cpu()
            scale = found.abs().amax(2).clamp_min(torch.finfo(torch.float32).tiny) / 127
            states.append((found / scale[:, :, None]).round().to(torch.int8))
            state_scales.append(scale)
        return cls(
            basis, item_ids, torch.cat(codes), torch.cat(scales), text, torch.cat(states), torch.cat(state_scales)
        )

    def __len__(self) -> int:
        """n."""
        return len(self.item_ids)

    def scores(self, directions: NDArray[np.float32], rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """tau x N of the items at ``rows`` (default all) for every M of ``directions`` [k, r, columns]: [k, m].

        Higher = more influential. A score does not depend on which other items are asked about.
        """
        wanted = np.arange(len(self)) if rows is None else rows
        found = np.zeros((len(directions), len(wanted)), dtype=np.float32)
        order = np.argsort(self.text[wanted], kind="stable")
        texts = np.unique(self.text[wanted])
        for start in range(0, len(texts), _TEXTS):
            some = texts[start : start + _TEXTS]
            states = self.states[some].float() * self.state_scales[some][:, :, None]
            low, high = np.searchsorted(self.text[wanted][order], [some[0], some[-1] + 1])
            places = order[low:high]
            codes = self.codes[wanted[places]].float()  # [m, tokens, r]
            of = np.searchsorted(some, self.text[wanted[places]])
            scale = self.scales[wanted[places]]
            for number, direction in enumerate(directions):
                moved = states @ torch.from_numpy(direction).T  # [captions, tokens, r]
                found[number, places] = ((codes * moved[of]).sum(2) * scale).sum(1).numpy()
        return found

    def take(self, rows: NDArray[np.int64]) -> TokenGradients:
        """The items at ``rows``, in that order, with the captions they need."""
        kept, text = np.unique(self.text[rows], return_inverse=True)
        return replace(
            self, item_ids=self.item_ids[rows], codes=self.codes[rows], scales=self.scales[rows],
            text=text.astype(np.int64), states=self.states[kept], state_scales=self.state_scales[kept],
        )  # fmt: skip

    def joined(self, other: TokenGradients) -> TokenGradients:
        """These items and ``other`` ones of the same basis."""
        return replace(
            self, item_ids=np.concatenate([self.item_ids, other.item_ids]),
            codes=torch.cat([self.codes, other.codes]), scales=torch.cat([self.scales, other.scales]),
            text=np.concatenate([self.text, other.text + len(self.states)]),
            states=torch.cat([self.states, other.states]),
            state_scales=torch.cat([self.state_scales, other.state_scales]),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {
            "item_ids": torch.from_numpy(self.item_ids.copy()), "codes": self.codes, "scales": self.scales,
            "text": torch.from_numpy(self.text.copy()), "states": self.states, "state_scales": self.state_scales,
            "item_map": self.basis.item_map.half(), "query_map": self.basis.query_map.half(),
        }  # fmt: skip
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, path,
            {"format": FORMAT, "layers": json.dumps(self.basis.layers)},
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> TokenGradients:
        """Read what ``save`` wrote. Raises TeacherNotUsable for a missing, damaged or older file."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TeacherNotUsable(f"{path} holds no token gradients of this version: fit the sketches again")
                held = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise TeacherNotUsable(f"{path} cannot be read as token gradients: {error}; fit again") from error
        layers = tuple(json.loads(metadata["layers"]))
        basis = TokenBasis(layers, held["item_map"].float(), held["query_map"].float())
        return cls(
            basis, held["item_ids"].numpy(), held["codes"], held["scales"], held["text"].numpy(), held["states"],
            held["state_scales"],
        )  # fmt: skip


def stacked_deltas(blocks: Sequence[GradientBlock]) -> torch.Tensor:
    """Output gradients of the items of ``blocks`` (one per orientation), mean over replicates, [n, tokens, R].

    Raises TeacherNotUsable unless every layer reads the text alone, and the same text.
    """
    return sum((block.token_gradients() for block in blocks[1:]), blocks[0].token_gradients()) / len(blocks)
