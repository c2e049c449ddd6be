"""The figure of ``byline evaluate head``: orders by L on one side, kinds of queries on the other.

Why it exists: a table of forty numbers hides what two bars show: how far a head is from the raw features below it and
from the ceiling above, and on which queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """From the figures of the result file; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    orders, parts = figures["orders"], figures["slices"]
    measures = [name for name in orders[0]["measures"] if name.startswith("map_")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.2, 0.3 * len(parts) + 1.5)))
    width = 0.85 / len(orders)
    for place, order in enumerate(orders):
        found = [order["measures"][name] for name in measures]
        left.bar(np.arange(len(measures)) + place * width, [f["mean"] for f in found], width,
                 yerr=[f["standard_error"] for f in found], label=order["name"], alpha=0.9,
                 color={"head": "C0", "other_head": "C1", "ceiling": "0.3"}.get(order["kind"]))
    left.set_xticks(np.arange(len(measures)) + 0.4, [f"mAP({name.partition('_')[2]})" for name in measures])
    left.set_ylim(0, 1)
    left.grid(True, axis="y", alpha=0.3)
    left.legend(fontsize=7)
    down = np.arange(len(parts))[::-1]
    right.barh(down, [part["head"] for part in parts], xerr=[part["standard_error"] for part in parts], alpha=0.8,
               label="head")
    right.plot([part["best_raw"] for part in parts], down, "C1D", label="best raw feature")
    if parts and parts[0]["ceiling"] is not None:
        right.plot([part["ceiling"] for part in parts], down, "k|", markersize=12, label="ceiling")
    right.set_yticks(down, [f"{part['name'][:44]} ({part['queries']})" for part in parts], fontsize=7)
    right.set(xlim=(0, 1), xlabel=f"mAP({figures['map']['L']})")
    right.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
