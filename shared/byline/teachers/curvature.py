"""EK-FAC curvature of the denoising loss for a selection of Linear layers.

Why it exists: the teacher's step is a natural-gradient step, and no public code fits the factors it
needs. For a layer whose per-sample gradient is G = sum over tokens of delta a^T (FastGDA §3.1, A.3):

    A = E[sum a a^T] = U_A diag U_A^T,   B = E[sum delta delta^T] = U_B diag U_B^T
    S = E[(U_B^T G U_A)^2]               (corrected eigenvalues, elementwise)
    (F + damping)^-1 G = U_B [(U_B^T G U_A) / (S + 0.1 mean S)] U_A^T

F is the Fisher (Gauss-Newton) matrix of the per-image *mean* squared error: output gradients are
sampled as sqrt(2 / D) xi with xi standard normal, whose second moment is the loss's exact Hessian
2 / D in the D outputs. With it a step of 1 / N means "one sample's worth" (measured, C7.4).

K and V projections of cross-attention all read the same text states, so their A is one matrix: it
is fitted and decomposed once and shared (reference/method.md §3.5).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.layers import SELECTIONS, capture, select_layers, weight_gradients
from byline.teachers.noise import NoiseScheme
from byline.teachers.preconditioner import refuse_unless_included
from byline.teachers.ranking import Progress, ignore_progress

#: File names and keys of the layout published factor folders use (reference/method.md §3.2).
FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")


@dataclass(frozen=True)
class LayerFactors:
    """Eigenbasis of one layer: ``activation`` [in, in], ``gradient`` [out, out], ``eigenvalues`` [out, in]."""

    activation: torch.Tensor
    gradient: torch.Tensor
    eigenvalues: torch.Tensor

    def precondition(self, gradients: torch.Tensor, damping: float) -> torch.Tensor:
        """(F + damping * mean eigenvalue)^-1 applied to gradients [..., out, in]."""
        rotated = self.gradient.T @ gradients @ self.activation
        return self.gradient @ (rotated / (self.eigenvalues + damping * self.eigenvalues.mean())) @ self.activation.T


    def whiten(self, gradients: torch.Tensor, damping: float) -> torch.Tensor:
        """(U_B^T G U_A) / sqrt(S + damping * mean S), for gradients [..., out, in]."""
        rotated = self.gradient.T @ gradients @ self.activation
        return rotated / (self.eigenvalues + damping * self.eigenvalues.mean()).sqrt()


@dataclass(frozen=True)
class Curvature:
    """Factors of every selected layer, and what they were fitted on."""

    layers: dict[str, LayerFactors]
    selection: str
    model_revision: str
    samples: int
    seed: int

    @property
    def name(self) -> str:
        """Stable text for a teacher id."""
        return f"ekfac-{self.selection}-{self.samples}-{self.seed}-{self.model_revision}"

    def precondition(self, gradients: dict[str, torch.Tensor], damping: float = 0.1) -> dict[str, torch.Tensor]:
        """Natural gradients: for every layer [..., out, in] to [..., out, in]."""
        return {n: self.layers[n].precondition(g, damping) for n, g in gradients.items()}

    def whiten(self, gradients: dict[str, torch.Tensor], damping: float = 0.1) -> dict[str, torch.Tensor]:
        """Coordinates in the eigenbasis over the root of the damped eigenvalues; see ``Preconditioner``."""
        return {n: self.layers[n].whiten(g, damping) for n, g in gradients.items()}

    def restrict(self, selection: str) -> Curvature:
        """The factors of a smaller selection; see ``Preconditioner``. EK-FAC is block-diagonal by layer."""
        refuse_unless_included("this curvature", self.selection, selection)
        kept = {n: f for n, f in self.layers.items() if SELECTIONS[selection](n)}
        return replace(self, layers=kept, selection=selection)

    def save(self, directory: Path) -> None:
        """Write four safetensors in the published layout, and ``manifest.json`` with their digests.

        An activation factor that several layers share is written once, under the first one's name;
        the manifest's ``activation_of`` says whose a layer uses.
        """
        directory.mkdir(parents=True, exist_ok=True)
        count = torch.tensor([self.samples], dtype=torch.int64)
        activation_of = {
            n: next(m for m, g in self.layers.items() if g.activation is f.activation) for n, f in self.layers.items()
        }
        tensors = {
            "activation_eigenvectors": {n: self.layers[n].activation for n in dict.fromkeys(activation_of.values())},
            "gradient_eigenvectors": {n: f.gradient for n, f in self.layers.items()},
            "lambda_matrix": {n: f.eigenvalues * self.samples for n, f in self.layers.items()},
            "num_lambda_processed": {n: count for n in self.layers},
        }
        digests = {}
        for name in FILES:
            path = directory / f"{name}.safetensors"
            save_file({k: v.clone().contiguous() for k, v in tensors[name].items()}, path)
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = {
            "selection": self.selection, "model_revision": self.model_revision,
            "samples": self.samples,
            "activation_of": activation_of, "seed": self.seed, "sha256": digests,
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, model_revision: str) -> Curvature:
        """Read what ``save`` wrote. Raises TeacherNotUsable for another model or an altered file."""
        path = directory / "manifest.json"
        if not path.exists():
            raise TeacherNotUsable(f"{directory} holds no fitted curvature (manifest.json is missing)")
        manifest = json.loads(path.read_text())
        if manifest["model_revision"] != model_revision:
            raise TeacherNotUsable(
                f"{directory} was fitted on model revision {manifest['model_revision']}, not {model_revision}: "
                "fit again"
            )
        loaded = {}
        for name in FILES:
            file = directory / f"{name}.safetensors"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if digest != manifest["sha256"][file.name]:
                raise TeacherNotUsable(f"{file} is not the file its manifest describes: fit again")
            loaded[name] = load_file(file)
        layers = {
            n: LayerFactors(
                loaded["activation_eigenvectors"][manifest.get("activation_of", {}).get(n, n)],
                loaded["gradient_eigenvectors"][n],
                loaded["lambda_matrix"][n] / loaded["num_lambda_processed"][n].item(),
            )
            for n in loaded["lambda_matrix"]
        }
        return cls(layers, manifest["selection"], model_revision, manifest["samples"], manifest["seed"])


def eigenvectors(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix, computed in float64 (as float32 they are not orthogonal enough)."""
    symmetric = (covariance + covariance.T).double() / 2
    vectors: torch.Tensor = torch.linalg.eigh(symmetric).eigenvectors.float()
    return vectors


def fit_curvature(
    model: DiffusionModel,
    latents: torch.Tensor,
    states: torch.Tensor,
    *,
    selection: str = "cross_attention_kv",
    samples: int,
    seed: int,
    batch: int = 64,
    progress: Progress = ignore_progress,
) -> Curvature:
    """Fit the factors on ``samples`` (image, timestep, noise) draws from the corpus.

    ``latents`` [n, c, h, w] and ``states`` [n, tokens, dim] are the corpus; image s mod n is used by
    draw s, in an order given by ``seed``. Two passes over the same draws: covariances, eigenvalues.
    """
    layers = select_layers(model.unet, selection)
    scheme = NoiseScheme("item", seed, samples, 1)
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    outputs = latents[0].numel()

    def passes(visit: Callable[[Mapping[str, torch.Tensor], dict[str, torch.Tensor]], None], offset: int) -> None:
        for start in range(0, samples, batch):
            rows = [s for s in range(start, min(start + batch, samples))]
            chosen = order[torch.tensor(rows) % len(latents)]
            drawn = [_draw(scheme, s, samples, model) for s in rows]
            timesteps = torch.tensor([d[0] for d in drawn], device=model.device)
            noise = torch.stack([d[1] for d in drawn]).to(model.device)
            xi = torch.stack([d[2] for d in drawn]).to(model.device)
            noisy = model.add_noise(latents[chosen], noise, timesteps)
            with capture(layers) as record:
                output = model.predict(noisy, timesteps, states[chosen])
                sampled = (output * xi * (2 / outputs) ** 0.5).flatten(1).sum(1)
                visit(record.inputs, record.gradients(sampled))
            progress(offset + rows[-1] + 1, 2 * samples)

    activation: dict[str, torch.Tensor] = {}
    gradient: dict[str, torch.Tensor] = {}
    same_input: dict[str, str] = {}

    def add_covariances(inputs: Mapping[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> None:
        if not same_input:
            same_input.update(_first_with_same_input(inputs))
        for name, delta in deltas.items():
            flat = delta.flatten(0, 1)
            gradient[name] = gradient.get(name, 0) + flat.T @ flat / samples
            if same_input[name] == name:
                flat = inputs[name].flatten(0, 1)
                activation[name] = activation.get(name, 0) + flat.T @ flat / samples

    passes(add_covariances, 0)
    shared = {name: eigenvectors(covariance) for name, covariance in activation.items()}
    bases = {n: (shared[same_input[n]], eigenvectors(gradient[n])) for n in layers}
    eigenvalues = {n: torch.zeros(b.shape[0], a.shape[0], device=model.device) for n, (a, b) in bases.items()}

    def add_eigenvalues(inputs: Mapping[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> None:
        rotated_inputs = {n: inputs[n] @ bases[n][0] for n in deltas}
        rotated_deltas = {n: deltas[n] @ bases[n][1] for n in deltas}
        for name, g in weight_gradients(rotated_inputs, rotated_deltas).items():
            eigenvalues[name] += g.pow(2).sum(0) / samples

    passes(add_eigenvalues, samples)
    factors = {n: LayerFactors(bases[n][0], bases[n][1], eigenvalues[n]) for n in layers}
    return Curvature(factors, selection, model.revision, samples, seed)


def _draw(
    scheme: NoiseScheme, index: int, samples: int, model: DiffusionModel
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Timestep, noise and output cotangent of one fitting draw.

    Draw indices are spread over the timestep strata by a multiplicative step, since consecutive
    draws otherwise share a timestep, and with it an epoch would see each image at one noise level.
    """
    stratum = (index * _coprime(samples)) % samples
    timesteps, pair = scheme.draw("curvature", [stratum], (2, *model.latent_shape), model.num_timesteps)
    return int(timesteps[0]), pair[0, 0], pair[0, 1]


def _coprime(n: int) -> int:
    """A step near the golden section of n that visits every residue."""
    step = max(1, int(n * 0.618))
    while math.gcd(step, n) != 1:
        step += 1
    return step


def _first_with_same_input(inputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each layer the first layer that read the very same tensor values in this pass."""
    first: dict[str, str] = {}
    for name, value in inputs.items():
        twin = next(
            (other for other in dict.fromkeys(first.values())
             if inputs[other].shape == value.shape and torch.equal(inputs[other], value)),
            name,
        )  # fmt: skip
        first[name] = twin
    return first
