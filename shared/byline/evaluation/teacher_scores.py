"""Scores of several teachers for the same queries and candidates, kept row by row so that a killed run resumes.

Why it exists: comparing teachers takes minutes to hours, nearly all of it in scoring; a row (one teacher, one query)
that was made under the very same conditions is never made twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from byline.errors import LabelsNotUsable
from byline.evaluation.kept_rows import KeptRows
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.ranking import Check, Ranking, Teacher, TeacherItem, TeacherQuery, never_cancelled

#: Called with the teacher's label, work done and work in all.
Report = Callable[[str, int, int], None]


class Labelled(Protocol):
    """A labelled query of a snapshot."""

    @property
    def split(self) -> str:
        """train, validation or test."""
        ...

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """[n]."""
        ...

    @property
    def tau(self) -> NDArray[np.float32]:
        """[n]; higher = more influential."""
        ...


_Labelled = TypeVar("_Labelled", bound=Labelled)


@dataclass(frozen=True)
class Question:
    """One query and the candidates every teacher is asked about. ``number`` is its place in the label snapshot."""

    number: int
    query: TeacherQuery
    candidates: tuple[TeacherItem, ...]

    @property
    def digest(self) -> str:
        """16 hex digits of picture, prompt and candidates."""
        found = hashlib.sha256(self.query.image.tobytes() + self.query.prompt.encode())
        found.update(",".join(f"{item.item_id}" for item in self.candidates).encode())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class ScoredRow:
    """tau [n] of one question's candidates, the halves [2, n] of its noise, and what it cost (seconds)."""

    tau: NDArray[np.float32]
    halves: NDArray[np.float32]
    seconds: float


class ScoreRows:
    """Rows on disk, by teacher id and question: what changes either is never taken for the same."""

    def __init__(self, path: Path) -> None:
        """Read what is there; ``path`` need not exist."""
        self._kept = KeptRows(path)

    def get(self, teacher_id: str, question: Question) -> ScoredRow | None:
        """The row of a teacher and question, if it was made under these very conditions."""
        row = self._kept.get(f"{teacher_id}/{question.digest}")
        if row is None:
            return None
        tau, halves = (np.asarray(row[name], dtype=np.float32) for name in ("tau", "halves"))
        return ScoredRow(tau, halves, float(row["seconds"]))

    def put(self, teacher_id: str, question: Question, row: ScoredRow) -> None:
        """Keep a row; durable when it returns."""
        self._kept.put(f"{teacher_id}/{question.digest}", {
            "query": question.number, "seconds": round(row.seconds, 3), "tau": row.tau.tolist(),
            "halves": row.halves.tolist(),
        })  # fmt: skip


def questions(
    snapshot: Sequence[_Labelled],
    corpus: Sequence[TeacherItem],
    images: Callable[[_Labelled], TeacherQuery],
    *,
    count: int,
    candidates: int,
    seed: int,
) -> list[Question]:
    """``count`` queries, held-out ones first, each with ``candidates``: half the highest by the labels, half random.

    The nearest alone would ask only for the order of the top, random ones alone only for top against rest. Both
    choices come from ``seed``; candidates are in corpus order, so that their order tells a teacher nothing.
    """
    by_id = {item.item_id: item for item in corpus}
    place = {item.item_id: number for number, item in enumerate(corpus)}
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(snapshot))
    order = sorted(shuffled.tolist(), key=lambda number: snapshot[number].split != "test")
    if len(order) < count or not len(corpus):
        raise LabelsNotUsable(
            f"{count} queries are asked for, and there are labels of {len(snapshot)} and {len(corpus)} items: "
            "lower --queries, or point --labels and --corpus at a larger set"
        )
    found = []
    for number in order[:count]:
        labelled = snapshot[number]
        ranked = [i for i in labelled.item_ids[np.argsort(-labelled.tau, kind="stable")].tolist() if i in by_id]
        near = ranked[: candidates // 2]
        rest = [item.item_id for item in corpus if item.item_id not in set(near)]
        drawn = rng.choice(len(rest), min(candidates - len(near), len(rest)), replace=False)
        chosen = sorted([*near, *(rest[i] for i in drawn)], key=place.__getitem__)
        found.append(Question(number, images(labelled), tuple(by_id[i] for i in chosen)))
    return found


def score_all(
    label: str,
    teacher: Teacher,
    asked: Sequence[Question],
    rows: ScoreRows,
    report: Report,
    *,
    store: Path | None = None,
    check: Check = never_cancelled,
) -> list[ScoredRow]:
    """The teacher's rows for all questions, in order; only what ``rows`` lacks is computed.

    The exact forms take one query after the other. All others make one pass over the candidates for any number of
    queries, so they are asked once about the union of the candidates; the first-order form resumes inside its pass
    (``store``).
    """
    missing = [q for q in asked if rows.get(teacher.teacher_id, q) is None]
    if missing and isinstance(teacher, AbuPlus):
        total = sum(len(q.candidates) for q in missing)
        behind = 0
        for question in missing:
            begun = time.monotonic()
            ranking = teacher.score(
                question.query, question.candidates, check=check,
                progress=lambda done, _all, b=behind: report(label, b + done, total),  # type: ignore[misc]
            )  # fmt: skip
            rows.put(teacher.teacher_id, question, _row(ranking, question, time.monotonic() - begun))
            behind += len(question.candidates)
    elif missing:
        union = list({item.item_id: item for q in missing for item in q.candidates}.values())
        queries = [q.query for q in missing]
        begun = time.monotonic()

        def progress(done: int, total: int) -> None:
            report(label, done, total)

        if isinstance(teacher, AbuPlusLinear):
            folder = None if store is None else store / _name(teacher.teacher_id, missing)
            rankings = teacher.score_many(queries, union, progress=progress, check=check, store=folder)
        else:
            rankings = teacher.score_many(queries, union, progress=progress, check=check)
        seconds = (time.monotonic() - begun) / len(missing)
        for question, ranking in zip(missing, rankings, strict=True):
            rows.put(teacher.teacher_id, question, _row(ranking, question, seconds))
    found = [rows.get(teacher.teacher_id, q) for q in asked]
    return [row for row in found if row is not None]


def _row(ranking: Ranking, question: Question, seconds: float) -> ScoredRow:
    """The candidates' part of a ranking that may be of more items."""
    place = {item_id: n for n, item_id in enumerate(ranking.item_ids.tolist())}
    wanted = [place[item.item_id] for item in question.candidates]
    return ScoredRow(ranking.tau[wanted], ranking.tau_halves[:, wanted], seconds)


def _name(teacher_id: str, asked: Sequence[Question]) -> str:
    """A folder for one unfinished pass: another teacher or other questions never meet its files."""
    return hashlib.sha256("/".join([teacher_id, *(q.digest for q in asked)]).encode()).hexdigest()[:16]
