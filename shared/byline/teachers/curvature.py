"""EK-FAC curvature of the denoising loss for a selection of layers: the value, and its files.

Why it exists: the teacher's step is a natural-gradient step. For a layer whose per-sample gradient is
G = sum over tokens of delta a^T (FastGDA §3.1, A.3), with ``EditableLayer``'s rows and columns:

    A = E[sum a a^T] = U_A diag U_A^T,   B = E[sum delta delta^T] = U_B diag U_B^T
    S = E[(U_B^T G U_A)^2]               (corrected eigenvalues, elementwise)
    (F + damping)^-1 G = U_B [(U_B^T G U_A) / (S + damping * mean S)] U_A^T

The factors are fitted in ``curvature_fit``. Folders in the published layout, made by other programs,
are read as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from byline.errors import TeacherNotUsable
from byline.teachers.layers import SELECTIONS
from byline.teachers.preconditioner import fingerprint_of, refuse_unless_included

#: File names and keys of the layout published factor folders use (reference/method.md §3.2).
FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")


@dataclass(frozen=True)
class LayerFactors:
    """Eigenbasis of one layer: ``activation`` [columns, columns], ``gradient`` [rows, rows], ``eigenvalues``
    [rows, columns]; eigenvectors are columns."""

    activation: torch.Tensor
    gradient: torch.Tensor
    eigenvalues: torch.Tensor

    def precondition(self, gradients: torch.Tensor, damping: float) -> torch.Tensor:
        """(F + damping * mean eigenvalue)^-1 applied to gradients [..., rows, columns]."""
        rotated = self.gradient.T @ gradients @ self.activation
        return self.gradient @ (rotated / self.damped(damping)) @ self.activation.T

    def whiten(self, gradients: torch.Tensor, damping: float) -> torch.Tensor:
        """(U_B^T G U_A) / sqrt(S + damping * mean S), for gradients [..., rows, columns]."""
        return (self.gradient.T @ gradients @ self.activation) / self.damped(damping).sqrt()

    def damped(self, damping: float) -> torch.Tensor:
        """The eigenvalues with the damping added, [rows, columns]: what a rotated gradient is divided by."""
        # The floor is for directions no sample has moved, undamped: 0 / 0 is meant to be 0.
        damped = self.eigenvalues + damping * self.eigenvalues.mean()
        return damped.clamp_min(torch.finfo(damped.dtype).tiny)


@dataclass(frozen=True)
class Curvature:
    """Factors of every selected layer, and what they were fitted on; a ``Preconditioner``.

    ``origin`` is empty for factors fitted here (``samples`` and ``seed`` say how), else it names the
    files they were read from.
    """

    layers: dict[str, LayerFactors]
    selection: str
    model_revision: str
    samples: int
    seed: int
    origin: str = ""

    @property
    def name(self) -> str:
        """Stable text for a teacher id."""
        fitted = self.origin or f"{self.samples}-{self.seed}"
        return f"ekfac-{self.selection}-{fitted}-{self.model_revision}"

    @property
    def device(self) -> torch.device:
        """Where the factors are, and gradients must be."""
        return next(iter(self.layers.values())).gradient.device

    def precondition(self, gradients: dict[str, torch.Tensor], damping: float = 0.1) -> dict[str, torch.Tensor]:
        """Natural gradients: for every layer [..., rows, columns] to the same."""
        return {n: self._of(n).precondition(g, damping) for n, g in gradients.items()}

    def whiten(self, gradients: dict[str, torch.Tensor], damping: float = 0.1) -> dict[str, torch.Tensor]:
        """Coordinates in the eigenbasis over the root of the damped eigenvalues; see ``Preconditioner``."""
        return {n: self._of(n).whiten(g, damping) for n, g in gradients.items()}

    def restrict(self, selection: str) -> Curvature:
        """The factors of a smaller selection; see ``Preconditioner``.

        EK-FAC is block-diagonal, so they equal factors fitted for it from the same draws. (From
        ``all`` to ``linear`` the factors of convolutions stay, and are not asked for.)
        """
        refuse_unless_included("this curvature", self.selection, selection)
        kept = {n: f for n, f in self.layers.items() if SELECTIONS[selection](n)}
        return replace(self, layers=kept, selection=selection)

    def fingerprint(self, layers: Iterable[str]) -> str:
        """See ``Preconditioner``: of the eigenbases, which no two fits share. (Eigenvalues come back from a file
        rounded.)"""
        factors = {name: self._of(name) for name in layers}
        return fingerprint_of(
            {f"{n}/activation": f.activation for n, f in factors.items()}
            | {f"{n}/gradient": f.gradient for n, f in factors.items()}
        )

    def to(self, device: str) -> Curvature:
        """The same on another device; what layers share stays shared."""
        moved: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return moved.setdefault(id(tensor), tensor.to(device))

        layers = {
            n: LayerFactors(move(f.activation), move(f.gradient), move(f.eigenvalues)) for n, f in self.layers.items()
        }
        return replace(self, layers=layers)

    def _of(self, name: str) -> LayerFactors:
        if name not in self.layers:
            raise TeacherNotUsable(f"the curvature has no factors of layer {name}: fit it for a selection that has it")
        return self.layers[name]

    def save(self, directory: Path) -> None:
        """Write four safetensors in the published layout, and ``manifest.json`` with their digests.

        An activation factor that several layers share is written once, under the first one's name;
        the manifest's ``activation_of`` says whose a layer uses.
        """
        directory.mkdir(parents=True, exist_ok=True)
        count = torch.tensor([self.samples], dtype=torch.int64)
        owner: dict[int, str] = {}
        activation_of = {n: owner.setdefault(id(f.activation), n) for n, f in self.layers.items()}
        tensors = {
            "activation_eigenvectors": {n: self.layers[n].activation for n in owner.values()},
            "gradient_eigenvectors": {n: f.gradient for n, f in self.layers.items()},
            "lambda_matrix": {n: f.eigenvalues * self.samples for n, f in self.layers.items()},
            "num_lambda_processed": {n: count for n in self.layers},
        }
        digests = {}
        for name in FILES:
            path = directory / f"{name}.safetensors"
            save_file({k: v.cpu().clone().contiguous() for k, v in tensors[name].items()}, path)
            digests[path.name] = _sha256(path)
        manifest = {
            "selection": self.selection, "model_revision": self.model_revision,
            "samples": self.samples,
            "activation_of": activation_of, "seed": self.seed, "origin": self.origin, "sha256": digests,
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, model_revision: str, selection: str | None = None) -> Curvature:
        """Read what ``save`` wrote, or a folder in the published layout that has no manifest.

        The latter does not say what it was fitted for: the caller vouches for ``selection`` and
        ``model_revision``. Raises TeacherNotUsable for another model, an altered file or factors that
        do not fit together.
        """
        path = directory / "manifest.json"
        files = {name: directory / f"{name}.safetensors" for name in FILES}
        missing = [file.name for file in files.values() if not file.exists()]
        if missing or not (path.exists() or selection):
            wanted = missing or ["manifest.json (without it the selection must be given)"]
            raise TeacherNotUsable(f"{directory} holds no fitted curvature: {', '.join(wanted)} is missing")
        digests = {file.name: _sha256(file) for file in files.values()}
        if path.exists():
            manifest: dict[str, Any] = json.loads(path.read_text())
            _verify(directory, manifest, digests, model_revision)
        else:
            manifest = {"selection": selection, "origin": _origin(digests)}
        loaded = {name: load_file(file) for name, file in files.items()}
        activation_of = manifest.get("activation_of", {})
        layers = {n: _factors(directory, loaded, n, activation_of.get(n, n)) for n in loaded["lambda_matrix"]}
        counts = [int(count.max()) for count in loaded["num_lambda_processed"].values()]
        found = cls(
            layers, manifest["selection"], model_revision, manifest.get("samples", max(counts, default=0)),
            manifest.get("seed", 0), manifest.get("origin", ""),
        )  # fmt: skip
        return found.restrict(selection) if selection else found


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _origin(digests: dict[str, str]) -> str:
    return "files." + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


def _verify(directory: Path, manifest: dict[str, Any], digests: dict[str, str], model_revision: str) -> None:
    """Raise TeacherNotUsable unless the manifest is of this model and describes these files."""
    fitted_on = manifest["model_revision"]
    if fitted_on != model_revision:
        raise TeacherNotUsable(f"{directory} was fitted on model revision {fitted_on}, not {model_revision}: fit again")
    for name, digest in digests.items():
        if manifest["sha256"].get(name) != digest:
            raise TeacherNotUsable(f"{directory / name} is not the file its manifest describes: fit again")


def _factors(directory: Path, loaded: dict[str, dict[str, torch.Tensor]], name: str, owner: str) -> LayerFactors:
    """One layer of a folder, checked: half precision or mismatched shapes cannot be used."""
    try:
        activation, gradient = loaded["activation_eigenvectors"][owner], loaded["gradient_eigenvectors"][name]
        total, count = loaded["lambda_matrix"][name], loaded["num_lambda_processed"][name]
    except KeyError as error:
        raise TeacherNotUsable(f"{directory} lacks a factor of layer {name}: fit again") from error
    if any(t.dtype not in (torch.float32, torch.float64) for t in (activation, gradient, total)):
        raise TeacherNotUsable(f"{directory}: factors of {name} are not float32, too coarse for an inverse: fit again")
    if activation.shape != (total.shape[1],) * 2 or gradient.shape != (total.shape[0],) * 2 or count.numel() != 1:
        raise TeacherNotUsable(f"{directory}: factors of {name} do not fit together: fit again")
    # ``count`` is a scalar or of shape [1], by program.
    # float() of a float32 tensor is the tensor itself: layers of one owner keep sharing it.
    return LayerFactors(activation.float(), gradient.float(), (total / count.item()).float())
