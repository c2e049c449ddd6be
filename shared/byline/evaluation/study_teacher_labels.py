"""Labels of several teachers for the same queries and items, from two passes of gradients that all of them share.

Why it exists: comparing what different teachers teach needs their labels on equal terms: the same queries, items, draws
and two disjoint noise halves. One pass of the denoising loss over all layers serves the published teacher (its K/V
layers), influence functions over all layers and TRAK; one of the output's norm over K/V serves D-TRAK. Curation's own
labels come with the data. Each pass is kept row by row and goes on where it was killed.

The unlearning teachers are in their first-order form, which the gate of docs/teacher.md holds equal to the exact one.
Directions of the queries are kept in half precision, each layer of each query scaled to its own peak: 2 bytes x 4.2
million weights x 2 halves a query of the demo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.evaluation.study_data import Progress
from byline.teachers.curvature import Curvature
from byline.teachers.files import PUBLISHED_SELECTION, TeacherFiles
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import ItemGradients, Objective
from byline.teachers.layers import EditableLayer, select_layers
from byline.teachers.natural_gradient import UnlearningSettings, query_blocks
from byline.teachers.ranking import TeacherItem, TeacherQuery
from byline.teachers.recipes import Fitting
from byline.teachers.registry import load_ready_teacher
from byline.teachers.row_store import RowStore, digest_of
from byline.teachers.sparse_projection import SparseProjection

FloatArray = npt.NDArray[np.float32]
#: Bytes of gradients held at a time.
_MEMORY = 768 << 20


@dataclass(frozen=True)
class LabelSettings:
    """Budget of the labels: draws an item and a query, split into two halves; samples of the all-layer curvature."""

    draws: int
    query_draws: int
    samples: int
    damping: float = 0.1
    seed: int = 0
    batch: int = 128

    def unlearning(self, corpus_size: int) -> UnlearningSettings:
        """Items share one set of draws, as curation's do; two replicates are the two halves."""
        return UnlearningSettings(
            corpus_size=corpus_size, query_draws=self.query_draws, item_draws=self.draws, replicates=2,
            damping=self.damping, seed=self.seed + 1, noise="shared",
        )  # fmt: skip


@dataclass(frozen=True)
class LabelMaker:
    """Makes tau [2, q, n] (two disjoint noise halves) of each teacher; ``work`` keeps what is half done."""

    model: DiffusionModel
    items: Sequence[TeacherItem]
    queries: Sequence[TeacherQuery]
    settings: LabelSettings
    cache: Path
    work: Path
    report: Progress

    def make(self) -> dict[str, FloatArray]:
        """By teacher: ``abu_plus``, ``abu_plus_linear all``, ``trak`` and ``d_trak``."""
        kv, every = self._curvature(PUBLISHED_SELECTION), self._curvature("all")
        found = self._denoising(kv, every)
        return found | {"d_trak": self._projected("output_norm")}

    # -- the loss: all layers, three teachers ------------------------------------------------------

    def _denoising(self, kv: Curvature, every: Curvature) -> dict[str, FloatArray]:
        layers = select_layers(self.model.unet, "all")
        text = select_layers(self.model.unet, PUBLISHED_SELECTION)
        wide, narrow, phi = self._directions(layers, text, kv, every)
        q, p, n = len(self.queries), phi.shape[2], len(self.items)
        rows = self._store("denoising-items", (n, 2, 2 * q + p), np.float32, f"{every.name}/{kv.name}")
        places, projection = _places(layers), SparseProjection()
        for place, block in self._blocks(layers, "denoising", rows.written, "gradients of items, loss, all layers"):
            out = np.zeros((place.stop - place.start, 2, 2 * q + p), dtype=np.float32)
            projected = torch.zeros(len(out), 2, p)
            for name in layers:
                gradient = block.replicate_gradients(name).cpu()  # [k, 2, rows, columns]
                flat = gradient.flatten(2).numpy()
                for half in (0, 1):
                    out[:, half, :q] += flat[:, half] @ wide.layer(name, places[name], half).T
                    if name in text:
                        out[:, half, q : 2 * q] += flat[:, half] @ narrow[name][half].T
                if name in text:
                    projected += projection({name: gradient})
            out[:, :, 2 * q :] = projected.numpy()
            rows.put(place, out)
        found = np.asarray(rows.rows)
        tau = {"abu_plus": found[:, :, q : 2 * q], "abu_plus_linear all": found[:, :, :q]}
        labels: dict[str, FloatArray] = {
            name: (np.ascontiguousarray(t.transpose(1, 2, 0)) / n).astype(np.float32) for name, t in tau.items()
        }
        return labels | {"trak": repeated(found[:, :, 2 * q :], phi, self.settings.damping)}

    def _directions(
        self, layers: dict[str, EditableLayer], text: dict[str, EditableLayer], kv: Curvature, every: Curvature
    ) -> tuple[_Halves, dict[str, list[FloatArray]], FloatArray]:
        """Natural gradients over all layers; over K/V by layer and half [q, weights]; projected K/V [q, 2, p]."""
        projection, places, count = SparseProjection(), _places(layers), len(self.queries)
        weights = max(p.stop for p in places.values())
        small = sum(e.rows * e.columns for e in text.values())
        name = f"{every.name}/{kv.name}"
        large = self._store("denoising-directions", (count, 2, weights), np.float16, name)
        scales = self._store("denoising-scales", (count, 2, len(layers)), np.float32, name)
        few = self._store("denoising-queries", (count, 2, small + projection.dimensions), np.float32, name)
        for place, block in self._queried(layers, "denoising", few.written):
            parts = torch.zeros(place.stop - place.start, 2, projection.dimensions)
            wide: dict[str, torch.Tensor] = {}
            narrow: dict[str, torch.Tensor] = {}
            for layer in layers:
                gradient = block.replicate_gradients(layer)  # [k, 2, rows, columns]
                wide |= {layer: every.precondition({layer: gradient}, self.settings.damping)[layer].flatten(2).cpu()}
                if layer in text:
                    narrow[layer] = kv.precondition({layer: gradient}, self.settings.damping)[layer].flatten(2).cpu()
                    parts += projection({layer: gradient}).cpu()
            peaks = torch.stack([w.abs().amax(2) for w in wide.values()], dim=2).clamp_min(1e-30)  # [k, 2, layers]
            half = [w / peaks[:, :, [i]] for i, w in enumerate(wide.values())]
            large.put(place, torch.cat(half, dim=2).half().numpy())
            scales.put(place, peaks.numpy())
            few.put(place, torch.cat([*narrow.values(), parts], dim=2).numpy())
        ends = np.cumsum([0, *(e.rows * e.columns for e in text.values())])
        cut = {n: slice(a, b) for n, a, b in zip(text, ends[:-1], ends[1:], strict=True)}
        narrow_of = {n: [np.ascontiguousarray(few.rows[:, h, c]) for h in (0, 1)] for n, c in cut.items()}
        return _Halves(large.rows, scales.rows, tuple(layers)), narrow_of, np.asarray(few.rows[:, :, small:])

    # -- the output's norm: K/V -------------------------------------------------------------------

    def _projected(self, objective: Objective) -> FloatArray:
        """tau of the projected-gradient teacher over K/V."""
        layers, projection = select_layers(self.model.unet, PUBLISHED_SELECTION), SparseProjection()

        def projected(block: Any) -> FloatArray:
            total = sum(projection({name: block.replicate_gradients(name)}).cpu() for name in layers)
            return np.asarray(torch.as_tensor(total).numpy(), dtype=np.float32)

        asked = self._store(f"{objective}-queries", (len(self.queries), 2, projection.dimensions), np.float32, "")
        for place, block in self._queried(layers, objective, asked.written):
            asked.put(place, projected(block))
        rows = self._store(f"{objective}-items", (len(self.items), 2, projection.dimensions), np.float32, "")
        for place, block in self._blocks(layers, objective, rows.written, "gradients of items, output's norm"):
            rows.put(place, projected(block))
        return repeated(np.asarray(rows.rows), np.asarray(asked.rows), self.settings.damping)

    # -- passes -----------------------------------------------------------------------------------

    def _curvature(self, selection: str) -> Curvature:
        files = TeacherFiles.beside(self.model.directory, self.cache, self.model.revision)
        # The fit is of this study's items and budget: factors of others lie beside it, not in its place.
        fitted_on = digest_of(f"{self.settings.samples}/{self.settings.seed}", self.items, {})[:12]
        files = TeacherFiles(files.cache / f"study-{fitted_on}", files.shipped)
        teacher = load_ready_teacher(
            "abu_plus_linear", self.model, files, self.settings.unlearning(len(self.items)), lambda: self.items,
            selection=selection, fitting=Fitting(self.settings.samples, self.settings.seed),
            progress=lambda done, total: self.report(f"EK-FAC over {selection}", done, total),
        )  # fmt: skip
        if not isinstance(teacher, AbuPlusLinear) or not isinstance(teacher.curvature, Curvature):
            raise TeacherNotUsable("the registry's abu_plus_linear is no first-order teacher with EK-FAC factors")
        return teacher.curvature

    def _blocks(
        self, layers: dict[str, EditableLayer], objective: Objective, written: npt.NDArray[np.bool_], what: str
    ) -> Iterator[tuple[slice, Any]]:
        scheme = self.settings.unlearning(len(self.items)).noise_scheme
        gradients = ItemGradients(self.model, layers, scheme, self.settings.batch, objective=objective)
        chunk = max(1, _MEMORY // gradients.bytes_per_item())
        for start in range(0, len(self.items), chunk):
            place = slice(start, min(start + chunk, len(self.items)))
            if not written[place].all():
                yield place, gradients.block(self.items[place])
            self.report(what, place.stop, len(self.items))

    def _queried(
        self, layers: dict[str, EditableLayer], objective: Objective, written: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[slice, Any]]:
        """Blocks of two replicates of each query that is not ``written`` yet, eight queries at a time."""
        settings = self.settings.unlearning(len(self.items))
        for start in range(0, len(self.queries), 8):
            place = slice(start, min(start + 8, len(self.queries)))
            if not written[place].all():
                for inside, block in query_blocks(
                    self.model, layers, self.queries[place], settings, batch=self.settings.batch,
                    objective=objective, replicates=2, memory=_MEMORY,
                ):  # fmt: skip
                    yield slice(start + inside.start, start + inside.stop), block
            self.report(f"gradients of queries, {objective}", place.stop, len(self.queries))

    def _store(self, name: str, shape: tuple[int, ...], dtype: type[np.generic], what: str) -> RowStore:
        text = f"{name}/{what}/{self.settings}/{self.model.revision}/{[q.prompt for q in self.queries]}"
        pictures = {str(i): torch.from_numpy(np.asarray(q.image).copy()) for i, q in enumerate(self.queries)}
        identity = digest_of(text, self.items, pictures)
        return RowStore.open(self.work / f"labels-{identity[:12]}" / f"{name}.npy", shape, dtype, identity)


@dataclass(frozen=True)
class _Halves:
    """Directions float16 [q, 2, weights], each layer of each query divided by its entry of ``scales``."""

    rows: npt.NDArray[np.float16]
    scales: FloatArray
    layers: tuple[str, ...]

    def layer(self, name: str, place: slice, half: int) -> FloatArray:
        """[q, weights of the layer] of one half."""
        scale = self.scales[:, half, self.layers.index(name)]
        return np.asarray(self.rows[:, half, place], dtype=np.float32) * scale[:, None]


def kernel_scores(items: FloatArray, queries: FloatArray, damping: float) -> FloatArray:
    """TRAK's tau [2, q, n] from projected gradients, items [n, 2, p] and queries [q, 2, p], half by half.

    phi_query^T (Phi^T Phi + lambda I)^-1 phi_item with Phi the mean over both halves, lambda = ``damping`` x mean
    eigenvalue: ``teachers.projected``, but for the halves, which here share no query noise either.
    """
    mean = items.mean(1, dtype=np.float64)
    gram = mean.T @ mean
    gram[np.diag_indices_from(gram)] += damping * np.trace(gram) / len(gram)
    found = [np.linalg.solve(gram, queries[:, h].T.astype(np.float64)).T @ items[:, h].T for h in (0, 1)]
    return np.stack(found).astype(np.float32)


def repeated(items: FloatArray, queries: FloatArray, damping: float) -> FloatArray:
    """As ``kernel_scores``, but each half has a kernel of its own: the method twice, on disjoint noise.

    With fewer items than dimensions the kernel of both halves' mean m is no judge of a repetition: the halves are
    m + d and m - d, d lies where m does not and the kernel damps nothing there, so the two scores oppose each other
    (Spearman -.92 measured on 300 items).
    """
    halves = [kernel_scores(items[:, [h, h]], queries[:, [h, h]], damping)[0] for h in (0, 1)]
    return np.stack(halves)


def _places(layers: dict[str, EditableLayer]) -> dict[str, slice]:
    """Where each layer's weights lie in a row of all of them."""
    ends = np.cumsum([0, *(layer.rows * layer.columns for layer in layers.values())]).tolist()
    return {name: slice(a, b) for name, a, b in zip(layers, ends[:-1], ends[1:], strict=True)}
