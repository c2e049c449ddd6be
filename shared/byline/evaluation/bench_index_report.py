"""The table and the figure of ``make bench-index``.

Why it exists: a row of numbers a tier is read by machines; people want the tiers beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_COLUMNS = (
    ("tier", "tier"), ("bytes_per_item", "B/item"), ("build_s", "build s"), ("recall100", "recall@100"),
    ("p50_ms", "p50 ms"), ("p99_ms", "p99 ms"), ("faiss_p50_ms", "FAISS p50"), ("ratio_to_faiss", "ratio"),
    ("batch_p50_ms", "64: ms"), ("batch_ratio_to_faiss", "64: ratio"), ("removed99_recall100", "-99 %: recall"),
    ("removed99_p50_ms", "-99 %: ms"), ("removed50_recall100", "-50 %: recall"),
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table for each set and size; the tier a release would get is marked by a star."""
    out: list[str] = []
    for key in dict.fromkeys((row["set"], row["n"], row["dim"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["n"], row["dim"]) == key]
        out += ["", f"{key[0]}, {key[1]:,} x {key[2]}", ""]
        out.append("| " + " | ".join(title for _, title in _COLUMNS) + " |")
        out.append("|---" * len(_COLUMNS) + "|")
        for row in mine:
            cells = [_shown(row.get(name)) for name, _ in _COLUMNS]
            cells[0] += " *" if row.get("chosen") else ""
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out).strip()


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Recall against the time of one query, a panel for each set and size; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys((row["set"], row["n"]) for row in rows))
    figure, panels = pyplot.subplots(1, len(keys), figsize=(4.6 * len(keys), 4.2), squeeze=False)
    for axes, (name, count) in zip(panels[0], keys, strict=True):
        for row in (r for r in rows if (r["set"], r["n"]) == (name, count)):
            if row["tier"] == "memory_bandwidth":
                axes.axvline(row["p50_ms"], linestyle=":", color="grey", label="memory bandwidth, exact")
                continue
            size = 20 + row["bytes_per_item"] / 20
            axes.scatter(row["p50_ms"], row["recall100"], s=size, alpha=0.7, label=row["tier"])
        axes.set(xscale="log", xlabel="CPU ms of one query (p50)", ylabel="recall@100", title=f"{name}, {count:,}")
        axes.axhline(0.99, color="grey", linewidth=0.8)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
