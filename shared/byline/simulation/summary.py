"""What the years of several seeds say together: recovery, labels to reach a level, releases, alarms, with errors.

Why it exists: a page must not say more than its numbers. Arms share their worlds, so they are compared seed by seed;
errors are standard errors over seeds, of which there are few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.drift.windows import mean_of
from byline.simulation.settings import ACTIVE, RANDOM, YearSettings

Row = Mapping[str, Any]
#: Weeks a level is averaged over, and must hold for.
SPAN = 4
#: Below it the head of all labels is no better than the one that was kept, and a share of the gap means nothing.
LEAST_GAP = 0.02


def figure(values: Sequence[float] | npt.NDArray[np.floating]) -> dict[str, float | int | None]:
    """Mean over seeds with its standard error (None for one seed); NaN left out."""
    found = np.asarray([value for value in values if np.isfinite(value)], dtype=np.float64)
    if not len(found):
        return {"mean": None, "error": None, "n": 0}
    error = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
    return {"mean": float(found.mean()), "error": error, "n": len(found)}


def paired(differences: npt.NDArray[np.float64]) -> dict[str, float | int | None]:
    """Mean difference over seeds, its 95 % interval (Student's t; None for one seed), seeds above zero."""
    found = mean_of(differences.tolist())
    sure = found.n > 1
    return figure(differences) | {"low": found.low if sure else None, "high": found.high if sure else None,
                                  "above": int((differences > 0).sum())}  # fmt: skip


def series(years: Sequence[Row], name: str) -> npt.NDArray[np.float64]:
    """[seeds, weeks]; NaN where a week has no such number."""
    rows = [[week.get(name) for week in year["weeks"]] for year in years]
    return np.asarray([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def summarise(arms: Mapping[str, Sequence[Row]], settings: YearSettings) -> dict[str, Any]:
    """``arms``: the years of every arm, in the order of the seeds."""
    found = {arm: _arm(years, settings) for arm, years in arms.items()}
    compared = {}
    if RANDOM in arms:
        others = [arm for arm in arms if arm != RANDOM]
        compared = {arm: _against(arms[arm], arms[RANDOM], settings) for arm in others}
    return {"arms": found, "against_random": compared}


def timeline(subjects: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Week by week: labels of all kinds, mAP and overlap, means over the seeds of every head and arm."""
    rows: list[dict[str, Any]] = []
    for head, subject in subjects.items():
        for arm, years in subject["years"].items():
            means = {name: series(years, name).mean(0) for name in ("labels", "map", "overlap")}
            rows += [{"head": head, "arm": arm, "week": int(week["week"]), "seeds": len(years)}
                     | {name: float(values[at]) for name, values in means.items()}
                     for at, week in enumerate(years[0]["weeks"])]  # fmt: skip
    return rows


def labels_to_target(subjects: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Labels to reach random's mAP of the year's end, on the mean curves of the first head that has both arms; None
    for an arm that does not reach it."""
    for head, subject in subjects.items():
        compared = subject["summary"]["against_random"].get(ACTIVE)
        if compared is not None:
            end = compared["levels"]["end"]
            curve = end["on_mean_curve"]
            return {"active": curve["own"], "random": curve["random"], "head": head, "map": end["level"]["mean"]}
    return {"active": None, "random": None}


def _spans(settings: YearSettings) -> dict[str, slice]:
    shift, end = settings.shift_week, settings.weeks
    span = min(SPAN, shift, end - shift)
    return {"before": slice(shift - span, shift), "after_shift": slice(shift, shift + 2), "end": slice(end - span, end)}


def _arm(years: Sequence[Row], settings: YearSettings) -> dict[str, Any]:
    spans, quality = _spans(settings), series(years, "map")
    frozen = series(years, "frozen_map")[:, spans["end"]].mean(1)
    full = np.asarray([year["full"]["map"] for year in years])
    end = quality[:, spans["end"]].mean(1)
    out: dict[str, Any] = {name: figure(quality[:, part].mean(1)) for name, part in spans.items()}
    out |= {"frozen_end": figure(frozen), "all_labels_end": figure(full),
            "gap_closed": figure(np.where(full - frozen > LEAST_GAP, (end - frozen) / (full - frozen), np.nan)),
            "overlap": {name: figure(series(years, "overlap")[:, part].mean(1)) for name, part in spans.items()},
            "newcomers_found": figure(series(years, "newcomers_found")[:, -1]),
            "train_labels": int(years[0]["weeks"][-1]["train"]), "labels": int(years[0]["weeks"][-1]["labels"]),
            "second_share": figure(series(years, "second_share")[:, -1])}  # fmt: skip
    return out | {"releases": _releases(years), "alarms": _alarms(years, settings)}


def _releases(years: Sequence[Row]) -> dict[str, Any]:
    every = [release for year in years for release in year["releases"]]
    accepted = [release for release in every if release["accepted"]]
    triggers = Counter(text.partition(":")[0] for release in every for text in release["metrics"]["triggers"])
    refused = Counter(text.partition(":")[0] for release in every for text in release["metrics"]["gate"]["reasons"])
    starts = Counter(release["metrics"]["fit"]["start"] for release in accepted)
    return {"built": len(every), "accepted": len(accepted), "rejected": len(every) - len(accepted),
            "triggers": dict(triggers), "refused_for": dict(refused), "accepted_starts": dict(starts),
            "unexplained": sum(bool(release["unexplained"]) for release in every)}  # fmt: skip


def _alarms(years: Sequence[Row], settings: YearSettings) -> dict[str, Any]:
    weeks = [[row["week"] for row in year["weeks"] if row["alarm"]] for year in years]
    after = [min((w for w in found if w >= settings.shift_week), default=None) for found in weeks]
    return {"weeks": weeks, "before_shift": sum(w < settings.shift_week for found in weeks for w in found),
            "weeks_until_seen": [None if w is None else w - settings.shift_week for w in after]}  # fmt: skip


def _against(years: Sequence[Row], random: Sequence[Row], settings: YearSettings) -> dict[str, Any]:
    """Seed by seed: mean mAP of the whole year and of both halves, and the labels to reach random's levels."""
    pairs = list(zip(years, random, strict=True))
    mine, theirs = (series([pair[side] for pair in pairs], "map") for side in (0, 1))
    shift, difference = settings.shift_week, mine - theirs
    spans = _spans(settings)
    levels = {}
    for name, part, start in (("before_shift", spans["before"], 1), ("end", spans["end"], shift)):
        stop = part.stop
        reached: dict[str, list[int | None]] = {"own": [], "random": []}
        for (year, other), quality, reference in zip(pairs, mine, theirs, strict=True):
            level = float(reference[part].mean())
            reached["own"].append(labels_to_reach(year, quality, level, start, stop))
            reached["random"].append(labels_to_reach(other, reference, level, start, stop))
        saved = [b - a for a, b in zip(reached["own"], reached["random"], strict=True)
                 if a is not None and b is not None]  # fmt: skip
        levels[name] = {"level": figure(theirs[:, part].mean(1)), "labels": reached, "saved": figure(saved),
                        "reached": len([a for a in reached["own"] if a is not None]), "of": len(pairs),
                        "on_mean_curve": _mean_curve(pairs, mine, theirs, part, start)}  # fmt: skip
    return {"year": paired(difference.mean(1)), "first_half": paired(difference[:, 1:shift].mean(1)),
            "second_half": paired(difference[:, shift:].mean(1)),
            "end": paired(difference[:, spans["end"]].mean(1)), "levels": levels}  # fmt: skip


def _mean_curve(pairs: Sequence[tuple[Row, Row]], mine: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64],
                part: slice, start: int) -> dict[str, int | None]:
    """The same of the curves' means over seeds, which are less noisy than any one of them."""
    level = float(theirs[:, part].mean())
    return {"own": labels_to_reach(pairs[0][0], mine.mean(0), level, start, part.stop),
            "random": labels_to_reach(pairs[0][1], theirs.mean(0), level, start, part.stop)}  # fmt: skip


def labels_to_reach(year: Row, quality: npt.NDArray[np.float64], level: float, start: int, stop: int) -> int | None:
    """Labels of all kinds in the first week of [start, stop) from which on the mean of ``SPAN`` weeks (fewer at the
    end) is ``level`` or more; None if there is no such week."""
    for week in range(start, stop):
        if quality[week : min(week + SPAN, stop)].mean() >= level - 1e-9:
            return int(year["weeks"][week]["labels"])
    return None
