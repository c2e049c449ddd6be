"""Study *gradient*: what the generator's own gradient is worth as a feature, by draws, token directions and columns.

Why it exists: the feature is a cut of the teacher in three places (few draws of a query, few token directions, few
principal directions), and each cut has a price in time or bytes. All rows are plain inner products, nothing is fitted
to labels but the directions to the corpus. Items are the same stored gradients of many draws throughout, except in the
rows that use the feature as it is served: items and queries by the same few draws.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.errors import InvalidRequest
from byline.evaluation.study_bench import Bench, Cell, Row, cell_of
from byline.evaluation.study_features import maps
from byline.evaluation.study_report import curves, number, table
from byline.features.gradient import Gradient
from byline.teachers.curvature import Curvature
from byline.teachers.files import SKETCHES, TeacherFiles, curvature_name
from byline.teachers.gradient_basis import FOLDER, GradientBasis, item_features
from byline.teachers.ranking import TeacherQuery
from byline.teachers.sketch_set import SketchSet
from byline.teachers.token_gradients import TokenGradients

NAME = "gradient"
TITLE = "Gradient: what few draws and few directions of the generator's gradient are worth"
DRAWS = (1, 2, 4, 8)
RANKS = (32, 64, 128)
_TIMED = 5

FloatArray = npt.NDArray[np.float32]


def measure(bench: Bench) -> dict[str, Any]:
    """Rows by draws, by token directions and by columns; mAP on the test queries, and milliseconds of a query.

    InvalidRequest where the model has no sketches with token gradients, or the data no gradient feature.
    """
    if "gradient" not in bench.data.encoders:
        raise InvalidRequest("--size", "this size has no encoder gradient to study")
    stand = _Stand(bench)
    width = stand.basis.dimensions
    ranks = sorted({rank for rank in RANKS if rank < stand.basis.query_map.shape[1]})
    shipped = stand.basis.query_map.shape[1]
    rows: list[tuple[str, Cell, dict[str, float]]] = []

    def add(kind: str, name: str, facts: Mapping[str, object], make: Any, **shown: float) -> None:
        row = bench.row({"gradient": kind, **facts}, make)
        rows.append((kind, cell_of(name, [row | {"facts_of_fit": {}}]), {**shown, "query_ms": row.get("ms", 0.0)}))
        bench.report("gradient", len(rows), len(DRAWS) + len(ranks) + 8)

    for draws in DRAWS:
        add("draws", f"{draws} draws of the query", {"draws": draws}, lambda d=draws: stand.by_draws(d), draws=draws)
    for rank in ranks:
        add("directions", f"{rank} token directions", {"rank": rank}, lambda r=rank: stand.by_rank(r), rank=rank,
            bytes=float(rank * stand.columns * width))  # fmt: skip
    for columns in [c for c in (64, 128, 256, 384, 512, 768, 1024) if c < width] + [width]:
        add("columns", f"{columns} columns, as served", {"columns": columns},
            lambda c=columns: {"judged": stand.judged(stand.served[0][:, :c], stand.served[1][:, :c])},
            columns=columns)  # fmt: skip
    full = bench.row({"gradient": "all"}, stand.scanned)
    return {"rows": [cell.to_json() | {"kind": kind} | facts for kind, cell, facts in rows],
            "scan": cell_of("all token gradients", [full | {"facts_of_fit": {}}]).to_json(),
            "measures": list(maps(bench)), "width": width, "shipped_rank": shipped,
            "draws": stand.basis.settings.draws}  # fmt: skip


class _Stand:
    """Basis, token gradients and queries, read once they are needed."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        model = bench.model
        files = TeacherFiles(bench.work, model.directory)
        places = [files.find(name, model.revision) for name in (SKETCHES, FOLDER)]
        if places[0] is None or places[1] is None:
            raise InvalidRequest("NAME", "this study needs the sketches and the gradient basis shipped with the model")
        tokens = SketchSet.load(places[0], model.revision).tokens
        self.basis = GradientBasis.load(places[1], model.revision)
        factors = files.find(curvature_name(self.basis.selection), model.revision)
        if tokens is None or factors is None:
            raise InvalidRequest("NAME", "this study needs token gradients and curvature beside the model")
        self.curvature = Curvature.load(factors, model.revision).to(model.device)
        row = {item_id: place for place, item_id in enumerate(tokens.item_ids.tolist())}
        self.tokens: TokenGradients = tokens.take(np.array([row[i] for i in bench.data.item_ids.tolist()]))
        rows = bench.data.rows("test")
        self._queries: Sequence[TeacherQuery] = [bench.data.queries[i] for i in rows]
        columns = bench.data.columns(["gradient"])
        self.served = bench.data.query_features[np.ix_(rows, columns)], bench.data.item_features[:, columns]
        self.columns = self.tokens.states.shape[2]
        self._items: FloatArray | None = None

    def judged(self, queries: FloatArray, items: FloatArray) -> dict[str, list[float]]:
        return self._bench.judge(queries @ items.T, self._bench.held_out.tau)

    def by_draws(self, draws: int) -> Row:
        if self._items is None:
            self._items = item_features(self.basis, self.tokens, self.curvature)
        basis = replace(self.basis, settings=replace(self.basis.settings, draws=draws))
        encoder = Gradient(self._bench.model, self.curvature, basis)
        images, texts = [q.image for q in self._queries], [q.prompt for q in self._queries]
        spent = []
        for n in range(_TIMED + 1):
            begun = time.process_time()
            encoder.encode(images[n : n + 1], texts[n : n + 1])
            spent.append(time.process_time() - begun)
        return {"judged": self.judged(encoder.encode(images, texts), self._items),
                "ms": 1e3 * float(np.median(spent[1:]))}  # fmt: skip

    def by_rank(self, rank: int) -> Row:
        basis = GradientBasis.fit(self.tokens, self.curvature, self.basis.settings, dimensions=self.basis.dimensions,
                                  rank=rank)  # fmt: skip
        encoder = Gradient(self._bench.model, self.curvature, basis)
        asked = encoder.encode([q.image for q in self._queries], [q.prompt for q in self._queries])
        return {"judged": self.judged(asked, item_features(basis, self.tokens, self.curvature))}

    def scanned(self) -> Row:
        """Queries of the feature's draws against all that is stored of the items: what the cuts are cut from."""
        found = []
        for query in self._queries:
            encoder = Gradient(self._bench.model, self.curvature, self.basis)
            natural = encoder.natural([query.image], [query.prompt])
            found.append(self.tokens.scores(self.tokens.basis.directions(natural))[0])
        return {"judged": self._bench.judge(np.stack(found), self._bench.held_out.tau)}


def markdown(found: Mapping[str, Any]) -> str:
    """The tables, and what was cut."""
    measures = found["measures"]

    def part(kind: str, head: Sequence[str], *keys: str) -> str:
        rows = [[r["name"], *(number(r[m]) for m in measures), *(f"{r[k]:,.0f}" for k in keys)]
                for r in found["rows"] if r["kind"] == kind]  # fmt: skip
        return table(["", *measures, *head], rows)

    scan = [["all token gradients, no basis", *(number(found["scan"][m]) for m in measures)]]
    return "\n\n".join([
        f"Queries of {found['draws']} draws, {found['shipped_rank']} token directions and {found['width']} columns "
        "are what is shipped.",
        table(["", *measures], scan),
        part("draws", ["ms of CPU a query"], "query_ms"),
        part("directions", ["bytes of the basis"], "bytes"),
        part("columns", []),
    ])  # fmt: skip


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """mAP by draws, by token directions and by columns."""
    main = found["measures"][len(found["measures"]) // 2]
    panels = {
        title: {main: [(r[key], r[main]) for r in found["rows"] if r["kind"] == kind]}
        for title, kind, key in (("draws of the query", "draws", "draws"), ("token directions", "directions", "rank"),
                                 ("columns as served", "columns", "columns"))
    }  # fmt: skip
    return curves(panels, path, {title: title for title in panels}, main)
