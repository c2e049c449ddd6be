"""The sketches of a corpus as a directory: basis, one short vector per item, and what they are worth.

Why it exists: sketches travel, with the model, into releases, to other machines. Whoever loads them must know
which model and settings they are of, that no byte was lost, and how near their ranking comes to the full one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from byline.errors import TeacherNotUsable
from byline.teachers.sketch_basis import BASIS, SketchBasis
from byline.teachers.token_gradients import TOKENS, TokenGradients

MANIFEST = "manifest.json"
SKETCHES = "sketches.safetensors"


@dataclass(frozen=True)
class SketchSet:
    """``item_ids`` int64 [n], ``sketches`` float32 [n, d] in ``basis``, and their ``fidelity``.

    ``fidelity`` against the full first-order ranking of the same draws: ``map20``, ``map100``, ``spearman``,
    ``queries``, ``draws`` of each query, ``dimensions``, ``coordinates``, ``bits``, ``items``, ``basis_items``;
    NaN for what was not measured.
    """

    basis: SketchBasis
    item_ids: NDArray[np.int64]
    sketches: NDArray[np.float32]
    fidelity: dict[str, float]
    teacher_id: str
    tokens: TokenGradients | None = None

    def rows_of(self, item_ids: Sequence[int]) -> NDArray[np.int64]:
        """The row of each item, -1 for items that have no sketch."""
        place = {int(item_id): row for row, item_id in enumerate(self.item_ids)}
        return np.array([place.get(int(item_id), -1) for item_id in item_ids], dtype=np.int64)

    def with_items(
        self, item_ids: Sequence[int], sketches: NDArray[np.float32], tokens: TokenGradients | None = None
    ) -> SketchSet:
        """A set with sketches [k, d], and ``tokens`` where it has such, of further items, in the same basis; items
        that are there are replaced."""
        new = np.asarray(item_ids, dtype=np.int64)
        if sketches.shape != (len(new), self.basis.dimensions):
            raise TeacherNotUsable(f"{len(new)} items and sketches of shape {sketches.shape} do not match")
        old = ~np.isin(self.item_ids, new)
        return SketchSet(
            self.basis, np.concatenate([self.item_ids[old], new]),
            np.concatenate([self.sketches[old], sketches.astype(np.float32)]), self.fidelity, self.teacher_id,
            self._tokens_with(old, tokens),
        )  # fmt: skip

    def _tokens_with(self, old: NDArray[np.bool_], tokens: TokenGradients | None) -> TokenGradients | None:
        if self.tokens is None:
            return None
        if tokens is None:
            raise TeacherNotUsable("this set holds token gradients, so further items must come with theirs")
        return self.tokens.take(np.flatnonzero(old)).joined(tokens)

    def save(self, directory: Path) -> None:
        """Write ``basis.safetensors``, ``sketches.safetensors`` (half precision, one scale) and ``manifest.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        self.basis.save(directory / BASIS)
        scale = max(float(np.abs(self.sketches).max(initial=0.0)) / 1024, float(np.finfo(np.float32).tiny))
        save_file(
            {
                "item_ids": torch.from_numpy(self.item_ids.copy()),
                "sketches": torch.from_numpy(self.sketches / scale).half(),
            },
            directory / SKETCHES,
        )
        names = [BASIS, SKETCHES]
        if self.tokens is not None:
            self.tokens.save(directory / TOKENS)
            names.append(TOKENS)
        manifest = {
            "model_revision": self.basis.model_revision, "selection": self.basis.selection,
            "teacher_id": self.teacher_id, "preconditioner": self.basis.preconditioner, "basis": self.basis.name,
            "fingerprint": self.basis.fingerprint,
            "settings": asdict(self.basis.settings), "items": len(self.item_ids), "scale": scale,
            "fidelity": {name: (value if np.isfinite(value) else None) for name, value in self.fidelity.items()},
            "sha256": {name: _sha256(directory / name) for name in names},
        }  # fmt: skip
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, model_revision: str) -> SketchSet:
        """Read what ``save`` wrote. Raises TeacherNotUsable for another model, or a missing or altered file."""
        path = directory / MANIFEST
        if not path.exists():
            raise TeacherNotUsable(f"{directory} holds no sketches (manifest.json is missing): fit them first")
        manifest = json.loads(path.read_text())
        for name, digest in manifest["sha256"].items():
            if not (directory / name).exists() or _sha256(directory / name) != digest:
                raise TeacherNotUsable(f"{directory / name} is not the file its manifest describes: fit again")
        basis = SketchBasis.load(directory / BASIS, model_revision)
        if not basis.fingerprint:  # of a file from before it was kept there, the manifest may say it
            basis = replace(basis, fingerprint=manifest.get("fingerprint", ""))
        stored = load_file(directory / SKETCHES)
        sketches = stored["sketches"].float().numpy() * np.float32(manifest["scale"])
        fidelity = {name: float("nan") if value is None else value for name, value in manifest["fidelity"].items()}
        tokens = TokenGradients.load(directory / TOKENS) if TOKENS in manifest["sha256"] else None
        return cls(basis, stored["item_ids"].numpy(), sketches, fidelity, manifest["teacher_id"], tokens)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
