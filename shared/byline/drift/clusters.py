"""Regions of prompts, so that drift in one corner is not averaged away.

Why it exists: windows are compared with each other, so the regions must stay as they are: they are fitted once, on the
prompts known then, and kept in Postgres. A region is named by the prompt nearest to its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects.postgresql import insert

from byline.db.curation_models import PromptClusterRow

CLUSTERS: Table = PromptClusterRow.metadata.tables["prompt_clusters"]
FloatArray = NDArray[np.float32]

#: Prompts needed for each region; fewer would leave windows with nothing in them.
PROMPTS_EACH = 12
MOST = 8


@dataclass(frozen=True, eq=False)
class PromptClusters:
    """``centres`` [k, d] of unit rows, ``examples`` [k] prompts; ``encoder`` says what made the rows."""

    centres: FloatArray
    examples: tuple[str, ...]
    encoder: str

    def of(self, rows: FloatArray) -> list[int]:
        """The number of the nearest centre of each unit row."""
        return [int(number) for number in np.argmax(rows @ self.centres.T, axis=1)]


def fit_clusters(rows: FloatArray, prompts: Sequence[str], encoder: str, seed: int, rounds: int = 25
                 ) -> PromptClusters | None:
    """k-means on unit rows [n, d], as many as :data:`PROMPTS_EACH` allows; None for too few prompts for two."""
    count = min(MOST, len(prompts) // PROMPTS_EACH)
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    centres = rows[[int(rng.integers(len(rows)))]]
    while len(centres) < count:
        apart = np.maximum(1.0 - (rows @ centres.T).max(1), 0.0).astype(np.float64) + 1e-12
        centres = np.concatenate([centres, rows[[int(rng.choice(len(rows), p=apart / apart.sum()))]]])
    for _ in range(rounds):
        nearest = np.argmax(rows @ centres.T, axis=1)
        sums = np.stack([rows[nearest == number].sum(0) if (nearest == number).any() else centres[number]
                         for number in range(count)])
        centres = (sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-9)).astype(np.float32)
    examples = tuple(prompts[int(np.argmax(rows @ centre))] for centre in centres)
    return PromptClusters(centres, examples, encoder)


def stored_clusters(connection: Connection, model_id: str) -> PromptClusters | None:
    """The model's regions; None before they were fitted."""
    statement = select(CLUSTERS).where(CLUSTERS.c.model_id == model_id).order_by(CLUSTERS.c.number)
    rows = connection.execute(statement).mappings().all()
    if not rows:
        return None
    centres = np.stack([np.frombuffer(row["centre"], dtype="<f4") for row in rows])
    return PromptClusters(centres, tuple(row["example"] for row in rows), rows[0]["encoder"])


def store_clusters(connection: Connection, model_id: str, clusters: PromptClusters) -> PromptClusters:
    """Keep them, and return those that are kept: the first fit wins, whoever made it."""
    rows = [
        {"model_id": model_id, "number": number, "example": example, "encoder": clusters.encoder,
         "centre": np.asarray(centre, dtype="<f4").tobytes()}
        for number, (centre, example) in enumerate(zip(clusters.centres, clusters.examples, strict=True))
    ]  # fmt: skip
    connection.execute(insert(CLUSTERS).values(rows).on_conflict_do_nothing())
    return stored_clusters(connection, model_id) or clusters
