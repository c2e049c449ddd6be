"""How a trainer's mAP grows with the number of labelled queries: figures and a picture from finished runs.

Why it exists: whether to buy more labels or a better student is read off this curve, and a head that needs no labels
at all for most of what it knows looks quite different on it from one that learns everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byline.errors import LabelsNotUsable
from byline.evaluation.bench_head_report import Precisions, Row


def run_name(trainer: str, share: float) -> str:
    """What the run of ``trainer`` on a ``share`` of the training queries is called; all of them: its own name."""
    return trainer if share >= 1.0 else f"{trainer} @ {share:g}"


def curve_figures(rows: Sequence[Row], precisions: Precisions, trainers: Sequence[str], shares: Sequence[float]
                  ) -> dict[str, list[dict[str, Any]]]:
    """Per trainer its points in order of the number of queries, as far as they were run: mAP by L, and what it cost.

    Raises LabelsNotUsable for a trainer without any run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for trainer in trainers:
        points = [_point(run_name(trainer, share), rows, precisions) for share in sorted({*shares, 1.0})
                  if run_name(trainer, share) in precisions]
        if not points:
            raise LabelsNotUsable(f"{trainer} was not run")
        found[trainer] = points
    return found


def _point(name: str, rows: Sequence[Row], precisions: Precisions) -> dict[str, Any]:
    runs = [row for row in rows if row["trainer"] == name]
    return {
        "queries": int(np.mean([row["queries"] for row in runs])),
        "pairs": float(np.mean([row["pairs"] for row in runs])),
        "seconds": float(np.mean([row["seconds"] for row in runs])),
        "map": {str(cutoff): float(values.mean()) for cutoff, values in precisions[name].items()},
        "standard_error": {str(cutoff): float(values.std() / values.shape[0] ** 0.5)
                           for cutoff, values in precisions[name].items()},
    }  # fmt: skip


def draw_curve(curve: Mapping[str, Sequence[Mapping[str, Any]]], by_cutoff: Mapping[str, Mapping[str, Any]],
               path: Path) -> bool:
    """A panel per L, a line per trainer, with the best raw feature and the ceiling; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(by_cutoff), figsize=(4.2 * len(by_cutoff), 4.2), sharey=True, squeeze=False)
    for axes, (cutoff, found) in zip(panels[0], by_cutoff.items(), strict=True):
        for number, (name, points) in enumerate(curve.items()):
            axes.errorbar([p["queries"] for p in points], [p["map"][cutoff] for p in points],
                          [p["standard_error"][cutoff] for p in points], color=f"C{number}", marker="o", capsize=2,
                          label=name)
        for kind, style, label in (("raw", ":", "best raw feature"), ("direct", "-.", "gradient, nothing learnt"),
                                   ("ceiling", "--", "labels' ceiling")):
            values = [row["map"] for row in found["baselines"].values() if row["kind"] == kind]
            if values:
                axes.axhline(max(values), color="0.4", linestyle=style, label=label)
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="training queries", title=f"mAP({cutoff}), held out")
        ticks = sorted({p["queries"] for points in curve.values() for p in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
