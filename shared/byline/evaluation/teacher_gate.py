"""The validation gate: may the first-order form make labels in place of the exact one?

Why it exists: it costs a hundredth of the exact form, and is only right where one step is small. The gate asks the
exact form, the first order, and the exact form under other noise the same questions (design §9), and the exact form
with forced steps of 10^k / N where the linear regime begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.errors import TeacherNotUsable
from byline.evaluation.agreement import MEASURES, Decision, Figure, agreement, decide, slope, spearman, summarise
from byline.evaluation.kept_rows import KeptRows
from byline.evaluation.teacher_scores import Question, Report, ScoredRow, ScoreRows, score_all
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.ranking import Check, Teacher, never_cancelled

Numbers = dict[str, Any]


@dataclass(frozen=True)
class GateTeachers:
    """The exact form, the first order under the same noise, and the exact form under independent noise.

    ``other`` differs in the seed alone, which drives the items' noise and the query's.
    """

    exact: Teacher
    linear: Teacher
    other: Teacher


@dataclass(frozen=True)
class Gate:
    """Everything the gate found. ``rows``: one a query; ``decades``: one a step size."""

    gate: dict[str, Figure]
    self_agreement: dict[str, Figure]
    cross: dict[str, Figure]
    halves: Figure
    decision: Decision
    rows: list[Numbers]
    decades: list[Numbers]

    def to_json(self) -> Numbers:
        """Under the names of design §12, standard errors beside the figures."""
        return {
            "gate": as_numbers(self.gate), "self": as_numbers(self.self_agreement), "cross": as_numbers(self.cross),
            "halves": {"spearman": _rounded(self.halves.mean)}, "decision": asdict(self.decision), "rows": self.rows,
            "decades": self.decades,
        }  # fmt: skip


def run_gate(
    teachers: GateTeachers, asked: Sequence[Question], rows: ScoreRows, report: Report, *, store: Path | None = None,
    check: Check = never_cancelled,
) -> Gate:  # fmt: skip
    """Score all questions with the three teachers (what ``rows`` has is not made again) and compare.

    ``gate`` is first order against exact under the same noise: the error of linearising alone. ``self`` is exact
    against exact under independent noise of items and query: what noise alone does. ``cross`` is first order against
    exact under independent noise: if it equals ``self``, linearising costs nothing that noise does not cost anyway.
    ``halves`` is the exact form's one half of the draws against the other, for one query gradient.
    """
    linear = score_all("first order", teachers.linear, asked, rows, report, store=store, check=check)
    exact = score_all("exact", teachers.exact, asked, rows, report, check=check)
    other = score_all("exact, other noise", teachers.other, asked, rows, report, check=check)
    found: list[Numbers] = []
    pairs: dict[str, list[dict[str, float]]] = {"gate": [], "self": [], "cross": []}
    for question, e, f, o in zip(asked, exact, linear, other, strict=True):
        row = {"gate": agreement(e.tau, f.tau), "self": agreement(e.tau, o.tau), "cross": agreement(f.tau, o.tau)}
        for name, value in row.items():
            pairs[name].append(value)
        found.append(_query_row(question, row, e, f))
    gate, itself, cross = (summarise(pairs[name]) for name in ("gate", "self", "cross"))
    halves = Figure.of([spearman(*row.halves) for row in exact])
    return Gate(gate, itself, cross, halves, decide(gate, itself), found, [])


def step_decades(
    teacher: Teacher,
    linear: Teacher,
    asked: Sequence[Question],
    decades: Sequence[int],
    path: Path,
    report: Report,
    check: Check = never_cancelled,
) -> list[Numbers]:
    """The exact form with the step forced to 10^k / N against the first order, per decade k, mean over the questions.

    Too small a step is lost in rounding (``lost``: share of the weight change), too large a one leaves the linear
    regime; in between Spearman and slope are 1. Rows are kept in ``path`` and reused. TeacherNotUsable when
    ``teacher`` is not an exact form.
    """
    if not isinstance(teacher, AbuPlus):
        raise TeacherNotUsable(f"{teacher.teacher_id} takes no step, so none can be forced; ask an exact form")
    kept = KeptRows(path)
    found: list[Numbers] = []
    total, done = len(asked) * len(decades), 0
    for question in asked:
        key = f"{linear.teacher_id}/{teacher.teacher_id}/{question.digest}"
        tau: dict[str, Any] = {}
        for k in decades:
            row = kept.get(f"{key}/{k}")
            if row is None:
                if not tau:
                    tau["direction"] = teacher.direction(question.query)
                    tau["linear"] = linear.score(question.query, question.candidates, check=check).tau
                step = 10.0**k / teacher.settings.corpus_size
                rise = teacher.rise(tau["direction"], step, question.candidates, check=check).mean(axis=1)
                exact = rise / (step * teacher.settings.corpus_size)
                row = {
                    "query": question.number, "decade": k, "spearman": _rounded(spearman(tau["linear"], exact)),
                    "slope": _rounded(slope(tau["linear"], exact)),
                    "lost": _rounded(teacher.lost_in_rounding(tau["direction"], step)),
                }  # fmt: skip
                kept.put(f"{key}/{k}", row)
            found.append(row)
            done += 1
            report("step sizes", done, total)
    return [_decade(k, [row for row in found if row["decade"] == k]) for k in decades]


def compare(
    teachers: dict[str, Teacher], asked: Sequence[Question], rows: ScoreRows, report: Report, *,
    store: Path | None = None, check: Check = never_cancelled,
) -> tuple[list[Numbers], dict[str, float]]:  # fmt: skip
    """Every pair of ``teachers`` (by label) on the same questions, and each one's seconds per query."""
    scored: dict[str, list[ScoredRow]] = {
        label: score_all(label, teacher, asked, rows, report, store=store, check=check)
        for label, teacher in teachers.items()
    }
    labels = list(scored)
    pairs: list[Numbers] = []
    for place, one in enumerate(labels):
        for two in labels[place + 1 :]:
            measured = [agreement(a.tau, b.tau) for a, b in zip(scored[one], scored[two], strict=True)]
            pairs.append({"one": one, "two": two, **as_numbers(summarise(measured))})
    return pairs, {label: float(np.mean([row.seconds for row in found])) for label, found in scored.items()}


def as_numbers(figures: dict[str, Figure]) -> Numbers:
    """Means under their names and standard errors in ``standard_error``; None where nothing was measured."""
    return {
        **{name: _rounded(figures[name].mean) for name in MEASURES},
        "standard_error": {name: _rounded(figures[name].standard_error) for name in MEASURES},
    }


def _query_row(question: Question, row: dict[str, dict[str, float]], exact: ScoredRow, linear: ScoredRow) -> Numbers:
    return {
        "query": question.number, "prompt": question.query.prompt, "candidates": len(question.candidates),
        **{name: {m: _rounded(v) for m, v in value.items()} for name, value in row.items()},
        "slope": _rounded(slope(linear.tau, exact.tau)),
        "seconds": {"exact": round(exact.seconds, 2), "first_order": round(linear.seconds, 2)},
    }  # fmt: skip


def _decade(k: int, rows: Sequence[Numbers]) -> Numbers:
    if not rows:
        raise TeacherNotUsable("a step size needs at least one query: raise --decade-queries")
    means = {name: _rounded(Figure.of([r[name] if r[name] is not None else np.nan for r in rows]).mean)
             for name in ("spearman", "slope", "lost")}  # fmt: skip
    return {"step": f"1e{k}/N", "decade": k, "queries": len(rows), **means}


def _rounded(value: float) -> float | None:
    """Six significant digits, and None for what JSON has no word for."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
