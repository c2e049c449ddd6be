"""AbU+ to first order: all queries at once for one pass of gradients over the corpus.

Why it exists: for a small step the rise of an item's loss is linear in it (AbU, appendix A.3),

    tau(item) = (1 / N) < (F + damping)^-1 grad L(query), grad L(item) >,

so the items' gradients are computed once, whatever the number of queries, and met with all
preconditioned query gradients by a matrix product: about a hundred times cheaper for hundreds of
queries at the same ranking (measured, C2). It also has no difference of nearly equal losses, so
nothing is lost in rounding. The exact form (``abu_plus``) stays the oracle it is checked against.

The gradient of a K or V projection is a sum over tokens of delta a^T whose inputs a do not depend
on timestep or noise; so the deltas are summed over the draws *first*, and multiplied out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.teachers.layers import capture
from byline.teachers.natural_gradient import NaturalGradientTeacher
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
)


class AbuPlusLinear(NaturalGradientTeacher):
    """The first-order teacher. Same settings, step unit and sign as the exact one."""

    method = "abu_plus_linear"

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """First-order tau of every candidate for one query."""
        return self.score_many([query], candidates, candidate_set=candidate_set, progress=progress, check=check)[0]

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> list[Ranking]:
        """First-order tau of every candidate for every query, one pass over the candidates."""
        directions = [self.direction(query) for query in queries]
        stacked = {n: torch.stack([d[n] for d in directions]) for n in self._layers}
        replicates = self.replicates(stacked, candidates, progress, check)  # [n, r, q]
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        return [
            summarise(replicates[:, :, q].T, ids, self.settings.item_draws, self.teacher_id, candidate_set)
            for q in range(len(queries))
        ]

    def replicates(
        self,
        directions: dict[str, torch.Tensor],
        items: Sequence[TeacherItem],
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
        chunk: int = 16,
        store: Path | None = None,
    ) -> NDArray[np.float64]:
        """tau of every (item, replicate, query), float64 [n, r, q].

        ``directions``: per layer [q, out, in]. With ``store`` every finished chunk is written to a
        memory-mapped file beside a flag, and a later call with the same inputs resumes after it.
        """
        queries = next(iter(directions.values())).shape[0]
        shape = (len(items), self.settings.replicates, queries)
        result, written = _open_store(store, shape)
        for start in range(0, len(items), chunk):
            rows = slice(start, min(start + chunk, len(items)))
            if not written[rows].all():
                check()
                result[rows] = self._score_chunk(directions, items[rows])
                written[rows] = True
                if isinstance(result, np.memmap):
                    result.flush()
                    written.flush()  # type: ignore[attr-defined]
            progress(rows.stop, len(items))
        return np.asarray(result)

    def _score_chunk(self, directions: dict[str, torch.Tensor], items: Sequence[TeacherItem]) -> NDArray[np.float64]:
        """tau [items, replicates, queries] of a few items."""
        inputs, deltas = self.token_gradients(items)
        total = torch.zeros(len(items), self.settings.replicates, next(iter(directions.values())).shape[0])
        for name, delta in deltas.items():
            gradient = torch.einsum("nrto,nti->nroi", delta, inputs[name])
            total += (gradient.flatten(2) @ directions[name].flatten(1).T).cpu()
        return (total.double() / self.settings.corpus_size).numpy()

    def token_gradients(self, items: Sequence[TeacherItem]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Per layer the text inputs [n, tokens, in] and mean output gradients [n, r, tokens, out].

        Their contraction over tokens is the item's weight gradient, averaged over a replicate.
        """
        model, scheme = self.model, self.scheme
        latents = model.encode_images([item.image for item in items])
        states = model.encode_prompts([item.caption for item in items])
        per_replicate = scheme.draws // scheme.replicates
        pairs = [(i, d) for i in range(len(items)) for d in range(scheme.draws)]
        blocks = [
            scheme.draw(
                scheme.key(item.item_id, item.caption), range(scheme.draws), model.latent_shape, model.num_timesteps
            )
            for item in (items if scheme.kind == "item" else items[:1])
        ]
        inputs: dict[str, torch.Tensor] = {}
        deltas: dict[str, torch.Tensor] = {}
        for start in range(0, len(pairs), self.batch):
            part = pairs[start : start + self.batch]
            rows = torch.tensor([i for i, _ in part])
            block = [blocks[i if scheme.kind == "item" else 0] for i, _ in part]
            timesteps = torch.stack([b[0][d] for b, (_, d) in zip(block, part, strict=True)]).to(model.device)
            noise = torch.stack([b[1][d] for b, (_, d) in zip(block, part, strict=True)]).to(model.device)
            with capture(self._layers) as record:
                losses = model.denoising_loss(latents[rows], states[rows], timesteps, noise)
                found = record.gradients(losses)
            cell = rows * scheme.replicates + torch.tensor([d % scheme.replicates for _, d in part])
            for name, delta in found.items():
                if name not in deltas:
                    deltas[name] = torch.zeros(len(items) * scheme.replicates, *delta.shape[1:], device=model.device)
                    inputs[name] = torch.zeros(len(items), *record.inputs[name].shape[1:], device=model.device)
                deltas[name].index_add_(0, cell.to(model.device), delta / per_replicate)
                inputs[name][rows] = record.inputs[name]
        shape = (len(items), scheme.replicates)
        return inputs, {n: d.reshape(*shape, *d.shape[1:]) for n, d in deltas.items()}


def _open_store(store: Path | None, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Result and written-flags, in memory or memory-mapped; a store of another shape is refused."""
    if store is None:
        return np.zeros(shape), np.zeros(shape[0], dtype=bool)
    store.parent.mkdir(parents=True, exist_ok=True)
    flags = store.with_suffix(".written.npy")
    if store.exists() and flags.exists():
        result = np.lib.format.open_memmap(store, mode="r+")
        written = np.lib.format.open_memmap(flags, mode="r+")
        if result.shape != shape:
            raise TeacherNotUsable(
                f"{store} holds scores of shape {result.shape}, not {shape}: remove it to start anew"
            )
        return result, written
    result = np.lib.format.open_memmap(store, mode="w+", dtype=np.float64, shape=shape)
    written = np.lib.format.open_memmap(flags, mode="w+", dtype=bool, shape=shape[:1])
    return result, written
