"""TRAK and D-TRAK: random projections of the gradients and the inverse of their Gram matrix.

Why it exists: they are the baselines every diffusion attribution paper reports (reference/peers.md 1.3), and the
question they answer is ours: does EK-FAC curvature beat a projected Gauss-Newton kernel at the same gradients?

With phi = P E[grad f] of the selected layers, averaged over timesteps and noise, P a random projection,
(Park et al., ICML 2023, eq. 15 without the residual factor; Zheng et al., ICLR 2024)

    tau(item) = phi_query^T (Phi^T Phi + lambda I)^-1 phi_item,     lambda = damping * mean eigenvalue of Phi^T Phi

f is the denoising loss (``trak``) or the mean of squares of the UNet's output (``d_trak``), the same for query and
items. Higher = more influential: a gradient that points the query's way lowers the query's loss when trained on.
tau has no unit of loss. Of the settings, ``flips``, ``racing`` and ``linearity`` have no meaning here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.files import TeacherFiles
from byline.teachers.item_gradients import GradientBlock, ItemGradients, Objective
from byline.teachers.layers import select_layers
from byline.teachers.natural_gradient import UnlearningSettings, query_gradients
from byline.teachers.projected_features import Features, ProjectedFeatures
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
)
from byline.teachers.sparse_projection import SparseProjection

#: Settings that change an item's features.
_FEATURE_SETTINGS = ("item_draws", "replicates", "seed", "noise", "antithetic", "aggregation")


class ProjectedGradientTeacher(ScoresManyAtOnce):
    """``trak`` or ``d_trak`` on one selection of layers. Must be fitted on the corpus before it can score."""

    def __init__(
        self,
        method: str,
        objective: Objective,
        model: DiffusionModel,
        files: TeacherFiles,
        settings: UnlearningSettings,
        selection: str,
        *,
        projection: SparseProjection | None = None,
        batch: int = 128,
        memory: int = 256 << 20,
    ) -> None:
        """``memory``: bytes the gradients of one chunk of items may take, activations aside."""
        self.model = model
        self.settings = settings
        self.method = method
        self._objective: Objective = objective
        self._layers = select_layers(model.unet, selection)
        self._batch = batch
        self._projection = projection or SparseProjection()
        scheme = settings.noise_scheme
        self._gradients = ItemGradients(model, self._layers, scheme, batch, settings.aggregation, objective)
        row_bytes = 4 * scheme.replicates * self._projection.dimensions
        self._chunk = max(1, memory // (self._gradients.bytes_per_item() + row_bytes))
        chosen = {name: value for name, value in asdict(settings).items() if name in _FEATURE_SETTINGS}
        self._name = f"{method}/{settings.digest()}/{selection}-{self._projection.name}"
        identity = f"{objective}/{selection}/{self._projection.name}/{model.revision}/{sorted(chosen.items())}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        name = f"projected-{objective}-{selection}-{digest}"
        self._features = ProjectedFeatures(
            files.find(name, model.revision) or files.target(name), identity, model.revision,
            (scheme.replicates, self._projection.dimensions),
        )  # fmt: skip
        self._factor: torch.Tensor | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether there are features of a corpus to make the kernel from."""
        return bool(self._features.item_ids)

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``. The kernel depends on which items were fitted, so they are part of the id."""
        self._require_fit()
        ids = ",".join(str(item_id) for item_id in sorted(self._features.item_ids))
        items = hashlib.sha256(ids.encode()).hexdigest()[:8]
        return f"{self._name}-{len(self._features.item_ids)}-{items}-{self.model.revision}/{self._scheme_name}"

    def fit(
        self, corpus: Sequence[TeacherItem], *, progress: Progress = ignore_progress, check: Check = never_cancelled
    ) -> None:
        """One gradient pass over those items of ``corpus`` that have no features yet; resumable."""
        missing = self._features.missing(corpus)
        if missing:
            self._features.extend(missing, self._project_items, self._chunk, progress, check)
            self._factor = None

    def score_many(
        self, queries: Sequence[TeacherQuery], candidates: Sequence[TeacherItem], *, candidate_set: str = "given",
        progress: Progress = ignore_progress, check: Check = never_cancelled,
    ) -> list[Ranking]:  # fmt: skip
        """tau of every candidate for every query. Candidates that were not fitted are projected on the way."""
        self._require_fit()
        if not queries:
            return []
        asked = query_gradients(
            self.model, self._layers, queries, self.settings, batch=self._batch, objective=self._objective, check=check
        )
        projected = self._projection(asked).double().cpu().T  # [p, q]
        weights = torch.cholesky_solve(projected, self._kernel_factor()).numpy()
        fresh = {item.item_id for item in self._features.missing(candidates)}
        tau = np.empty((len(candidates), self.settings.replicates, len(queries)))
        for start in range(0, len(candidates), self._chunk):
            check()
            part = candidates[start : start + self._chunk]
            rows = np.empty((len(part), *self._features.shape), dtype=np.float32)
            new = np.array([item.item_id in fresh for item in part], dtype=bool)
            if new.any():
                rows[new] = self._project_items([item for item in part if item.item_id in fresh])
            rows[~new] = self._features.rows([item.item_id for item in part if item.item_id not in fresh])
            tau[start : start + len(part)] = rows.astype(np.float64) @ weights
            progress(start + len(part), len(candidates))
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        return [
            summarise(tau[:, :, q].T, ids, self.settings.item_draws, self.teacher_id, candidate_set)
            for q in range(len(queries))
        ]

    @property
    def _scheme_name(self) -> str:
        return self._gradients.scheme.name

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise TeacherNotUsable(f"{self.method} has no features of a corpus on this model: call fit(corpus) first")

    def _project_items(self, items: Sequence[TeacherItem]) -> Features:
        """Features [n, replicates, p] of items, layer by layer so that one layer is multiplied out at a time."""
        block: GradientBlock = self._gradients.block(items)
        total = torch.zeros(len(items), *self._features.shape, device=self.model.device)
        for name in self._layers:
            total += self._projection({name: block.replicate_gradients(name)})
        return np.asarray(total.cpu().numpy(), dtype=np.float32)

    def _kernel_factor(self) -> torch.Tensor:
        """Cholesky factor [p, p] of Phi^T Phi + lambda I, float64; Phi has the mean over replicates."""
        if self._factor is None:
            gram = np.zeros((self._projection.dimensions,) * 2)
            for block in self._features.blocks():
                mean: NDArray[np.float64] = block.mean(axis=1, dtype=np.float64)  # [some, p]
                gram += mean.T @ mean
            gram[np.diag_indices_from(gram)] += self.settings.damping * np.trace(gram) / len(gram)
            self._factor = torch.linalg.cholesky(torch.from_numpy(gram))
        return self._factor
