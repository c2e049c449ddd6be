"""Study *options*: labels weighted by their standard errors, and what sets query and item apart, each against without.

Why it exists: an option of the fit is worth its line of code only where it wins on the validation queries. The test
queries are reported beside them and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from byline.evaluation.study_bench import Bench, Fit, cell_of
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import bars, gain, number, sentence, table

NAME = "options"
TITLE = "Options of the fit: each against the fit without it"
#: Options of the head, on by default; measured switched off.
HEAD = ("own_query_mean", "residual", "item_prior")


def measure(bench: Bench) -> dict[str, Any]:
    """A row for every arm, the plain fit first and then what differs from it by one option."""
    size, student = bench.size, bench.student
    measures = maps(bench)
    main = measures[len(measures) // 2]
    rows: list[dict[str, Any]] = []
    for encoders in (size.network, size.served):
        for loss in (student.loss, size.rank_loss):
            plain = Fit(replace(student, loss=loss), encoders)
            changed = {"weighted": replace(plain, student=replace(plain.student, weighted=True))}
            if encoders == size.network and loss == student.loss:
                off = {name: replace(plain.student, **{name: False}) for name in HEAD}  # type: ignore[arg-type]
                changed |= {f"without {name}": replace(plain, student=each) for name, each in off.items()}
            rows += _compared(bench, f"{'+'.join(encoders)}, {loss}", plain, changed, main)
    return {"rows": rows, "measures": list(measures), "main": main,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _compared(bench: Bench, name: str, plain: Fit, changed: Mapping[str, Fit], main: str) -> list[dict[str, Any]]:
    found = {}
    for option, fit in {"plain": plain, **changed}.items():
        rows = bench.fitted_rows(f"{name}, {option}", fit)
        found[option] = cell_of(option, rows), cell_of(option, rows, "validation")
    first = found["plain"]
    out = []
    for option, (test, validation) in found.items():
        row = test.to_json() | {"name": name, "option": option, "validation": {
            measure: {"mean": validation.mean(measure), "error": validation.error(measure)}
            for measure in validation.values
        }}  # fmt: skip
        if option != "plain":
            by_seed = validation.values[main].mean(1) - first[1].values[main].mean(1)
            row |= {"on_validation": gain(validation.minus(first[1], main)), "by_seed": by_seed.tolist(),
                    "on_test": gain(test.minus(first[0], main)), "wins": wins(by_seed)}  # fmt: skip
        out.append(row)
    return out


def wins(by_seed: Any) -> bool:
    """Whether the mean gain on validation is above zero by more than the seeds lie apart."""
    return bool(np.mean(by_seed) > np.ptp(by_seed))


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and the table."""
    main = found["main"]
    lines = []
    for r in found["rows"]:
        if r["option"] != "plain":
            seeds = ", ".join(f"{value:+.3f}" for value in r["by_seed"])
            lines.append(sentence(f"{r['name']}, {r['option']}", "plain", r["on_validation"], f"validation {main}"))
            lines.append(f"By seed {seeds}; test {r['on_test']['mean']:+.3f}.")
    cells = [[r["name"], r["option"], *(number(r["validation"][m]) for m in found["measures"]),
              *(number(r[m]) for m in found["measures"]), number(r["top1"])] for r in found["rows"]]  # fmt: skip
    cells += [[r["name"], r["kind"], *("" for _ in found["measures"]), *(number(r[m]) for m in found["measures"]),
               number(r["top1"])] for r in found["baselines"]]  # fmt: skip
    head = ["head", "option", *(f"validation {m}" for m in found["measures"]), *found["measures"], "top-1"]
    return " ".join(lines) + "\n\n" + table(head, cells)


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Bars of the validation mAP by arm and option."""
    main = found["main"]
    names = [f"{r['name']}\n{r['option']}".replace(", ", "\n") for r in found["rows"]]
    groups = {"validation": [r["validation"][main] for r in found["rows"]], "test": [r[main] for r in found["rows"]]}
    return bars(names, groups, path, main)
