"""What is shown of drift and of the labels: read from the measured rows, the same for API, metrics and alarm.

Why it exists: an operator who compares a graph with a command line must see one figure, not two ways of counting it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from prometheus_client import Counter, Gauge
from sqlalchemy import Connection

from byline.drift.alarms import DriftAlarm, recent_alarms
from byline.drift.clusters import stored_clusters
from byline.drift.windows import Mean, Window, mean_of, windows
from byline.rankings.curated import LabelCounts, label_counts, measured_rows, pruning_rows, reliability_rows

#: Purposes of the two series: what clients ask, drawn at random; and corpus and file prompts, drawn at random.
LIVE, CURATED = ("drift",), ("uniform",)

AGREEMENT = Gauge("byline_drift_agreement", "Student and teacher on live queries of the last window, mean",
                  ["model", "measure", "cluster", "bound"])  # fmt: skip
DRIFT_QUERIES = Gauge("byline_drift_queries", "Live queries measured in the last window", ["model"])
SAMPLES_DROPPED = Counter("byline_drift_samples_dropped_total", "Live samples that the teacher had no time for",
                          ["model"])  # fmt: skip
ALARM = Gauge("byline_drift_alarm", "1 while an alarm of drift is open", ["model"])
PRUNING = Gauge("byline_pruning_loss", "Items outside the shortlists that beat the last of the top inside, by its size",
                ["model", "bound"])  # fmt: skip
RELIABILITY = Gauge("byline_label_reliability", "Labels against themselves under other noise", ["model", "measure"])
LABELS = Gauge("byline_labelled_queries", "Queries with a label", ["model", "split"])


@dataclass(frozen=True)
class DriftReport:
    """Windows with something in them, latest first; ``examples``: a prompt of each cluster; alarms, latest first."""

    windows: tuple[Window, ...]
    examples: tuple[str, ...]
    alarms: tuple[DriftAlarm, ...]

    @property
    def open_alarm(self) -> DriftAlarm | None:
        """The one that nobody has dealt with."""
        return next((alarm for alarm in self.alarms if alarm.closed_at is None), None)


@dataclass(frozen=True)
class LabelReport:
    """The labels: how many, how far they repeat themselves under other noise, and what their shortlists miss.

    ``missed``: items outside both shortlists that beat the last of the top inside, ``lost``: that by the size of the
    top, which bounds the share of the top that is missed; over uniformly chosen queries.
    """

    counts: LabelCounts
    repeat_overlap: Mean
    repeat_spearman: Mean
    lost: Mean
    missed: Mean


def drift_report(connection: Connection, model_id: str, now: datetime, window: timedelta, most: int, *,
                 live: bool = True) -> DriftReport:
    """The last ``most`` windows of what clients asked (or, not ``live``, of curation's uniform queries)."""
    rows = measured_rows(connection, model_id, LIVE if live else CURATED, now - window * (most + 1))
    clusters = stored_clusters(connection, model_id)
    return DriftReport(
        tuple(windows(rows, window)), () if clusters is None else clusters.examples,
        tuple(recent_alarms(connection, model_id)),
    )


def label_report(connection: Connection, model_id: str, now: datetime, days: int = 30) -> LabelReport:
    """Of all labels; pruning of the last ``days``, since it depends on head and corpus."""
    repeats = reliability_rows(connection, model_id)
    pruned = pruning_rows(connection, model_id, now - timedelta(days=days))
    return LabelReport(
        label_counts(connection, model_id), mean_of(overlap for overlap, _ in repeats),
        mean_of(rho for _, rho in repeats), mean_of(row.lost for row in pruned), mean_of(row.missed for row in pruned),
    )


def publish(model_id: str, drift: DriftReport, labels: LabelReport) -> None:
    """Set the gauges of this process."""
    latest = [one for one in drift.windows if one.start == drift.windows[0].start]
    for window in latest:
        cluster = "all" if window.cluster is None else str(window.cluster)
        for name in ("overlap", "spearman", "calibration"):
            mean: Mean = getattr(window, name)
            for bound in ("value", "low", "high"):
                AGREEMENT.labels(model_id, name, cluster, bound).set(getattr(mean, bound))
        if window.cluster is None:
            DRIFT_QUERIES.labels(model_id).set(window.queries)
    ALARM.labels(model_id).set(0 if drift.open_alarm is None else 1)
    for bound in ("value", "low", "high"):
        PRUNING.labels(model_id, bound).set(getattr(labels.lost, bound))
    RELIABILITY.labels(model_id, "overlap").set(labels.repeat_overlap.value)
    RELIABILITY.labels(model_id, "spearman").set(labels.repeat_spearman.value)
    for split, count in labels.counts.by_split.items():
        LABELS.labels(model_id, split).set(count)
