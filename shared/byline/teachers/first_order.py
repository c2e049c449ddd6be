"""AbU+ to first order: all queries at once for one pass of gradients over the corpus.

Why it exists: for a small step the rise of an item's loss is linear in it (AbU, appendix A.3),

    tau(item) = (1 / N) < (F + damping)^-1 grad L(query), grad L(item) >,

so the items' gradients are computed once, whatever the number of queries, and met with all
preconditioned query gradients by a matrix product: about a hundred times cheaper for hundreds of
queries at the same ranking (measured, C2). It also has no difference of nearly equal losses, so
nothing is lost in rounding. The exact form (``abu_plus``) stays the oracle it is checked against.

Only the queries' gradients are ever rotated into the curvature's eigenbasis, once each: rotating
activations per position first costs about nine times as much (C2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.teachers.item_gradients import GradientBlock, ItemGradients
from byline.teachers.natural_gradient import NaturalGradientTeacher, UnlearningSettings
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    ScoresManyAtOnce,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
    with_query_noise,
)
from byline.teachers.row_store import RowStore, digest_of


class AbuPlusLinear(ScoresManyAtOnce, NaturalGradientTeacher):
    """The first-order teacher. Same settings, step unit and sign as the exact one.

    ``memory``: bytes that the gradients and scores of one chunk of items may take, the activations of a
    batch aside. ``autocast``: forward and backward passes in bfloat16; off by default.
    """

    method = "abu_plus_linear"

    def __init__(
        self,
        model: DiffusionModel,
        curvature: Preconditioner,
        settings: UnlearningSettings,
        batch: int = 128,
        *,
        memory: int = 256 << 20,
        autocast: bool = False,
    ) -> None:
        """See ``NaturalGradientTeacher``."""
        super().__init__(model, curvature, settings, batch)
        self.memory = memory
        self.gradients = ItemGradients(
            model, self._layers, self.scheme, batch, settings.aggregation, settings.objective, autocast=autocast
        )

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``."""
        return super().teacher_id + ("/bfloat16" if self.gradients.autocast else "")

    def fit(
        self,
        corpus: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Nothing: the curvature it was made with is all that it needs of the corpus."""

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
        store: Path | None = None,
    ) -> list[Ranking]:
        """First-order tau of every candidate for every query, one pass over the candidates.

        Errors and halves cover the noise of the query's gradient as well as the items' (``with_query_noise``).
        With ``store``, a directory, a killed pass goes on where it stopped (see ``replicates``).
        """
        if not queries:
            return []
        halves = self.direction_halves(queries, check=check)
        directions = {name: half.flatten(0, 1) for name, half in halves.items()}  # [2 q, rows, columns]
        flips = self.settings.flips
        orientations = (False,) if flips == "none" else (False, True)
        total = len(candidates) * len(orientations)
        found: list[NDArray[np.float64]] = []  # [n, r, q] of each orientation
        for flipped in orientations:

            def onward(done: int, _total: int, before: int = len(found) * len(candidates)) -> None:  # noqa: B008
                progress(before + done, total)

            place = None if store is None else store / ("tau-flipped.npy" if flipped else "tau.npy")
            found.append(self.replicates(directions, candidates, onward, check, store=place, flipped=flipped))
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        rankings = []
        for q in range(len(queries)):
            half = np.stack([[f[:, :, h * len(queries) + q].T for f in found] for h in (0, 1)])  # [2, o, r, n]
            half = half[:, 0] if flips == "none" else half
            mean = half.mean(0)
            draws = self.settings.item_draws
            ranking = summarise(mean, ids, draws, self.teacher_id, candidate_set, flips=flips)
            rankings.append(with_query_noise(ranking, half, flips))
        return rankings

    def replicates(
        self,
        directions: dict[str, torch.Tensor],
        items: Sequence[TeacherItem],
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
        chunk: int | None = None,
        store: Path | None = None,
        *,
        flipped: bool = False,
    ) -> NDArray[np.float64]:
        """tau of every (item, replicate, query) in one orientation, float64 [n, r, q].

        ``directions``: per layer [q, rows, columns], of all the teacher's layers. ``chunk`` items are
        kept at a time, by default as many as ``memory`` holds. With ``store`` (an .npy file) every
        finished chunk is kept beside a written-flag, and a later call with the same inputs and chunk
        goes on after it to the same bits; a store of other inputs is refused (TeacherNotUsable).
        ``progress`` counts items; ``check`` is called before every batch and may raise.
        """
        queries = next(iter(directions.values())).shape[0]
        shape = (len(items), self.settings.replicates, queries)
        rows = self._pass(directions, items, shape, progress, check, chunk, store, flipped)
        return np.asarray(rows)

    def layer_replicates(
        self,
        directions: dict[str, torch.Tensor],
        items: Sequence[TeacherItem],
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
        chunk: int | None = None,
        store: Path | None = None,
        *,
        flipped: bool = False,
    ) -> NDArray[np.float64]:
        """``replicates`` layer by layer, float64 [layers, n, r, q], layers in the order of ``directions``.

        Curvature is block-diagonal, so a selection's tau is the sum of its layers': one pass over the
        widest selection judges every narrower one, and several dampings where their directions are
        stacked along q. With aggregation ``unit`` the norm is over *this* teacher's layers.
        """
        queries = next(iter(directions.values())).shape[0]
        shape = (len(items), len(directions), self.settings.replicates, queries)
        rows = self._pass(directions, items, shape, progress, check, chunk, store, flipped)
        return np.asarray(rows).swapaxes(0, 1)

    def blocks(
        self,
        items: Sequence[TeacherItem],
        chunk: int,
        written: NDArray[np.bool_],
        progress: Progress,
        check: Check,
        flipped: bool = False,
    ) -> Iterator[tuple[slice, GradientBlock]]:
        """Gradients chunk by chunk, of the chunks not wholly ``written`` [n]; always the same chunks."""
        for start in range(0, len(items), chunk):
            place = slice(start, min(start + chunk, len(items)))
            if not written[place].all():
                yield place, self.gradients.block(items[place], flipped, check=check)
            progress(place.stop, len(items))

    def chunk_for(self, bytes_of_results: int) -> int:
        """How many items fit into ``memory`` where each yields ``bytes_of_results`` besides its gradients."""
        return max(1, self.memory // (self.gradients.bytes_per_item() + bytes_of_results))

    def _pass(
        self,
        directions: dict[str, torch.Tensor],
        items: Sequence[TeacherItem],
        shape: tuple[int, ...],
        progress: Progress,
        check: Check,
        chunk: int | None,
        store: Path | None,
        flipped: bool,
    ) -> NDArray[np.float64]:
        """Fill [n, r, q], or [n, layers, r, q], with tau."""
        identity = "" if store is None else digest_of(f"{self.teacher_id}/{flipped}", items, directions)
        rows = RowStore.open(store, shape, np.float64, identity)
        met = {n: d.flatten(1).T.to(self.model.device) for n, d in directions.items()}  # [rows * columns, q]
        chunk = chunk or self.chunk_for(8 * int(np.prod(shape[1:])))
        for place, block in self.blocks(items, chunk, rows.written, progress, check, flipped):
            tau = torch.zeros(block.count, *shape[1:], dtype=torch.float64, device=self.model.device)
            for layer, (name, direction) in enumerate(met.items()):
                found = (block.replicate_gradients(name).flatten(2) @ direction).double()
                if tau.dim() == found.dim():
                    tau += found
                else:
                    tau[:, layer] = found
            rows.put(place, (tau / self.settings.corpus_size).cpu().numpy())
            del block  # before the next one is made
        return rows.rows
