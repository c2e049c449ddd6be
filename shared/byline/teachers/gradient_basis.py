"""A few hundred directions in which the gradients of text-fed layers are a feature: the same for query and item.

Why it exists: the first-order score is an inner product of gradients, and a student that sees a cheap gradient of the
query needs no guessing. The principal directions of the corpus's whitened gradients (found through their Gram matrix,
from the stored token gradients, without another pass over the corpus) carry it in ``dimensions`` numbers:

    feature(x) = P^T Q^T (F + damping)^-1 grad(x),    < feature(q), feature(i) > ~ tau(i) x N

with grad(x) the mean over ``draws`` fixed (timestep, noise) pairs, Q the leading ``rank`` token directions
(``TokenBasis.query_map``) and P the principal directions among these, largest first: leading columns alone are a
smaller basis. Query and item share their few draws. That they may is measured (docs/student.md): what the
draws have in common hardly moves an order, unlike in the teacher's long sums.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from byline.errors import TeacherNotUsable
from byline.teachers.curvature import Curvature
from byline.teachers.ranking import Check, Progress, ignore_progress, never_cancelled
from byline.teachers.token_gradients import TokenGradients

FORMAT = "byline-gradient-basis-1"
FOLDER = "gradient"
BASIS = "basis.safetensors"
MANIFEST = "manifest.json"
#: Items multiplied out at a time.
_CHUNK = 64


@dataclass(frozen=True)
class GradientSettings:
    """How a gradient becomes a feature. ``damping`` and ``objective`` are those of the teacher that is imitated.

    ``antithetic`` draws come in pairs (eps, -eps). The denoising loss needs them: its gradient is mostly eps times the
    network's own derivative, which would make query and item alike by their common noise alone.
    """

    objective: str
    damping: float
    draws: int = 4
    seed: int = 0
    antithetic: bool = False


@dataclass(frozen=True)
class GradientBasis:
    """``query_map`` [R, r] over the stacked rows of ``layers``; ``codes`` int8 [d, r x columns] with ``scales`` [d].

    ``spread`` [d]: the items' mean square along each direction. ``preconditioner`` names the curvature, ``fingerprint``
    is that of its factors; empty for a basis from before it was kept.
    """

    layers: tuple[str, ...]
    query_map: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    spread: torch.Tensor
    settings: GradientSettings
    selection: str
    preconditioner: str
    model_revision: str
    fingerprint: str = ""

    @property
    def dimensions(self) -> int:
        """d."""
        return self.codes.shape[0]

    @property
    def name(self) -> str:
        """Stable text: equal names, equal features."""
        digest = hashlib.sha256(json.dumps(vars(self.settings), sort_keys=True).encode())
        for tensor in (self.query_map.half(), self.codes, self.scales):
            digest.update(tensor.contiguous().numpy().tobytes())
        return f"gradient-{self.dimensions}-{self.preconditioner}-{digest.hexdigest()[:12]}"

    def directions(self) -> torch.Tensor:
        """P^T, float32 [d, r x columns]: what ``features`` multiplies by; keep it, it takes a moment to unpack."""
        return self.codes.float() * self.scales[:, None]

    def features(
        self, gradients: dict[str, torch.Tensor], curvature: Curvature, directions: torch.Tensor
    ) -> torch.Tensor:
        """[n, d] of gradients, per layer [n, rows, columns]; ``directions`` as that method gives them."""
        natural = curvature.precondition({name: gradients[name] for name in self.layers}, self.settings.damping)
        stacked = torch.cat([natural[name] for name in self.layers], dim=1)  # [n, R, columns]
        moved = (self.query_map.T.to(stacked) @ stacked).flatten(1)  # [n, r x columns]
        return functional.linear(moved, directions)

    @classmethod
    def fit(
        cls, tokens: TokenGradients, curvature: Curvature, settings: GradientSettings, *, dimensions: int = 768,
        rank: int = 128, items: int = 4096, seed: int = 0, progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> GradientBasis:  # fmt: skip
        """The leading directions of at most ``items`` items' gradients, fewer than ``dimensions`` where they span less.

        Memory: 4 x rank x columns bytes an item, twice (400 kB an item on the demo). No pass over images.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(tokens))[:items])
        tokens = tokens.take(chosen)
        basis = tokens.basis
        rank = min(rank, basis.rank)
        query_map = basis.query_map[:, :rank].contiguous().to(curvature.device)
        sizes = [curvature.layers[name].gradient.shape[0] for name in basis.layers]
        plain, moved = [], []
        for start in range(0, len(tokens), _CHUNK):
            check()
            z = _multiplied_out(tokens, slice(start, start + _CHUNK), rank).to(curvature.device)  # [n, r, columns]
            gradients = (query_map @ z).split(sizes, dim=1)  # dual maps: the item's gradient within these directions
            natural = curvature.precondition(
                {n: g.contiguous() for n, g in zip(basis.layers, gradients, strict=True)}, settings.damping
            )
            stacked = torch.cat([natural[name] for name in basis.layers], dim=1)
            # All items' are held at once: in the memory that there is more of.
            plain.append(z.flatten(1).cpu())
            moved.append((query_map.T @ stacked).flatten(1).cpu())
            progress(min(start + _CHUNK, len(tokens)), len(tokens))
        rows, images = torch.cat(plain), torch.cat(moved)
        gram = torch.cat([(part @ rows.T).double() for part in images.split(256)])
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        spanned = int((values > 1e-7 * values[0]).sum())
        kept = max(1, min(dimensions, spanned))
        scaled = (vectors[:, :kept] / values[:kept].sqrt()).float()
        directions = torch.cat([scaled.T @ part for part in rows.split(4096, dim=1)], dim=1)  # [d, r x columns]
        scales = directions.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        codes = (directions / scales[:, None]).round().to(torch.int8)
        return cls(
            basis.layers, query_map.cpu(), codes, scales, (values[:kept] / len(tokens)).float(), settings,
            curvature.selection, curvature.name, curvature.model_revision, curvature.fingerprint(basis.layers),
        )  # fmt: skip

    def save(self, directory: Path, fidelity: dict[str, float]) -> None:
        """Write ``basis.safetensors`` and ``manifest.json``; ``fidelity`` as measured by whoever fitted."""
        directory.mkdir(parents=True, exist_ok=True)
        facts = {
            "layers": list(self.layers), "settings": vars(self.settings), "selection": self.selection,
            "preconditioner": self.preconditioner, "model_revision": self.model_revision,
        }  # fmt: skip
        tensors = {name: getattr(self, name) for name in ("codes", "scales", "spread")}
        tensors["query_map"] = self.query_map.half()
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, directory / BASIS,
            {"format": FORMAT, "facts": json.dumps(facts, sort_keys=True)},
        )  # fmt: skip
        manifest = {
            **facts, "dimensions": self.dimensions, "name": self.name, "fidelity": fidelity,
            "fingerprint": self.fingerprint,
            "sha256": {BASIS: _sha256(directory / BASIS)},
        }  # fmt: skip
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, model_revision: str) -> GradientBasis:
        """Read what ``save`` wrote. Raises TeacherNotUsable for another model's basis or a damaged file."""
        path = directory / BASIS
        try:
            manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
            if manifest["sha256"][BASIS] != _sha256(path):
                raise TeacherNotUsable(f"{path} is not the file its manifest describes: fit the sketches again")
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TeacherNotUsable(f"{path} is no gradient basis of this version: fit the sketches again")
                facts = json.loads(metadata["facts"])
                held = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise TeacherNotUsable(f"{directory} holds no usable gradient basis: {error}; fit again") from error
        if facts["model_revision"] != model_revision:
            raise TeacherNotUsable(
                f"{path} was fitted on model revision {facts['model_revision']}, not {model_revision}: fit again"
            )
        return cls(
            tuple(facts["layers"]), held["query_map"].float(), held["codes"], held["scales"], held["spread"],
            GradientSettings(**facts["settings"]), facts["selection"], facts["preconditioner"], model_revision,
            manifest.get("fingerprint", ""),
        )  # fmt: skip


def item_features(basis: GradientBasis, tokens: TokenGradients, curvature: Curvature) -> NDArray[np.float32]:
    """[n, d] of items from their stored token gradients, which are means of many draws; to judge the cheap ones by."""
    rank, device = basis.query_map.shape[1], curvature.device
    query_map, directions = basis.query_map.to(device), basis.directions().to(device)
    sizes = [curvature.layers[name].gradient.shape[0] for name in basis.layers]
    found = []
    for start in range(0, len(tokens), _CHUNK):
        z = _multiplied_out(tokens, slice(start, start + _CHUNK), rank).to(device)
        parts = (query_map @ z).split(sizes, dim=1)
        gradients = {name: part.contiguous() for name, part in zip(basis.layers, parts, strict=True)}
        found.append(basis.features(gradients, curvature, directions).cpu().numpy())
    return np.concatenate(found)


def _multiplied_out(tokens: TokenGradients, place: slice, rank: int) -> torch.Tensor:
    """Gradients of the items at ``place`` in the leading ``rank`` token directions, [n, r, columns]."""
    text = tokens.text[place]
    states = tokens.states[text].float() * tokens.state_scales[text][:, :, None]
    codes = tokens.codes[place, :, :rank].float() * tokens.scales[place][:, :, None]
    return torch.bmm(codes.transpose(1, 2), states)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
