"""AbU+ in its exact, finite-step form: the oracle, and the verification tier.

Why it exists: every cheaper form (first order, sketches, the student) is judged against this one.
One natural-gradient *ascent* step on the query's denoising loss, restricted to the selected layers,
then the rise of each candidate's loss under common random numbers (FastGDA §3.1; AbU §4):

    theta' = theta + step * (F + damping)^-1 grad L(query),    tau(item) = L(item; theta') - L(item; theta)

tau > 0: unlearning the query hurt the item, so the item mattered. ``skew`` divides each draw's rise
by L' + L, which takes out how the loss grows with the timestep (reference/peers.md §4.4). What
differs from the published code: noise is keyed by item and not by batch, so baselines are measured
once per model and kept, and a score does not depend on what else was scored; the weights are swapped
by a functional call, nothing is reloaded; the step is calibrated into the linear regime, where the
ranking does not depend on it; and noise can be saved where the order is decided (``racing``). tau is
reported for the published step 1 / N, whatever step was taken to measure it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.baselines import LossFiles, LossMemory, LossStore, remove_older
from byline.teachers.item_losses import Cell, ItemLosses
from byline.teachers.natural_gradient import NaturalGradientTeacher, UnlearningSettings
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.racing import still_in
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

#: Noise key of the query where it stands among the items; no corpus item has a negative id.
QUERY_AS_ITEM = -1
#: Draws the step is calibrated on, at least.
PROBE_DRAWS = 32
#: Unfinished scores that nobody has continued for a week are removed.
UNFINISHED_SECONDS = 7 * 24 * 3600.0


class AbuPlus(NaturalGradientTeacher):
    """The exact teacher. Keeps the baselines it has measured, in ``cache`` where there is one."""

    method = "abu_plus"

    def __init__(
        self,
        model: DiffusionModel,
        curvature: Preconditioner,
        settings: UnlearningSettings,
        batch: int = 128,
        cache: Path | None = None,
    ) -> None:
        """``cache``: a folder for baselines and unfinished scores, which any number of processes may share.

        Without it both live and die with this object. Raises TeacherNotUsable as
        ``NaturalGradientTeacher`` does, and for the aggregation ``unit``.
        """
        if settings.aggregation == "unit":
            raise TeacherNotUsable(
                "aggregation 'unit' scales the gradient of each draw, and the exact form has none: "
                "use the first-order form (abu_plus_linear), or aggregation 'sum' or 'skew'"
            )
        super().__init__(model, curvature, settings, batch)
        self._measured = ItemLosses(model, self.scheme, batch, settings.objective)
        self._orientations = (False,) if settings.flips == "none" else (False, True)
        self._cache = cache
        # Losses of another kind of device differ in their last bits, and the rise is a small difference.
        noise = self.scheme.name + ("" if settings.objective == "denoising" else f"-{settings.objective}")
        self._kind = f"{model.revision}/{noise}/{torch.device(model.device).type}"
        self._baselines: LossStore = LossMemory(self.scheme.draws_per_replicate)
        if cache is not None:
            folder = cache / "baselines" / self._kind
            self._baselines = LossFiles(folder, self.scheme.draws_per_replicate, self._kind)

    def fit(
        self,
        corpus: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Measure the baselines that are missing. They depend on model and noise alone: not on the
        query, the layers, the curvature, or the damping."""
        per_item = len(self._orientations) * self.settings.replicates
        chunk = max(1, 1024 // per_item)
        for start in range(0, len(corpus), chunk):
            items = corpus[start : start + chunk]
            self._baselines.refresh()  # other workers may fit the same corpus
            self._losses(self._cells(items), None, None, check)
            progress(min(start + chunk, len(corpus)), len(corpus))

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> list[Ranking]:
        """``score`` of each query in turn: the exact form shares nothing between them but the baselines."""
        total = len(queries) * len(candidates)
        rankings: list[Ranking] = []
        for query in queries:
            behind = len(rankings) * len(candidates)
            rankings.append(
                self.score(
                    query,
                    candidates,
                    candidate_set=candidate_set,
                    progress=lambda done, _, behind=behind: progress(behind + done, total),  # type: ignore[misc]
                    check=check,
                )
            )
        return rankings

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """Exact tau of every candidate for the query; see the module for the formula and the sign.

        With a cache, a killed score goes on where it was and gives the same bits. A race leaves
        candidates with different numbers of samples; all are ranked by tau alone, the dropped ones
        from the draws they had.
        """
        direction = {n: found[0] for n, found in self.directions([query], check=check).items()}
        check()
        step = self.calibrate(direction, query)
        unfinished = self._unfinished(query)
        self._baselines.refresh()
        scores = self._race(self._edited(direction, step), candidates, unfinished, progress, check)
        scores *= 1.0 / (self.settings.corpus_size * step)
        if isinstance(unfinished, LossFiles):
            unfinished.discard()
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        samples = (~np.isnan(scores)).sum(axis=(0, 1)) * self.scheme.draws_per_replicate
        flips = self.settings.flips
        oriented = scores[0] if flips == "none" else scores
        return summarise(
            oriented, ids, self.settings.item_draws, self.teacher_id, candidate_set, samples=samples, flips=flips
        )

    def rise(
        self,
        direction: dict[str, torch.Tensor],
        step: float,
        items: Sequence[TeacherItem],
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> NDArray[np.float64]:
        """Loss after minus loss before of each item, as it is, and draw; float64 [n, draws]."""
        cells = [Cell(item, False, replicate) for item in items for replicate in range(self.settings.replicates)]
        before, after = self._losses(
            cells, self._edited(direction, step), LossMemory(self.scheme.draws_per_replicate), check,
            lambda done: progress(done // self.settings.replicates, len(items)),
        )  # fmt: skip
        order = [draw for replicate in range(self.settings.replicates) for draw in self.scheme.draws_of(replicate)]
        rises = np.empty((len(items), self.settings.item_draws))
        rises[:, order] = (after - before).reshape(len(items), -1)
        return rises

    def calibrate(self, direction: dict[str, torch.Tensor], query: TeacherQuery) -> float:
        """The largest step, in decades around 1 / N, that is linear on the query's own loss.

        The query's loss is the one the step moves most, so it leaves the linear regime first; and
        unlike a probe of the candidates it is the same whichever candidates are asked about.
        Raises TeacherNotUsable when the weight change is lost in float rounding at every linear step.
        """
        probe = TeacherItem(QUERY_AS_ITEM, query.image, query.prompt)
        count = min(self.settings.replicates, -(-PROBE_DRAWS // self.scheme.draws_per_replicate))
        cells = [Cell(probe, False, replicate) for replicate in range(count)]
        before = self._measured.measure(cells, [{}], fill=False)[0]
        trials = []
        for exponent in (1, 0, -1, -2, -3, -4):
            step = 10.0**exponent / self.settings.corpus_size
            lost = self.lost_in_rounding(direction, step)
            if lost > 0.05:
                trials.append(f"step {step:.3g}: {lost:.0%} of the change is lost in rounding")
                continue
            weights = [self._edited(direction, factor * step) for factor in (1.0, -1.0, 2.0)]
            up, down, twice = self._measured.measure(cells, weights, fill=False) - before
            size = float(np.linalg.norm(up)) or float("inf")
            departure = max(float(np.linalg.norm(up + down)), float(np.linalg.norm(twice - 2 * up)) / 2) / size
            if departure <= self.settings.linearity:
                return step
            trials.append(f"step {step:.3g}: departs {departure:.2f} from linear")
        raise TeacherNotUsable("no unlearning step is both linear and representable: " + "; ".join(trials))

    def _race(
        self,
        edited: Mapping[str, torch.Tensor],
        items: Sequence[TeacherItem],
        unfinished: LossStore,
        progress: Progress,
        check: Check,
    ) -> NDArray[np.float64]:
        """Unscaled scores [orientations, replicates, items], replicate after replicate; NaN where not run."""
        count, top = self.settings.replicates, self.settings.racing
        scores = np.full((len(self._orientations), count, len(items)), np.nan)
        alive = np.arange(len(items))
        rounds = [range(r, r + 1) for r in range(count)] if top else [range(count)]
        for replicates in rounds:
            entered = [items[i] for i in alive.tolist()]
            cells = self._cells(entered, replicates)
            # Those dropped are done; the others have this share of their replicates behind them.
            gone, share = len(items) - len(alive), 1 / (len(self._orientations) * count)
            behind = gone + len(alive) * replicates.start / count

            def measured(done: int, behind: float = behind, share: float = share) -> None:
                progress(int(behind + done * share), len(items))

            before, after = self._losses(cells, edited, unfinished, check, measured)
            rise = after - before
            if self.settings.aggregation == "skew":
                rise = rise / (after + before)
            shape = (len(alive), len(self._orientations), len(replicates))
            scores[:, replicates.start : replicates.stop, alive] = rise.mean(1).reshape(shape).transpose(1, 2, 0)
            if top and replicates.stop < count:
                so_far = scores[:, : replicates.stop, alive]
                if self.settings.flips == "mean":
                    so_far = so_far.mean(axis=0, keepdims=True)
                alive = alive[still_in(so_far, top)]
        progress(len(items), len(items))
        return scores

    def _cells(self, items: Sequence[TeacherItem], replicates: Sequence[int] | None = None) -> list[Cell]:
        """All cells of the items: item by item, orientation by orientation."""
        wanted = range(self.settings.replicates) if replicates is None else replicates
        return [Cell(item, flipped, r) for item in items for flipped in self._orientations for r in wanted]

    def _losses(
        self,
        cells: Sequence[Cell],
        edited: Mapping[str, torch.Tensor] | None,
        unfinished: LossStore | None,
        check: Check,
        measured: Callable[[int], None] = lambda done: None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Losses of the cells before and after the edit, [cells, draws] each; only what is missing is measured.

        Without an edit only the first half is filled. What is measured is kept at once, so a killed
        run loses at most one call of the UNet.
        """
        keys = [cell.key for cell in cells]
        before, has_before = self._baselines.read(keys)
        if edited is None or unfinished is None:
            after, has_after = np.full_like(before, np.nan), np.ones(len(cells), dtype=bool)
        else:
            after, has_after = unfinished.read(keys)
        done = int((has_before & has_after).sum())
        for wants_before, wants_after in ((True, True), (False, True), (True, False)):
            group = np.flatnonzero((has_before != wants_before) & (has_after != wants_after))
            weights: list[Mapping[str, torch.Tensor]] = [{}] * wants_before + [edited or {}] * wants_after
            for start in range(0, len(group), self._measured.cells_per_call):
                check()
                rows = group[start : start + self._measured.cells_per_call].tolist()
                found = list(self._measured.measure([cells[row] for row in rows], weights))
                names = [keys[row] for row in rows]
                if wants_before:
                    before[rows] = found.pop(0)
                    self._baselines.add(names, before[rows])
                if wants_after and unfinished is not None:
                    after[rows] = found.pop(0)
                    unfinished.add(names, after[rows])
                done += len(rows)
                measured(done)
        return before, after

    def _unfinished(self, query: TeacherQuery) -> LossStore:
        """Where the edited losses of this query are kept until its score is done."""
        width = self.scheme.draws_per_replicate
        if self._cache is None:
            return LossMemory(width)
        image = query.image.convert("RGB")
        content = f"{image.size}/{query.prompt}".encode() + image.tobytes()
        meaning = f"{self.teacher_id}/{self._kind}/{hashlib.sha256(content).hexdigest()}"
        folder = self._cache / "unfinished"
        remove_older(folder, time.time() - UNFINISHED_SECONDS)
        return LossFiles(folder / hashlib.sha256(meaning.encode()).hexdigest()[:32], width, meaning)

    def _edited(self, direction: dict[str, torch.Tensor], step: float) -> dict[str, torch.Tensor]:
        """The selected weights after a step along ``direction``, by parameter name."""
        edited: dict[str, torch.Tensor] = {}
        for name, change in direction.items():
            layer = self._layers[name]
            edited |= layer.parameters(layer.matrix() + step * change)
        return edited

    def lost_in_rounding(self, direction: dict[str, torch.Tensor], step: float) -> float:
        """Share of the weight change (norm) that float32 addition loses; 0 = nothing, 1 = all."""
        lost = total = 0.0
        for name, change in direction.items():
            weight = self._layers[name].matrix()
            applied = (weight + step * change) - weight
            lost += float((applied - step * change).double().pow(2).sum())
            total += float((step * change).double().pow(2).sum())
        return (lost / total) ** 0.5 if total > 0 else 1.0
