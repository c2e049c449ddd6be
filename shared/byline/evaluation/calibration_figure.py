"""The figure of ``byline evaluate calibration``: stated against found, and what passes as attributable.

Why it exists: one number for a calibration hides where it errs, and a share of false attributions hides which kind of
picture is mistaken for the model's own.
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

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6))
    curve, floors = figures["curve"], figures["abstention"]
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    if curve is not None:
        for name, label in (("retrieved", f"first {curve['top']} retrieved"), ("shown", "first 20 retrieved")):
            part = curve[name]
            left.plot(part["stated"], part["found"], "o-", markersize=4,
                      label=f"{label}: error {part['error']:.3f} (luck up to {part['luck']:.3f})")
        left.legend(fontsize=8)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability stated",
                 ylabel=f"share among the teacher's first {curve['top']}",
                 title=f"{curve['retrieved']['queries']} test queries")
    if floors is not None:
        rows = [("real queries", 1 - floors["refused"], "C0"),
                ("real, by the score alone", 1 - floors["refused_alone"], "C0")]
        if floors["shuffled_passed"] is not None:
            rows.append(("real, other prompt", floors["shuffled_passed"], "C1"))
        rows += [(kind, share, "C3") for kind, share in floors["false_attribution"].items()]
        rows += [(f"{kind}, kind unseen", share, "C3") for kind, share in floors["unseen_kind"].items()]
        down = np.arange(len(rows))[::-1]
        right.barh(down, [share for _, share, _ in rows], color=[colour for _, _, colour in rows])
        right.set_yticks(down, [name for name, _, _ in rows], fontsize=8)
        right.axvline(figures["allowed"], color="k", linewidth=1, linestyle=":")
        right.set(xlim=(0, 1), xlabel="share answered as attributable")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
