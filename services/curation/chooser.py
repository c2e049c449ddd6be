"""From a pool of possible queries to the next batch: brings features, labels and disagreement to ``selection``.

Why it exists: ``selection`` is about rows of numbers; this is where a prompt becomes one. Nothing here needs torch:
the features of prompts are given as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.curation.plan import PlannedQuery
from services.curation.selection import comparable, select_queries, uniform_count

FloatArray = NDArray[np.float32]
#: Labelled queries that a candidate's disagreement is guessed from.
NEIGHBOURS = 8


@dataclass(frozen=True)
class Labelled:
    """Prompts of all queries asked so far, and by prompt how far student and teacher were apart (0 to 1)."""

    prompts: tuple[str, ...]
    disagreement: Mapping[str, float]


@dataclass(frozen=True)
class Chooser:
    """``features``: rows [n, d] of prompts; ``labelled``: what is asked already; ``number``: of queries chosen so far,
    so that the same database chooses the same queries."""

    features: Callable[[Sequence[str]], FloatArray]
    labelled: Callable[[], Labelled]
    number: Callable[[], int]
    seed: int

    def __call__(
        self, pool: Sequence[PlannedQuery], by_chance: Sequence[PlannedQuery], count: int, uniform_share: float
    ) -> list[PlannedQuery]:
        """``count`` queries, each with why it was chosen: a share of them the first ``by_chance``, the others out of
        the pool and in its order."""
        rng = np.random.default_rng([self.seed, self.number()])
        drawn = by_chance[: uniform_count(count, uniform_share, rng)]
        possible = [*drawn, *pool]
        if not possible:
            return []
        labelled = self.labelled()
        candidates, known = comparable(
            self.features([one.prompt for one in possible]), self._rows(labelled.prompts)
        )
        chosen = select_queries(
            candidates, known, count=count, drawn=range(len(drawn)), rng=rng,
            disagreement=expected_disagreement(candidates, known, labelled),
            groups=[one.near_duplicate_group for one in possible],
        )  # fmt: skip
        return [replace(possible[one.index], chosen_for=one.reason)
                for one in sorted(chosen, key=lambda one: one.index)]

    def _rows(self, prompts: Sequence[str]) -> FloatArray:
        return self.features(prompts) if prompts else self.features(["x"])[:0]


def expected_disagreement(candidates: FloatArray, known: FloatArray, labelled: Labelled) -> NDArray[np.float64] | None:
    """[p]: the mean over the nearest measured queries, weighted by nearness. None where nothing is measured."""
    measured = [row for row, prompt in enumerate(labelled.prompts) if prompt in labelled.disagreement]
    if not measured:
        return None
    values = np.array([labelled.disagreement[labelled.prompts[row]] for row in measured])
    cosine = candidates @ known[measured].T
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    weights = np.exp(8.0 * np.take_along_axis(cosine, nearest, axis=1).astype(np.float64))
    return np.asarray((weights * values[nearest]).sum(1) / weights.sum(1))
