"""Train a study's generator again without some images, measure every query, and keep one row of it for ever.

Why it exists: a retraining is the only thing here that costs minutes, and everything else (scores of teachers, tables)
is derived from rows in an instant. So a row is keyed by what was left out and the seed: two methods that name the same
images share it, a second run finds it, a killed run loses at most the retraining it was in, and several processes may
work on one list (each takes a lock on the key). Weights are kept too: other measures of them cost seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from byline.diffusion.model import DiffusionModel
from byline.evaluation.retraining_study import Study

#: Likeness of two lists of pictures, pair by pair, in [-1, 1]; [q].
Likeness = Callable[[Sequence[Image.Image], Sequence[Image.Image]], np.ndarray[Any, np.dtype[np.float64]]]
HALF_SEED, FRESH_SEED, ARM_SEED = 10_000, 20_000, 100_000


@dataclass(frozen=True)
class Retraining:
    """A training run: the item ids left out (sorted) and the seed of order, noise and dropout."""

    removed: tuple[int, ...]
    seed: int

    def key(self, study_id: str) -> str:
        """16 hex digits: equal for equal runs of one study."""
        text = json.dumps([study_id, list(self.removed), self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a retraining gave: per query [q] its ``losses``, and for the picture regenerated from its seed and prompt
    the squared pixel error (``pixel_mse``, in [0, 1]) and likeness of EfficientNet features (``cosine``)."""

    removed: tuple[int, ...]
    seed: int
    losses: tuple[float, ...]
    pixel_mse: tuple[float, ...]
    cosine: tuple[float, ...]
    seconds: float


def half_corpus(item_ids: Sequence[int], number: int, seed: int) -> Retraining:
    """The ``number``-th random half: what is left out of it; each has a seed of its own."""
    order = np.random.default_rng([seed, 17, number]).permutation(len(item_ids))
    left_out = sorted(int(item_ids[i]) for i in order[len(item_ids) // 2 :])
    return Retraining(tuple(left_out), HALF_SEED + number)


def nothing_removed(number: int) -> Retraining:
    """The ``number``-th run on all items, with a seed unlike the base model's: what any retraining does to a loss."""
    return Retraining((), FRESH_SEED + number)


def without(item_ids: Sequence[int], repetition: int = 0) -> Retraining:
    """A run without ``item_ids``. Its seed follows from them, so that no two arms share the accidents of a run."""
    removed = tuple(sorted({int(i) for i in item_ids}))
    digest = hashlib.sha256(json.dumps([removed, repetition]).encode()).digest()
    return Retraining(removed, ARM_SEED + int.from_bytes(digest[:4], "little"))


class RetrainingStore:
    """The rows of one study: ``rows.jsonl`` of its queries, appended under a lock, and the runs' weights.

    Weights depend on the training alone: with other queries the same runs are measured again, in seconds.
    """

    def __init__(self, study: Study, likeness: Likeness | None = None) -> None:
        self.study = study
        self.rows_file = study.query_directory / "rows.jsonl"
        self._weights = study.directory / "weights"
        self._likeness = likeness
        self._model: DiffusionModel | None = None

    def rows(self) -> dict[str, Outcome]:
        """All finished retrainings by key. A last line cut short by a kill is not counted."""
        found: dict[str, Outcome] = {}
        if not self.rows_file.exists():
            return found
        for line in self.rows_file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["key"]] = Outcome(tuple(row["removed"]), row["seed"], tuple(row["losses"]),
                                        tuple(row["pixel_mse"]), tuple(row["cosine"]), row["seconds"])  # fmt: skip
        return found

    def find(self, retraining: Retraining) -> Outcome | None:
        """The row of ``retraining``, or None while it has not been run."""
        return self.rows().get(retraining.key(self.study.study_id))

    def run(
        self,
        retrainings: Sequence[Retraining],
        progress: Callable[[float, int], None] = lambda done, total: None,
        check: Callable[[], None] = lambda: None,
        poll: float = 5.0,
    ) -> list[Outcome]:
        """Rows of all ``retrainings``, in order; those not there yet are trained.

        ``progress(done, total)`` counts runs, with the share of the current one. A run that another process holds is
        left to it and awaited at the end. ``check`` is called after every training step and may raise.
        """
        keys = [r.key(self.study.study_id) for r in retrainings]
        while True:
            rows = self.rows()
            missing = {k: r for k, r in zip(keys, retrainings, strict=True) if k not in rows}
            done = len(retrainings) - len(missing)
            progress(done, len(retrainings))
            if not missing:
                return [rows[k] for k in keys]
            for key, retraining in missing.items():
                with self._claim(key) as mine:
                    if mine:
                        # Looked up again: another process may have finished it before the lock was free.
                        if key not in self.rows():
                            self._append(key, self._run(key, retraining, done, len(retrainings), progress, check))
                        break
            else:
                check()
                time.sleep(poll)

    def weights(self, key: str) -> Path:
        """Where the averaged weights of a run are kept."""
        return self._weights / f"{key}.safetensors"

    def measure(self, model: DiffusionModel) -> tuple[Any, Any, Any]:
        """losses, pixel_mse and cosine of every query, each float64 [q], of ``model``."""
        study = self.study
        pictures = study.sample(model, [p for p, _ in study.prompts], [s for _, s in study.prompts])
        originals = [q.image for q in study.queries]
        apart = [(_unit(a) - _unit(b)) ** 2 for a, b in zip(pictures, originals, strict=True)]
        cosine = self._likeness(pictures, originals) if self._likeness else np.full(len(originals), np.nan)
        return study.losses(model), np.array([d.mean() for d in apart]), cosine

    def _run(self, key: str, retraining: Retraining, done: int, total: int,
             progress: Callable[[float, int], None], check: Callable[[], None]) -> Outcome:
        started = time.monotonic()
        path = self.weights(key)

        def step(at: int, steps: int) -> None:
            check()
            progress(done + at / (steps + 1), total)

        if not path.exists():
            rows = np.flatnonzero(~np.isin(self.study.item_ids, np.array(retraining.removed, dtype=np.int64)))
            average = self.study.train(rows, retraining.seed, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in average.items()}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        # One model for all runs: only the UNet's weights differ, and the text encoder takes seconds to load.
        self._model = self._model or self.study.model()
        self._model.unet.load_state_dict(load_file(path))
        losses, mse, cosine = self.measure(self._model)
        seconds = round(time.monotonic() - started, 2)
        return Outcome(retraining.removed, retraining.seed, _floats(losses), _floats(mse), _floats(cosine), seconds)

    def _append(self, key: str, outcome: Outcome) -> None:
        line = json.dumps({"key": key, **outcome.__dict__}) + "\n"
        with self.rows_file.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # A line cut short by a kill must not swallow this one.
            if handle.tell() and not _ends_with_newline(self.rows_file):
                line = "\n" + line
            handle.write(line)

    @contextmanager
    def _claim(self, key: str) -> Iterator[bool]:
        """True while this process alone holds ``key``; the lock goes with the process."""
        folder = self.study.directory / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / key).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def picture_likeness(device: str) -> Likeness:
    """Cosine of EfficientNet features, pair by pair."""
    from byline.features.efficientnet import EfficientNetLite0

    encoder = EfficientNetLite0.load(device)

    def likeness(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> np.ndarray[Any, np.dtype[np.float64]]:
        x, y = (encoder.encode(list(part), [""] * len(part)).astype(np.float64) for part in (a, b))
        found: np.ndarray[Any, np.dtype[np.float64]] = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
        return found

    return likeness


def _unit(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"
