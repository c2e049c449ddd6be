"""Heads of releases, as curation needs them: scores of all items for a query, and what they were said to be worth.

Why it exists: candidates by the active head, and every comparison of a head with its teacher, use the same rows. A
release whose features are not those curation makes, or whose files are gone, simply has no head here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byline.errors import BylineError
from byline.evaluation.calibration import Calibrator
from byline.ranker.head import Head, load_head
from byline.releases.manifest import CALIBRATOR, HEAD
from byline.releases.registry import ReleaseRegistry
from byline.releases.vouched import vouched
from byline.security.signing import NOT_SIGNED, Keyring
from byline.telemetry import get_logger

log = get_logger(__name__)
FloatArray = NDArray[np.float32]
#: Releases kept open: the active one, and one that a live query was answered from.
_KEPT = 2


@dataclass
class HeadView:
    """One release's head over the items of this moment."""

    release_id: str
    head: Head
    calibrator: Calibrator
    _key: tuple[int, ...] = ()
    _vectors: FloatArray | None = None

    def scores(self, query: FloatArray, item_ids: NDArray[np.int64], items: FloatArray) -> FloatArray:
        """[n] of a query's features [d] over items [n, d]; the items are embedded once."""
        key = (len(item_ids), int(item_ids.sum()))
        if self._vectors is None or key != self._key:
            self._vectors, self._key = self.head.embed_items(items), key
        found: FloatArray = self._vectors @ self.head.embed_queries(query[None, :])[0]
        return found

    def probabilities(self, item_ids: NDArray[np.int64], scores: FloatArray, most: int) -> dict[int, float]:
        """What would be said of the first ``most`` items; empty where the release has no calibration."""
        order = np.lexsort((item_ids, -scores))[: max(most, self.calibrator.depth)]
        said = self.calibrator.probabilities([float(score) for score in scores[order]])
        named = zip(item_ids[order].tolist()[:most], said, strict=False)
        return {item_id: one.value for item_id, one in named if one is not None}


class Heads:
    """Heads by release id. ``preprocessing_hash``: of the features curation makes."""

    def __init__(self, registry: ReleaseRegistry, model_id: str, preprocessing_hash: str,
                 load: Callable[[Path], Head] = load_head, keyring: Keyring = NOT_SIGNED) -> None:
        self._registry = registry
        self._model_id = model_id
        self._hash = preprocessing_hash
        self._load = load
        self._keyring = keyring
        self._open: dict[str, HeadView | None] = {}

    def active(self) -> HeadView | None:
        """The head that answers now; None before the first release."""
        active = self._registry.active(self._model_id)
        return None if active is None else self.of(active.release_id)

    def active_id(self) -> str | None:
        """The id of the active release."""
        active = self._registry.active(self._model_id)
        return None if active is None else active.release_id

    def of(self, release_id: str) -> HeadView | None:
        """The head of a release; None, said once in the log, if it cannot be used."""
        if release_id not in self._open:
            while len(self._open) >= _KEPT:
                del self._open[next(iter(self._open))]
            self._open[release_id] = self._opened(release_id)
        return self._open[release_id]

    def _opened(self, release_id: str) -> HeadView | None:
        try:
            record = self._registry.get(release_id)
            if record.manifest.preprocessing_hash != self._hash:
                log.info("head_of_other_features", release_id=release_id)
                return None
            vouched(record.directory, self._keyring, record.manifest, (HEAD, CALIBRATOR))
            value = json.loads((record.directory / CALIBRATOR).read_text())
            return HeadView(release_id, self._load(record.directory / HEAD), Calibrator.from_json(value))
        except (BylineError, OSError, ValueError) as error:
            log.warning("head_not_usable", release_id=release_id, error=str(error))
            return None
