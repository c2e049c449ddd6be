"""Numbers, sentences, tables and figures of the studies, alike in all six.

Why it exists: docs/studies.md quotes what the commands measured. Tables and sentences are made from the JSON and put
between markers, so that a second run cannot leave the page with the first one's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byline.errors import InvalidRequest
from byline.evaluation.bootstrap import PairedDifference

Figure = Mapping[str, Any]
#: Figures are committed with the page: small enough, and still read on a screen.
_DPI = 84


def gain(difference: PairedDifference) -> dict[str, float]:
    """A paired difference as plain numbers; ``p_value`` is one-sided, for "is not better"."""
    return {"mean": difference.mean, "low": difference.low, "high": difference.high, "p_value": difference.p_value}


def number(figure: Figure) -> str:
    """mean ± standard error over queries."""
    return f"{figure['mean']:.3f} ± {figure['error']:.3f}"


def sentence(one: str, other: str, difference: Mapping[str, float], measure: str) -> str:
    """Whether ``one`` is better than ``other``, from the interval of the paired bootstrap (95 %)."""
    low, high = difference["low"], difference["high"]
    verdict = "is better than" if low > 0 else "is worse than" if high < 0 else "cannot be told from"
    return (f"{one} {verdict} {other}: {measure} {difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}], "
            f"p = {difference['p_value']:.4f}.")  # fmt: skip


def start(row: Mapping[str, Any]) -> str:
    """Marks a head of which no step was better than the untrained one, which therefore it is."""
    return " (start)" if row.get("best_step") == 0 else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def put_block(page: Path, name: str, text: str) -> bool:
    """Replace what stands between ``<!-- study:NAME -->`` and ``<!-- /study:NAME -->``; False without the page.

    InvalidRequest when the page has no such markers.
    """
    if not page.exists():
        return False
    begin, end = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InvalidRequest("--page", f"{page} has no place for the study: add the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


def bars(
    names: Sequence[str], groups: Mapping[str, Sequence[Figure]], path: Path, measure: str,
    levels: Mapping[str, float] | None = None,
) -> bool:  # fmt: skip
    """Grouped bars with errors, and level lines; False where matplotlib is not installed."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.3 * len(names)), 4.2))
    width = 0.8 / len(groups)
    for place, (label, figures) in enumerate(groups.items()):
        at = [i + (place - (len(groups) - 1) / 2) * width for i in range(len(names))]
        axes.bar(at, [f["mean"] for f in figures], width, yerr=[f["error"] for f in figures], label=label, capsize=2)
    for shade, (label, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle="--", linewidth=1, color=f"C{shade + 3}", label=label)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    return _finish(figure, [axes], path, ylabel=measure)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Figure | float]]]], path: Path, labels: Mapping[str, str],
    measure: str, levels: Mapping[str, Mapping[str, float]] | None = None, log: bool = False,
) -> bool:  # fmt: skip
    """One panel per entry, one line per entry of it, points (x, figure with error or number); ``levels`` by panel."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False)
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for label, points in lines.items():
            ordered = sorted(points, key=lambda p: p[0])
            xs = [x for x, _ in ordered]
            ys = [y["mean"] if isinstance(y, Mapping) else y for _, y in ordered]
            errors = [y["error"] if isinstance(y, Mapping) else 0.0 for _, y in ordered]
            axes.errorbar(xs, ys, yerr=errors, marker="o", markersize=4, capsize=2, label=label)
        for shade, (label, level) in enumerate((levels or {}).get(title, {}).items()):
            axes.axhline(level, linestyle="--", linewidth=1, color=f"C{shade + 6}", label=label)
        axes.set(title=title, xlabel=labels.get(title, ""))
        if log:
            axes.set_xscale("log")
    return _finish(figure, list(grid[0]), path, ylabel=measure)


def matrices(
    panels: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Mapping[str, Sequence[str]],
    path: Path,
) -> bool:  # fmt: skip
    """Numbered heat maps side by side."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.6), squeeze=False)
    for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
        axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks(range(len(columns[title])), columns[title], rotation=35, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value < 0.6 else "black")  # fmt: skip
        axes.set_title(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return True


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure: Any, axes: Sequence[Any], path: Path, ylabel: str) -> bool:
    from matplotlib import pyplot

    for ax in axes:
        ax.grid(True, alpha=0.3)
        ax.set_ylabel(ylabel)
        lines = len(ax.get_legend_handles_labels()[0])
        if lines > 5:  # beside the curves, not on them
            ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=2)
        elif lines:
            ax.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return True
