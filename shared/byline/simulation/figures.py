"""The simulated year as a picture and as the tables of docs/refresh.md.

Why it exists: the page's numbers are made from the result file, so that a second run cannot leave the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.simulation.settings import YearSettings
from byline.simulation.summary import series

Row = Mapping[str, Any]
_COLOURS = {"active": "C0", "random": "C1", "recent": "C2"}
_NAMES = {"active": "active (the planner)", "random": "random, of all that wait",
          "recent": "random, of the half-year's topic"}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """One table of the year and one of the comparison for every head."""
    parts = []
    for name, subject in found["subjects"].items():
        arms, against = subject["summary"]["arms"], subject["summary"]["against_random"]
        seeds = len(next(iter(subject["years"].values())))
        head = ["queries chosen", "before the shift", "2 weeks after", "year's end", "no loop since the shift",
                "all labels", "gap closed", "overlap before → after → end", "newcomers found"]  # fmt: skip
        rows = [[_NAMES[arm], _n(a["before"]), _n(a["after_shift"]), _n(a["end"]), _n(a["frozen_end"]),
                 _n(a["all_labels_end"]), _n(a["gap_closed"], 2),
                 " → ".join(_n(a["overlap"][k]) for k in ("before", "after_shift", "end")),
                 _n(a["newcomers_found"])] for arm, a in arms.items()]  # fmt: skip
        parts += [f"**{name}**, {seeds} seed{'s' if seeds > 1 else ''}; mAP({found['cutoff']}) on held-out live "
                  "prompts by the traffic of the week.", _table(head, rows)]  # fmt: skip
        rows = [[_NAMES[arm], str(a["labels"]), _n(a["second_share"], 2), str(a["releases"]["accepted"]),
                 str(a["releases"]["rejected"]), _counts(a["releases"]["triggers"]),
                 _counts(a["releases"]["accepted_starts"]), str(a["releases"]["unexplained"]),
                 f"{a['alarms']['before_shift']}; {_list(a['alarms']['weeks_until_seen'])}"]
                for arm, a in arms.items()]  # fmt: skip
        parts.append(_table(["queries chosen", "labels", "second topic's share", "accepted", "rejected", "triggers",
                             "accepted starts", "unexplained", "alarms before the shift; weeks until seen"], rows))
        rows = []
        for arm, a in against.items():
            for when, level in a["levels"].items():
                curve = level["on_mean_curve"]
                rows.append([_NAMES[arm], when.replace("_", " "), _n(level["level"]),
                             f"{_or(curve['own'])} / {_or(curve['random'])}",
                             f"{level['reached']} of {level['of']}", _n(level["saved"], 1)])  # fmt: skip
        parts.append(_table(["against random", "random's level", "mAP", "labels to reach it, own / random (mean curve)",
                             "seeds that reach it", "labels saved, seed by seed"], rows))
        if seeds > 1:
            parts.append(" ".join(_verdict(arm, a) for arm, a in against.items()))
    return "\n\n".join(parts)


def draw(found: Mapping[str, Any], settings: YearSettings, path: Path) -> bool:
    """mAP, drift, labels by topic and releases over the weeks, a column for each head; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = found["subjects"]
    drawing, grid = pyplot.subplots(4, len(subjects), figsize=(6.4 * len(subjects), 11), squeeze=False, sharex=True,
                                    gridspec_kw={"height_ratios": [3, 2, 1.6, 1.8]})  # fmt: skip
    for column, (name, subject) in enumerate(subjects.items()):
        quality, drift, labels, releases = (grid[row][column] for row in range(4))
        for place, (arm, years) in enumerate(subject["years"].items()):
            colour = _COLOURS[arm]
            _band(quality, series(years, "map"), colour, _NAMES[arm])
            _band(drift, _smooth(series(years, "overlap")), colour, "")
            second = series(years, "train") * series(years, "second_share")
            labels.plot(series(years, "train").mean(0), color=colour, linewidth=1)
            labels.plot(second.mean(0), color=colour, linestyle=":", linewidth=1.5)
            _marks(releases, drift, years, place, colour)
        first = next(iter(subject["years"].values()))
        quality.plot(series(first, "frozen_map").mean(0), color="grey", linestyle="--", linewidth=1,
                     label="the shift's head, kept")
        quality.axhline(np.mean([year["full"]["map"] for year in first]), color="grey", linestyle=":", linewidth=1,
                        label="every label, at the end")
        quality.set(title=name, ylabel=f"mAP({found['cutoff']}), live prompts")
        quality.legend(fontsize=7, loc="best")
        drift.set_ylabel("overlap with the teacher\n(4-week mean; ▼ alarm)")
        labels.set_ylabel("train labels\n(dotted: 2nd topic)")
        releases.set(ylabel="releases\n(● accepted, × refused)", xlabel="week",
                     yticks=range(len(subject["years"])), yticklabels=list(subject["years"]),
                     ylim=(-0.6, len(subject["years"]) - 0.4))
        for axes in (quality, drift, labels, releases):
            axes.grid(True, alpha=0.25)
            for week, text in ((settings.join_week, "artists join"), (settings.shift_week, "prompts shift"),
                               (settings.withdraw_week, "artists leave")):
                axes.axvline(week - 0.5, color="black", linewidth=0.7, alpha=0.6)
                if axes is labels:
                    axes.annotate(text, (week - 0.3, 0.97), xycoords=("data", "axes fraction"), fontsize=7, va="top")
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=84)
    pyplot.close(drawing)
    return True


def _band(axes: Any, values: npt.NDArray[np.float64], colour: str, label: str) -> None:
    mean = values.mean(0)
    axes.plot(mean, color=colour, linewidth=1.5, label=label or None)
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(np.arange(len(mean)), mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of each week and the three before it."""
    return np.stack([values[:, max(0, week - 3) : week + 1].mean(1) for week in range(values.shape[1])], axis=1)


def _marks(releases: Any, drift: Any, years: Sequence[Row], place: int, colour: str) -> None:
    for number, year in enumerate(years):
        at = place + (number - (len(years) - 1) / 2) * 0.16
        for passed, mark in ((True, "o"), (False, "x")):
            weeks = [r["week"] for r in year["releases"] if r["accepted"] is passed]
            releases.plot(weeks, [at] * len(weeks), mark, color=colour, markersize=3, linestyle="none")
        alarms = [row["week"] for row in year["weeks"] if row["alarm"]]
        drift.plot(alarms, [0.98 - 0.05 * place] * len(alarms), "v", color=colour, markersize=5, linestyle="none",
                   transform=drift.get_xaxis_transform())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _n(figure: Mapping[str, Any], digits: int = 3) -> str:
    if figure["mean"] is None:
        return "–"
    error = "" if figure["error"] is None else f" ± {figure['error']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{error}"


def _verdict(arm: str, against: Mapping[str, Any]) -> str:
    """Whether an arm beats random, from the interval over seeds."""
    parts = []
    for when in ("year", "first_half", "second_half"):
        found = against[when]
        verdict = "better than" if found["low"] > 0 else "worse than" if found["high"] < 0 else "not told from"
        parts.append(f"{when.replace('_', ' ')}: {verdict} random, {found['mean']:+.4f} [{found['low']:+.4f}, "
                     f"{found['high']:+.4f}], above it in {found['above']} of {found['n']} seeds")  # fmt: skip
    return f"*{arm}*, mean mAP of its weeks: {'; '.join(parts)}."


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda c: -c[1])) or "–"


def _list(values: Sequence[int | None]) -> str:
    return ", ".join("not seen" if value is None else str(value) for value in values)


def _or(value: int | None) -> str:
    return "never" if value is None else str(value)
