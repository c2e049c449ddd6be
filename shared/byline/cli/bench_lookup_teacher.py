"""What the exact teacher costs for a query, measured beside the lookups of ``make bench-lookup``.

Why it exists: a speed-up is quoted over something that was run on the same machine in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byline.diffusion.model import DiffusionModel
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherItem, TeacherQuery


def exact_cost(
    model_directory: Path, items: Sequence[TeacherItem], asked: Sequence[TeacherItem], seed: int, draws: int,
    corpus_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of ``abu_plus`` for each query over ``items``, losses before the step already known, and per item.

    ``corpus_size``: items the model learnt from, which sets the step. One query's cost is its gradient and step
    (``seconds_per_query_fixed``) and a pass over the items, linear in them.
    """
    model = DiffusionModel.load(model_directory)
    curvature = Curvature.load(model_directory / "curvature", model.revision)
    settings = UnlearningSettings(corpus_size=corpus_size, query_draws=draws, item_draws=draws, seed=seed)
    teacher = AbuPlus(model, curvature, settings)
    teacher.fit(items)
    few, many = items[:1], items
    queries = [TeacherQuery(one.image, one.caption) for one in asked]
    teacher.score(queries[0], few)  # the first call warms up; it would count as a fixed cost
    seconds = {}
    for name, candidates in (("few", few), ("many", many)):
        begun = time.perf_counter()
        for query in queries:
            teacher.score(query, candidates)
        seconds[name] = (time.perf_counter() - begun) / len(queries)
    each = (seconds["many"] - seconds["few"]) / (len(many) - len(few))
    return {
        "queries": len(queries), "items": len(items), "draws": draws, "seconds_per_item": each,
        "seconds_per_query_fixed": seconds["few"] - each, "baselines": "known before, not counted",
    }  # fmt: skip
