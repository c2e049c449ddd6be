"""The student as the studies train it: the one place that knows how a head is fitted and how it scores.

Why it exists: the head is still being improved, and six studies must then change with it by one edit here. A row kept
on disk carries ``student_digest``, so that figures of an earlier student are never taken for today's.
"""

from __future__ import annotations

import ast
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

import byline.ranker as ranker
from byline.ranker.fit import FitConfig, FitReport, Progress, choose_blend, fit_head
from byline.ranker.head import HeadConfig
from byline.ranker.labelled_set import LabelledSet

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StudentSettings:
    """What the studies vary of a student, and the budget all of them have."""

    loss: str = "listwise"
    hidden: tuple[int, ...] = (512, 512)
    out_dim: int = 512
    outside_share: float = 0.1
    evaluate_at: int = 100
    max_steps: int = 160
    #: Options of the fit and of the head; see study *options*.
    weighted: bool = False
    own_query_mean: bool = True
    residual: bool = True
    item_prior: bool = True

    def facts(self) -> dict[str, object]:
        """For a row's key."""
        return asdict(self)


@dataclass(frozen=True)
class Student:
    """A fitted head as vectors: an item's predicted influence is an inner product, higher = more influential."""

    report: FitReport
    seconds: float

    @property
    def width(self) -> int:
        """D, columns of an embedding."""
        return self.report.head.config.embedding_dim

    def query_vectors(self, features: FloatArray) -> FloatArray:
        """[q, in] to [q, D]."""
        return self.report.head.embed_queries(features)

    def item_vectors(self, features: FloatArray) -> FloatArray:
        """[n, in] to [n, D]."""
        return self.report.head.embed_items(features)

    def scores(self, labelled: LabelledSet) -> FloatArray:
        """Predicted influence [q, n]."""
        return np.asarray(self.query_vectors(labelled.query_features) @ self.item_vectors(labelled.item_features).T)

    def facts(self) -> dict[str, float]:
        """How the fit went, for a row."""
        return {"fit_seconds": round(self.seconds, 2), "best_step": self.report.best_step,
                "validation_map": self.report.best_map, "start_map": self.report.start_map,
                "slope": self.report.slope, "blend": float(self.report.head.blend)}  # fmt: skip


def fit_student(train: LabelledSet, validation: LabelledSet, blocks: Sequence[tuple[str, int]],
                settings: StudentSettings, seed: int, progress: Progress | None = None) -> Student:  # fmt: skip
    """Fit on ``train``, choosing the step by mAP on ``validation``; ``blocks`` (encoder, width) of the columns."""
    names, widths = zip(*blocks, strict=True)
    config = replace(
        HeadConfig.of_encoders(names, widths, settings.hidden, settings.out_dim),
        own_query_mean=settings.own_query_mean, residual=settings.residual, item_prior=settings.item_prior,
    )  # fmt: skip
    started = time.monotonic()
    report = fit_head(train, validation, config, _fit_config(settings), seed, progress)
    return Student(report, time.monotonic() - started)


def student_digest() -> str:
    """12 hex digits over the code of ``byline.ranker``, comments and docstrings left out: other code, other student."""
    digest = hashlib.sha256()
    for path in sorted(Path(ranker.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            # A docstring is an expression statement that is a constant; no other such statement does anything.
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def narrowed(student: Student, width: int, train: LabelledSet, validation: LabelledSet, settings: StudentSettings
             ) -> Student:  # fmt: skip
    """The same head with embeddings of ``width`` columns; nothing is fitted again but exponent and blend, which
    validation queries choose for the columns that are left."""
    head = student.report.head.narrowed(width)
    best = choose_blend(head, train, validation, _fit_config(settings))
    return replace(student, report=replace(student.report, head=head, best_map=best))


def _fit_config(settings: StudentSettings) -> FitConfig:
    return FitConfig(loss=settings.loss, max_steps=settings.max_steps, outside_share=settings.outside_share,
                     evaluate_at=settings.evaluate_at, weighted=settings.weighted,
                     evaluate_every=max(1, min(20, settings.max_steps // 4)))  # fmt: skip
