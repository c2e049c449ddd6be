"""The few hundred directions in which a model's whitened gradients are compared, and how a gradient gets there.

Why it exists: <whiten g, whiten h> = <(F + damping)^-1 g, h>, so in whitened coordinates the first-order tau is an
inner product, and whatever keeps inner products keeps the ranking. A principal basis over the corpus does so with a
few hundred numbers per item (measured, C5). Query and item must stand in the same basis, so it names the model, the
curvature and the settings that it belongs to and refuses others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from byline.errors import TeacherNotUsable
from byline.teachers.item_gradients import GradientBlock
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.packed_directions import PackedDirections
from byline.teachers.preconditioner import Preconditioner

FORMAT = "byline-sketch-basis-1"
BASIS = "basis.safetensors"


@dataclass(frozen=True)
class Coordinates:
    """Which entries of the whitened gradients are kept: per layer, in order, indices into its flat matrix, int64."""

    kept: dict[str, torch.Tensor]

    @property
    def count(self) -> int:
        """How many in all, m."""
        return sum(len(indices) for indices in self.kept.values())

    @classmethod
    def of_largest(cls, energy: Mapping[str, torch.Tensor], count: int) -> Coordinates:
        """The ``count`` entries of largest ``energy`` (per layer [rows, columns]) over all layers; ties by place."""
        flat = torch.cat([e.flatten().double().cpu() for e in energy.values()])
        chosen = flat.argsort(descending=True, stable=True)[:count].sort().values
        kept, start = {}, 0
        for name, values in energy.items():
            inside = chosen[(chosen >= start) & (chosen < start + values.numel())]
            kept[name] = inside - start
            start += values.numel()
        return cls(kept)

    def pick(self, whitened: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
        """The kept entries of whitened gradients, given as (layer, [n, rows, columns]), as [n, m]."""
        found = {
            name: value.flatten(1)[:, self.kept[name].to(value.device)] for name, value in whitened if name in self.kept
        }
        return torch.cat([found[name] for name in self.kept], dim=1)


def whitened_layers(
    preconditioner: Preconditioner, damping: float, blocks: Sequence[GradientBlock]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whitened gradients of each layer [n, rows, columns], mean over replicates and over ``blocks`` (orientations).

    One layer at a time: together they would be as large as the network for every item.
    """
    for name in blocks[0].names:
        mean = sum((block.gradients(name) for block in blocks[1:]), blocks[0].gradients(name)) / len(blocks)
        yield name, preconditioner.whiten({name: mean}, damping)[name]


@dataclass(frozen=True)
class SketchBasis:
    """``directions`` [m, d] over the kept ``coordinates`` of gradients whitened by ``preconditioner`` (its name)
    under ``settings``. ``fingerprint`` is that of its factors; empty for a basis from before it was kept."""

    coordinates: Coordinates
    directions: PackedDirections
    model_revision: str
    selection: str
    preconditioner: str
    settings: UnlearningSettings
    fingerprint: str = ""

    @property
    def dimensions(self) -> int:
        """Width of a sketch, d."""
        return self.directions.shape[1]

    @property
    def damping(self) -> float:
        """Relative to the mean eigenvalue of each layer, as everywhere."""
        return self.settings.damping

    @property
    def corpus_size(self) -> int:
        """N of the step 1 / N: tau = <sketch of the query, sketch of the item> / N."""
        return self.settings.corpus_size

    @property
    def name(self) -> str:
        """Stable text for a teacher id: equal names, equal sketches."""
        digest = hashlib.sha256(self.directions.codes.tobytes() + self.directions.scales.tobytes())
        for layer, kept in self.coordinates.kept.items():
            digest.update(layer.encode() + kept.cpu().numpy().tobytes())
        return f"sketch-{self.dimensions}of{self.coordinates.count}-{digest.hexdigest()[:8]}"

    def project(self, whitened: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> NDArray[np.float32]:
        """Sketches float32 [n, d] of whitened gradients, per layer [n, rows, columns], or (layer, these) pairs."""
        pairs = whitened.items() if isinstance(whitened, Mapping) else whitened
        found: NDArray[np.float32] = self.directions.project(self.coordinates.pick(pairs)).cpu().numpy()
        return found

    def require(self, preconditioner: Preconditioner) -> None:
        """Raise TeacherNotUsable unless gradients whitened by ``preconditioner`` belong into this basis."""
        if preconditioner.name != self.preconditioner:
            raise TeacherNotUsable(
                f"the sketches were made with the curvature {self.preconditioner}, not {preconditioner.name}: "
                "load that one, or fit the sketches again"
            )
        if self.fingerprint and preconditioner.fingerprint(self.coordinates.kept) != self.fingerprint:
            raise TeacherNotUsable(
                f"the sketches were made with another fit of the curvature {self.preconditioner}, of another state of "
                "the corpus or by another machine: copy its folder from where the sketches were fitted to this "
                "machine's cache (or beside the model), or fit the sketches again"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"kept/{name}": kept.to(torch.int32).cpu() for name, kept in self.coordinates.kept.items()}
        tensors["codes"] = torch.from_numpy(self.directions.codes)
        tensors["scales"] = torch.from_numpy(self.directions.scales)
        facts = {
            "layers": list(self.coordinates.kept), "bits": self.directions.bits,
            "model_revision": self.model_revision, "selection": self.selection,
            "preconditioner": self.preconditioner, "settings": asdict(self.settings),
            "fingerprint": self.fingerprint,
        }  # fmt: skip
        save_file(tensors, path, {"format": FORMAT, "facts": json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, model_revision: str) -> SketchBasis:
        """Read what ``save`` wrote. Raises TeacherNotUsable for another model's basis or a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TeacherNotUsable(f"{path} is no sketch basis of this version: fit the sketches again")
                facts = json.loads(metadata["facts"])
                kept = {name: file.get_tensor(f"kept/{name}").long() for name in facts["layers"]}
                codes, scales = file.get_tensor("codes").numpy(), file.get_tensor("scales").numpy()
        except (OSError, SafetensorError) as error:
            raise TeacherNotUsable(
                f"{path} cannot be read as a sketch basis: {error}; fit the sketches again"
            ) from error
        if facts["model_revision"] != model_revision:
            raise TeacherNotUsable(
                f"{path} was fitted on model revision {facts['model_revision']}, not {model_revision}: "
                "fit the sketches again"
            )
        settings = UnlearningSettings(**facts["settings"])
        directions = PackedDirections(codes, scales, facts["bits"])
        return cls(
            Coordinates(kept), directions, model_revision, facts["selection"], facts["preconditioner"], settings,
            facts.get("fingerprint", ""),
        )  # fmt: skip
