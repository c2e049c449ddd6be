"""Study *teachers*: what heads learn from different teachers, and which of them to believe.

Why it exists: a head is as good as its teacher. Heads taught by each teacher are judged by every teacher, on noise
neither the head nor the judging half has seen; beside that, how far teachers agree, and the one judge that is no
teacher: LDS by retraining (``byline evaluate lds``), quoted from its result file where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.agreement import Figure, overlap, spearman
from byline.evaluation.baselines import global_mean_rank_scores, prompt_neighbour_scores
from byline.evaluation.head_report import TEXT_FEATURES
from byline.evaluation.study_bench import Bench, Cell, cell_of
from byline.evaluation.study_data import JUDGE, LEARN
from byline.evaluation.study_report import matrices, number, start, table
from byline.evaluation.study_student import StudentSettings, fit_student
from byline.evaluation.study_teacher_labels import LabelMaker, LabelSettings
from byline.ranker.head import DIRECT
from byline.ranker.labelled_set import LabelledSet

NAME = "teachers"
TITLE = "Teachers: agreement, heads taught by each and judged by each, and retraining"
CURATION = "curation"
#: The variant of ``byline evaluate lds`` that each teacher of the study is.
LDS_VARIANTS = {
    "abu_plus": "abu_plus_linear cross_attention_kv 0.1 sum", "abu_plus_linear all": "abu_plus_linear all 0.1 sum",
    "trak": "trak cross_attention_kv 0.1", "d_trak": "d_trak cross_attention_kv 0.1",
    CURATION: "abu_plus_linear cross_attention_kv 0.1 output_norm",
}  # fmt: skip

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Places of the items and, by split, of the queries that all teachers label; ``tau`` {teacher: [2, q, n]} with the
    queries in the order train, validation, test."""

    items: IntArray
    queries: Mapping[str, IntArray]
    tau: Mapping[str, FloatArray]

    def labelled(self, bench: Bench, teacher: str, split: str, half: int) -> LabelledSet:
        """One split by one teacher's noise half."""
        before = list(self.queries)[: list(self.queries).index(split)]
        start = sum(len(self.queries[name]) for name in before)
        tau = self.tau[teacher][half, start : start + len(self.queries[split])]
        return bench.data.labelled(self.queries[split], half, bench.size.network, tau=tau, items=self.items)


def measure(bench: Bench, lds: Path | None = None) -> dict[str, Any]:
    """``agreement`` and ``heads`` between all teachers, ``no_image`` and raw baselines of each, ``lds`` where known."""
    sample = draw_sample(bench)
    names = list(sample.tau)
    cutoffs = [c for c in bench.size.cutoffs if c < len(sample.items) / 2]
    main = f"map{cutoffs[0]}"
    test = {n: sample.labelled(bench, n, "test", JUDGE) for n in names}
    top = min(100, len(sample.items) // 4)
    agreement = [_agree(a, b, sample, top) for a in names for b in names]
    heads = []
    for learnt in names:
        rows = [bench.row({"teachers": _identity(bench), "learnt": learnt, "student": _student(bench).facts(),
                           "encoders": bench.size.network, "seed": s},
                          lambda n=learnt, s=s: _fit(bench, sample, n, s)) for s in bench.seeds]  # type: ignore[misc]  # fmt: skip
        bench.report("heads of teachers", names.index(learnt) + 1, len(names))
        for judge in names:
            cell = cell_of(learnt, [{"judged": r["judged"][judge], "facts_of_fit": r["facts_of_fit"]} for r in rows])
            heads.append(cell.to_json() | {"learnt": learnt, "judge": judge})
    others = []
    for judge in names:
        for cell in _baselines(bench, sample, judge, test[judge]):
            others.append(cell.to_json() | {"judge": judge})
    return {"teachers": names, "agreement": agreement, "heads": heads, "baselines": others, "main": main, "top": top,
            "measures": [f"map{c}" for c in cutoffs], "lds": _lds(lds), "items": len(sample.items),
            "queries": {k: len(v) for k, v in sample.queries.items()}, "draws": bench.size.draws,
            "query_draws": bench.size.query_draws}  # fmt: skip


def draw_sample(bench: Bench) -> Sample:
    """A seeded part of the corpus and of each split, labelled by every teacher."""
    data, size = bench.data, bench.size
    rng = np.random.default_rng([bench.seed, 4])
    items = np.sort(rng.permutation(len(data.items))[: size.teacher_items]).astype(np.int64)
    queries = {split: np.sort(rng.permutation(data.rows(split))[:count])
               for split, count in zip(("train", "validation", "test"), size.teacher_queries, strict=True)}  # fmt: skip
    rows = np.concatenate(list(queries.values()))
    maker = LabelMaker(
        bench.model, [data.items[i] for i in items], [data.queries[i] for i in rows],
        LabelSettings(size.draws, size.query_draws, size.curvature_samples, seed=bench.seed),
        bench.work / "teachers", bench.work / "labels", bench.report,
    )  # fmt: skip
    return Sample(items, queries, {CURATION: data.tau[:, rows][:, :, items], **maker.make()})


def _student(bench: Bench) -> StudentSettings:
    """The loss whose scale is the ranking's own: the listwise one's is a number of items, too many of so small a part
    of a corpus (study *pruning*). Judged while it learns by the smallest cut-off for the same reason."""
    return replace(bench.student, loss=bench.size.rank_loss, evaluate_at=bench.size.cutoffs[0])


def _identity(bench: Bench) -> list[object]:
    size = bench.size
    return ["kernels apart", size.teacher_items, size.teacher_queries, size.draws, size.query_draws,
            size.curvature_samples, bench.seed]  # fmt: skip


def _agree(one: str, other: str, sample: Sample, top: int) -> dict[str, Any]:
    """Spearman and overlap on the test queries: one teacher's learning half against the other's judging half, so that
    the diagonal is a teacher against itself under other noise."""
    count = len(sample.queries["test"])
    pairs = list(zip(sample.tau[one][LEARN, -count:], sample.tau[other][JUDGE, -count:], strict=True))
    rank = Figure.of([spearman(a, b) for a, b in pairs])
    shared = Figure.of([overlap(a, b, top) for a, b in pairs])
    return {"one": one, "other": other, "spearman": asdict(rank), "overlap": asdict(shared)}


def _fit(bench: Bench, sample: Sample, teacher: str, seed: int) -> dict[str, Any]:
    """A head taught by one teacher, judged by all. Its features are the network's: ``gradient`` is made of one of the
    teachers itself (K/V, output's norm), and a head with it would follow that one whatever it is taught."""
    student = fit_student(
        sample.labelled(bench, teacher, "train", LEARN), sample.labelled(bench, teacher, "validation", JUDGE),
        bench.data.blocks_of(bench.size.network), _student(bench), seed,
    )  # fmt: skip
    judged = {}
    for judge in sample.tau:
        held_out = sample.labelled(bench, judge, "test", JUDGE)
        judged[judge] = bench.judge(student.scores(held_out), held_out.tau)
    return {"judged": judged, "facts_of_fit": student.facts()}


def _baselines(bench: Bench, sample: Sample, judge: str, held_out: LabelledSet) -> list[Cell]:
    """No-image orders learnt from the judge's own training labels, and its other noise half."""
    train = sample.labelled(bench, judge, "train", LEARN)
    orders = {"global mean rank": global_mean_rank_scores(train, held_out.queries)}
    text = [name for name in bench.data.encoders if name in TEXT_FEATURES][:1]
    if text:
        known, asked = (bench.data.query_features[np.ix_(sample.queries[split], bench.data.columns(text))]
                        for split in ("train", "test"))  # fmt: skip
        orders["per-caption mean rank"] = prompt_neighbour_scores(train, known, asked)
    for name in (n for n in bench.data.encoders if n in DIRECT):
        orders[f"{name}, untuned"] = bench.nearness(sample.queries["test"], (name,))[:, sample.items]
    orders["its other noise half"] = sample.labelled(bench, judge, "test", LEARN).tau
    return [Cell(name, {m: np.asarray([v]) for m, v in bench.judge(scores, held_out.tau).items()})
            for name, scores in orders.items()]  # fmt: skip


def _lds(path: Path | None) -> dict[str, dict[str, float]]:
    """LDS and its error by teacher, from a result file of ``byline evaluate lds``; empty without one."""
    if path is None or not path.exists():
        return {}
    found = {row["variant"]: row for row in json.loads(path.read_text())["variants"]}
    return {teacher: {"mean": found[variant]["lds"], "error": found[variant]["error"]}
            for teacher, variant in LDS_VARIANTS.items() if variant in found}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and two tables."""
    names, main = found["teachers"], found["main"]
    heads = {(r["learnt"], r["judge"]): r for r in found["heads"]}
    base = {(r["name"], r["judge"]): r for r in found["baselines"]}
    agree = {(r["one"], r["other"]): r for r in found["agreement"]}
    lines = [f"{found['items']} items, queries {found['queries']}, {found['draws']} draws an item and "
             f"{found['query_draws']} a query in two disjoint halves."]  # fmt: skip
    for judge in names:
        best = max(names, key=lambda n: heads[n, judge][main]["mean"])
        own = heads[judge, judge][main]["mean"]
        ceiling = base["its other noise half", judge][main]["mean"]
        other = f"the head of {best} does best ({heads[best, judge][main]['mean']:.3f})"
        said = "its own head is best" if best == judge else other
        lines.append(f"Judged by {judge}: {said}; its own head {main} {own:.3f} of a ceiling of {ceiling:.3f}.")
    rows = []
    for judge in names:
        lds = found["lds"].get(judge)
        rows.append([judge, *(f"{agree[judge, n]['spearman']['mean']:.2f} / {agree[judge, n]['overlap']['mean']:.2f}"
                              for n in names), number(lds) if lds else ""])  # fmt: skip
    one = table([f"Spearman / overlap@{found['top']}", *names, "LDS"], rows)
    orders = [(f"head of {n}{start(heads[n, n])}", [heads[n, j] for j in names]) for n in names]
    orders += [(n, [base[n, j] for j in names]) for n in dict.fromkeys(r["name"] for r in found["baselines"])]
    cells = [[name, *(f"{number(r[main])}; {r['top1']['mean']:.2f}" for r in row)] for name, row in orders]
    two = table([f"{main}; top-1 recall", *(f"judged by {n}" for n in names)], cells)
    return " ".join(lines) + f"\n\n{one}\n\n{two}"


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Agreement between teachers, and heads by judge."""
    names = found["teachers"]
    agree = {(r["one"], r["other"]): r["spearman"]["mean"] for r in found["agreement"]}
    heads = {(r["learnt"], r["judge"]): r[found["main"]]["mean"] for r in found["heads"]}
    panels = {
        "Spearman, two noise halves": [[agree[a, b] for b in names] for a in names],
        f"{found['main']} of heads (row) by judge": [[heads[a, b] for b in names] for a in names],
    }
    return matrices(panels, names, {title: names for title in panels}, path)
