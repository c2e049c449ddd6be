"""Diagonal Fisher matrix: the approximation of the original AbU, behind the same interface as EK-FAC.

Why it exists: AbU (arXiv 2406.09408, §4 and appendix B.1) divides the query's gradient elementwise by
S = E[g^2], g the gradient of one training image's denoising loss at a random timestep and noise. It
is the baseline EK-FAC is judged against. As published it is the *empirical* Fisher: true noise as
target, no sampled output, unlike ``curvature_fit``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.curvature_fit import CurvatureFit, denoising_gradients, per_sample_chunks
from byline.teachers.layers import SELECTIONS
from byline.teachers.partial_sums import PartialSums, Sums, counting, merge, shard_draws
from byline.teachers.preconditioner import fingerprint_of, refuse_unless_included
from byline.teachers.ranking import Check, Progress, ignore_progress, never_cancelled

FILE = "diagonal.safetensors"


@dataclass(frozen=True)
class DiagonalFisher:
    """S = E[g^2] of every selected layer, [rows, columns] each; a ``Preconditioner``."""

    squares: dict[str, torch.Tensor]
    selection: str
    model_revision: str
    samples: int
    seed: int

    @property
    def name(self) -> str:
        """Stable text for a teacher id."""
        return f"diagonal-{self.selection}-{self.samples}-{self.seed}-{self.model_revision}"

    def precondition(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """g / (S + damping * mean S), per layer [..., rows, columns]."""
        return {n: g / self._damped(n, damping) for n, g in gradients.items()}

    def whiten(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """g / sqrt(S + damping * mean S), per layer [..., rows, columns]."""
        return {n: g / self._damped(n, damping).sqrt() for n, g in gradients.items()}

    def restrict(self, selection: str) -> DiagonalFisher:
        """See ``Preconditioner``."""
        refuse_unless_included("this diagonal Fisher", self.selection, selection)
        kept = {n: s for n, s in self.squares.items() if SELECTIONS[selection](n)}
        return replace(self, squares=kept, selection=selection)

    def fingerprint(self, layers: Iterable[str]) -> str:
        """See ``Preconditioner``."""
        return fingerprint_of({name: self.squares[name] for name in layers})

    def to(self, device: str) -> DiagonalFisher:
        """The same on another device."""
        return replace(self, squares={n: s.to(device) for n, s in self.squares.items()})

    def _damped(self, name: str, damping: float) -> torch.Tensor:
        if name not in self.squares:
            raise TeacherNotUsable(f"the diagonal Fisher lacks layer {name}: fit it for a selection that has it")
        damped = self.squares[name] + damping * self.squares[name].mean()
        # Undamped (as published) a weight no sample has moved has S = 0 and g = 0: 0 / 0 is meant to be 0.
        return damped.clamp_min(torch.finfo(damped.dtype).tiny)

    def save(self, directory: Path) -> None:
        """Write ``diagonal.safetensors`` and ``manifest.json`` with its digest."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({n: s.cpu().contiguous() for n, s in self.squares.items()}, directory / FILE)
        manifest = {
            "selection": self.selection, "model_revision": self.model_revision, "samples": self.samples,
            "seed": self.seed, "sha256": {FILE: _sha256(directory / FILE)},
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, model_revision: str) -> DiagonalFisher:
        """Read what ``save`` wrote. Raises TeacherNotUsable for another model or an altered file."""
        path = directory / "manifest.json"
        if not path.exists() or not (directory / FILE).exists():
            raise TeacherNotUsable(f"{directory} holds no diagonal Fisher ({FILE} with manifest.json): fit it")
        manifest = json.loads(path.read_text())
        if manifest["model_revision"] != model_revision:
            raise TeacherNotUsable(
                f"{directory} was fitted on model revision {manifest['model_revision']}, not {model_revision}: "
                "fit again"
            )
        if manifest["sha256"].get(FILE) != _sha256(directory / FILE):
            raise TeacherNotUsable(f"{directory / FILE} is not the file its manifest describes: fit again")
        squares = load_file(directory / FILE)
        return cls(squares, manifest["selection"], model_revision, manifest["samples"], manifest["seed"])


def fit_diagonal_fisher(
    model: DiffusionModel,
    latents: torch.Tensor,
    states: torch.Tensor,
    *,
    selection: str = "cross_attention_kv",
    samples: int,
    seed: int,
    batch: int = 64,
    directory: Path | None = None,
    shards: int = 1,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> DiagonalFisher:
    """Fit S on ``samples`` draws (image, timestep, noise) of the corpus ``latents`` and ``states``.

    Arguments, shards and resumption are those of ``fit_curvature``.
    """
    fit = CurvatureFit(model, latents, states, selection, samples, seed, batch, shards, directory)

    def run() -> Iterator[Sums]:
        for shard in range(shards):
            report = counting(progress, shard_draws(samples, shards, shard).start, samples)
            yield fit_diagonal_shard(fit, shard, progress=report, check=check)

    squares = {n: (s / samples).float() for n, s in merge(run()).items()}
    return DiagonalFisher(squares, selection, model.revision, samples, seed).to(model.device)


def fit_diagonal_shard(
    fit: CurvatureFit, shard: int, *, progress: Progress = ignore_progress, check: Check = never_cancelled
) -> Sums:
    """The sums of one shard: computed, or read where they are finished already."""

    def add(rows: range) -> Sums:
        inputs, deltas = denoising_gradients(fit, rows)
        sums: Sums = {}
        for name, delta in deltas.items():
            total = torch.zeros(fit.layers[name].rows, fit.layers[name].columns, device=delta.device)
            for part, tokens in per_sample_chunks(delta, inputs[name]):
                total += (part.transpose(1, 2) @ tokens).square_().sum(0)
            sums[name] = total
        return sums

    draws = shard_draws(fit.samples, fit.shards, shard)
    name = f"diagonal-{shard}-of-{fit.shards}-{fit.digest}.safetensors"
    path = None if fit.directory is None else fit.directory / name
    return PartialSums(draws, fit.batch, path, fit.every).compute(add, progress, check)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
