"""Finished rankings of a job that is not finished yet, one file a query in the job's scratch folder.

Why it exists: a job ranks several queries, and may be stopped, lose its lease or give way to a client between two of
them. A teacher that scores them one after the other must not score again those that were done.
"""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from pathlib import Path

import numpy as np

from byline.teachers import Ranking

_ARRAYS = ("item_ids", "tau", "standard_error", "tau_halves", "samples")
_FACTS = ("draws", "teacher_id", "candidate_set")


class KeptRankings:
    """Rankings by query in ``folder``, which is of one teacher and of certain candidates of each query."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, query_id: uuid.UUID) -> Ranking | None:
        """What was kept of a query; None where nothing was, or the file is damaged."""
        try:
            with np.load(self._path(query_id), allow_pickle=False) as held:
                facts = json.loads(str(held["facts"]))
                return Ranking(**{name: held[name] for name in _ARRAYS}, **{name: facts[name] for name in _FACTS})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def put(self, query_id: uuid.UUID, ranking: Ranking) -> None:
        """Keep a finished ranking."""
        path = self._path(query_id)
        building = path.with_name(f".{path.name}-{os.getpid()}")
        facts = json.dumps({name: getattr(ranking, name) for name in _FACTS})
        with building.open("wb") as file:
            np.savez(file, facts=np.array(facts), **{name: getattr(ranking, name) for name in _ARRAYS})
        building.replace(path)

    def _path(self, query_id: uuid.UUID) -> Path:
        return self._folder / f"{query_id}.npz"
