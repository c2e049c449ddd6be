"""Alerts, their tests, their runbooks, the dashboards and the metrics of the code name the same things."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
RULE_TESTS = ROOT / "deploy" / "prometheus" / "alerts_test.yaml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
#: Labels that Prometheus adds itself.
OF_THE_SCRAPE = {"instance", "job", "le"}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the alerts and the dashboards, with where it stands."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
        for annotation in board["annotations"]["list"]:
            yield f"{path.name}: {annotation['name']}", annotation["expr"]


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Every series that the programs export, as Prometheus names it, with its labels."""
    from prometheus_client import REGISTRY

    import byline.drift.report  # noqa: F401 - registers its metrics
    import byline.telemetry
    from services.dispatcher import collector

    found: dict[str, set[str]] = {}
    for one in set(REGISTRY._collector_to_names):  # there is no public way to their labels before the first sample
        name, kind = getattr(one, "_name", ""), getattr(one, "_type", "")
        for suffix in SUFFIXES.get(kind, ()):
            if name.startswith("byline_"):
                found[f"{name}{suffix}"] = set(one._labelnames)  # type: ignore[attr-defined]
    found |= {name: set(labels) for name, (_, labels, _) in collector.QUERIES.items()}
    source = Path(collector.__file__).read_text()
    for name, labels in re.findall(r'GaugeMetricFamily\("(byline_\w+)"[^)]*?labels=\[([^\]]*)\]', source):
        found[name] = set(re.findall(r'"(\w+)"', labels))
    for name in re.findall(r'_single\("(byline_\w+)"', source) + re.findall(r'_guarded\("(byline_\w+)"', source):
        found[name] = set()
    assert byline.telemetry.STAGE_SECONDS is not None
    return found


def test_every_metric_of_alerts_and_dashboards_is_exported_with_those_labels(metrics: dict[str, set[str]]) -> None:
    wrong = []
    for where, expression in expressions():
        for name, selector in re.findall(r"\b(byline_\w+)(\{[^}]*\})?", expression):
            if name not in metrics:
                wrong.append(f"{where}: no program exports {name}")
                continue
            labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))
            wrong += [f"{where}: {name} has no label {label}" for label in labels - metrics[name] - OF_THE_SCRAPE]
        known = {label for name in re.findall(r"\bbyline_\w+", expression) for label in metrics.get(name, ())}
        groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
        grouped = {label.strip() for group in groups for label in group.split(",")}
        wrong += [f"{where}: groups by {one}" for one in grouped - {""} - known - OF_THE_SCRAPE]
    assert not wrong, "\n".join(wrong)


def test_every_metric_that_is_declared_is_set_somewhere() -> None:
    """A metric that nobody sets looks like a system in which nothing happens."""
    from byline import telemetry

    declared = {name for name, value in vars(telemetry).items() if hasattr(value, "_labelnames")}
    sources = "\n".join(
        path.read_text()
        for folder in ("services", "shared")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "telemetry.py"
    )
    use = r"\b[^\n]*\.(inc|set|observe|labels|track|set_)"
    assert not {name for name in declared if not re.search(rf"\b{name}{use}", sources)}


def test_the_metrics_named_in_the_operating_guide_exist(metrics: dict[str, set[str]]) -> None:
    named = set(re.findall(r"`(byline_\w+)", (ROOT / "docs" / "operations.md").read_text()))
    assert named and not named - set(metrics)


def test_every_alert_says_how_bad_what_and_what_to_do() -> None:
    for rule in alerts():
        assert re.fullmatch(r"Byline[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")), rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule["alert"]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    text = (ROOT / "docs" / "runbooks.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        section = sections[rule["alert"]]
        assert section.startswith(f"**{rule['labels']['severity']}.**"), rule["alert"]
        assert "```sh\nbyline " in section, f"{rule['alert']}: name the commands to look with"


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    names = {case["name"] for case in yaml.safe_load(RULE_TESTS.read_text())["tests"]}
    wanted = {f"{rule['alert']} {what}" for rule in alerts() for what in ("fires", "stays silent")}
    assert not wanted - names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_agrees() -> None:
    for command in (["check", "rules", RULES.name], ["test", "rules", RULE_TESTS.name]):
        done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_can_be_provisioned_and_their_panels_do_not_overlap() -> None:
    uids = set()
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        uids.add(board["uid"])
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24 and not cells & taken, f"{path.name}: {panel['title']}"
            taken |= cells
            assert panel["datasource"]["uid"] == "byline" and panel["targets"]
    assert len(uids) == len(DASHBOARDS) == 3
