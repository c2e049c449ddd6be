"""Fitting sketches: one pass of gradients over the corpus, then principal directions from a file.

Why it exists: all whitened gradients of a corpus do not fit into memory, and hardly onto a disk. Kept are the
coordinates of largest energy, in a resumable file [n, m]; the principal directions are found by subspace iteration
over it, chunk by chunk. There is no centring: it is inner products that must survive. The full first-order scores of
some queries are taken in the same pass, so the manifest can say what the cut costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.evaluation.agreement import spearman
from byline.evaluation.map import mean_average_precision
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import query_blocks
from byline.teachers.ranking import Check, Progress, TeacherItem, TeacherQuery, ignore_progress, never_cancelled
from byline.teachers.row_store import RowStore, digest_of
from byline.teachers.sketch_basis import Coordinates, SketchBasis, whitened_layers
from byline.teachers.sketch_set import SketchSet

#: Items whose gradients decide which coordinates have the largest energy.
SAMPLE = 256

Whitened = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Pass:
    """A pass of whitened gradients over ``items`` by ``teacher``; ``cost``: further bytes each item needs."""

    teacher: AbuPlusLinear
    items: Sequence[TeacherItem]
    cost: int

    def chunks(self, written: NDArray[np.bool_], progress: Progress, check: Check) -> Iterator[tuple[slice, Whitened]]:
        """(rows, whitened gradients of their items layer by layer) of the chunks not wholly ``written``."""
        teacher = self.teacher
        largest = max(layer.rows * layer.columns for layer in teacher.gradients.layers.values())
        chunk = teacher.chunk_for(self.cost + 12 * largest)
        orientations = (False,) if teacher.settings.flips == "none" else (False, True)
        for start in range(0, len(self.items), chunk):
            place = slice(start, min(start + chunk, len(self.items)))
            if not written[place].all():
                part = self.items[place]
                blocks = [teacher.gradients.block(part, flipped, check=check) for flipped in orientations]
                yield place, whitened_layers(teacher.curvature, teacher.settings.damping, blocks)
            progress(place.stop, len(self.items))


def whitened_items(
    teacher: AbuPlusLinear, items: Sequence[TeacherItem], progress: Progress, check: Check
) -> Iterator[tuple[slice, Whitened]]:
    """Whitened mean gradients of ``items``, chunk by chunk, layer by layer [k, rows, columns].

    With flips ``mean`` the mean of both orientations; ``max`` is not linear and is refused.
    """
    require_linear(teacher)
    return _Pass(teacher, items, 0).chunks(np.zeros(len(items), dtype=bool), progress, check)


def require_linear(teacher: AbuPlusLinear) -> None:
    """Raise TeacherNotUsable for settings under which tau is no inner product."""
    if teacher.settings.flips == "max":
        raise TeacherNotUsable("the higher of two orientations is no inner product: sketch with flips none or mean")


def fit_sketches(
    teacher: AbuPlusLinear,
    items: Sequence[TeacherItem],
    *,
    dimensions: int = 512,
    coordinates: int = 16384,
    fidelity_queries: Sequence[TeacherQuery] = (),
    store: Path,
    seed: int = 0,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> SketchSet:
    """Sketches of ``items`` in the principal ``dimensions`` of their ``coordinates`` of largest energy.

    ``store`` is a directory for what a killed fit goes on from; it holds 2 m bytes per item, and belongs
    to these items, queries and settings (others are refused, TeacherNotUsable). Fewer dimensions than
    asked for where there are fewer items or coordinates. ``progress`` counts items of the one long pass.
    """
    require_linear(teacher)
    if not items:
        raise TeacherNotUsable("sketches are fitted on a corpus, and it holds no items")
    queries = _whitened_queries(teacher, fidelity_queries, check)
    energy = _energy(teacher, items, seed, store, check)
    kept = Coordinates.of_largest(energy, coordinates)
    asked = kept.pick(queries.items())  # [q, m]
    unit = float(torch.cat([energy[n].flatten()[k] for n, k in kept.kept.items()]).mean().sqrt()) or 1.0

    identity = digest_of(teacher.teacher_id, items, {**{f"kept {n}": k for n, k in kept.kept.items()}, "asked": asked})
    rows = RowStore.open(store / "coordinates.npy", (len(items), kept.count), np.float16, identity)
    # The full scores, and the squared norm of the whole gradient: what the cut is judged by.
    full = RowStore.open(store / "full.npy", (len(items), len(asked) + 1), np.float64, identity)
    one_pass = _Pass(teacher, items, 4 * kept.count)
    for place, whitened in one_pass.chunks(rows.written & full.written, progress, check):
        met = torch.zeros(place.stop - place.start, len(asked) + 1, dtype=torch.float64)
        values = kept.pick(_meeting(whitened, queries, met)) / unit
        rows.put(place, values.clamp(-65504, 65504).half().cpu().numpy())
        full.put(place, met.numpy())

    directions = principal_directions(rows.rows, dimensions, seed=seed, check=check)
    directions = directions.half().float()
    basis = SketchBasis(
        kept, directions, teacher.model.revision, teacher.curvature.selection, teacher.curvature.name,
        teacher.settings,
    )  # fmt: skip
    sketches = np.concatenate(
        [(_float(rows.rows[part]) @ directions).numpy() * unit for part in _parts(rows.rows)]
    ).astype(np.float32)
    asked_sketches = (asked.cpu() @ directions).numpy()
    fidelity = _fidelity(asked_sketches @ sketches.T, full.rows[:, :-1].T)
    fidelity |= {
        "energy": float((sketches.astype(np.float64) ** 2).sum() / max(full.rows[:, -1].sum(), 1e-300)),
        "queries": float(len(asked)),
        "draws": float(teacher.settings.query_draws),
        "dimensions": float(basis.dimensions),
        "coordinates": float(kept.count),
        "items": float(len(items)),
    }
    ids = np.array([item.item_id for item in items], dtype=np.int64)
    return SketchSet(basis, ids, sketches, fidelity, teacher.teacher_id)


def principal_directions(
    rows: NDArray[np.floating],
    dimensions: int,
    *,
    seed: int,
    iterations: int = 4,
    oversampling: int = 64,
    check: Check = never_cancelled,
) -> torch.Tensor:
    """The leading right singular vectors [m, d] of ``rows`` [n, m], read in chunks; not centred.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), orthonormalised at every
    turn. d is at most n and m.
    """
    count, width = rows.shape
    wide = min(dimensions + oversampling, count, width)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(width, wide, generator=generator)
    for _turn in range(iterations + 1):
        image = torch.zeros(width, wide)
        for part in _parts(rows):
            check()
            values = _float(rows[part])
            image += values.T @ (values @ found)
        found = torch.linalg.qr(image).Q
    inner = torch.zeros(wide, wide, dtype=torch.float64)
    for part in _parts(rows):
        projected = (_float(rows[part]) @ found).double()
        inner += projected.T @ projected
    values, vectors = torch.linalg.eigh(inner)
    leading: torch.Tensor = found @ vectors.flip(1)[:, : min(dimensions, wide)].float()
    return leading


def _meeting(whitened: Whitened, queries: dict[str, torch.Tensor], met: torch.Tensor) -> Whitened:
    """``whitened`` passed on, while its products with ``queries`` [q] and itself are added to ``met`` [n, q + 1]."""
    for name, value in whitened:
        flat = value.flatten(1)
        met[:, :-1] += (flat @ queries[name].flatten(1).T).double().cpu()
        met[:, -1] += flat.pow(2).sum(1).double().cpu()
        yield name, value


def _whitened_queries(teacher: AbuPlusLinear, queries: Sequence[TeacherQuery], check: Check) -> dict[str, torch.Tensor]:
    """Whitened gradients of the queries, per layer [q, rows, columns]."""
    layers = teacher.gradients.layers
    found = {n: torch.zeros(len(queries), e.rows, e.columns, device=teacher.model.device) for n, e in layers.items()}
    for place, block in query_blocks(
        teacher.model, layers, queries, teacher.settings, batch=teacher.batch, memory=teacher.memory, check=check
    ):
        for name, value in whitened_layers(teacher.curvature, teacher.settings.damping, [block]):
            found[name][place] = value
    return found


def _energy(
    teacher: AbuPlusLinear, items: Sequence[TeacherItem], seed: int, store: Path, check: Check
) -> dict[str, torch.Tensor]:
    """Mean square of every whitened coordinate over a seeded sample of items, per layer [rows, columns]."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:SAMPLE]
    sample = [items[i] for i in sorted(chosen)]
    layers = teacher.gradients.layers
    sizes = {name: layer.rows * layer.columns for name, layer in layers.items()}
    sums = RowStore.open(
        store / "energy.npy", (1, sum(sizes.values())), np.float64, digest_of(teacher.teacher_id, sample, {})
    )
    if not sums.written[0]:
        total = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        for _place, whitened in whitened_items(teacher, sample, ignore_progress, check):
            for name, value in whitened:
                total[name] += value.flatten(1).double().pow(2).sum(0).cpu() / len(sample)
        sums.put(slice(0, 1), torch.cat(list(total.values())).numpy()[None])
    parts = torch.from_numpy(np.array(sums.rows[0])).split(list(sizes.values()))
    return {n: part.reshape(e.rows, e.columns) for (n, e), part in zip(layers.items(), parts, strict=True)}


def _fidelity(scores: NDArray[np.float32], full: NDArray[np.float64]) -> dict[str, float]:
    """How ``scores`` [q, n] rank against ``full`` [q, n]: mAP at 20 and 100, and Spearman; NaN without queries."""
    if not len(full) or full.shape[1] < 2:
        return {"map20": float("nan"), "map100": float("nan"), "spearman": float("nan")}
    truth = full.astype(np.float32)
    return {
        "map20": mean_average_precision(scores, truth, 20).mean,
        "map100": mean_average_precision(scores, truth, 100).mean,
        "spearman": float(np.mean([spearman(a, b) for a, b in zip(scores, truth, strict=True)])),
    }


def _parts(rows: NDArray[np.floating]) -> list[slice]:
    """Slices of rows of at most 64 MB in single precision."""
    step = max(1, (64 << 20) // (4 * rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _float(values: NDArray[np.floating]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
