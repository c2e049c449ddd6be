"""Deployment files name what exists. They are not run anywhere here, so at least their names must be right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from byline.config import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
TARGETS = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
KNOWN = {"BYLINE_" + name.removeprefix("configured_").upper() for name in Settings.model_fields}


def _manifests(folder: str) -> list[dict[str, Any]]:
    return [
        document
        for path in sorted((DEPLOY / "k8s" / folder).glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if document
    ]


def _deployments() -> list[dict[str, Any]]:
    return [manifest for manifest in _manifests("base") if manifest["kind"] == "Deployment"]


def test_every_program_named_in_the_dockerfile_exists() -> None:
    programs = re.findall(r'"-m", "services\.(\w+)"', DOCKERFILE)
    assert set(programs) == {"gateway", "dispatcher", "workers", "curation", "trainer"}
    assert all((DEPLOY.parent / "services" / program / "__main__.py").is_file() for program in programs)


def test_images_without_torch_are_the_light_ones() -> None:
    light = set(re.findall(r"^FROM light AS (\S+)", DOCKERFILE, re.MULTILINE))
    assert light == {"gateway", "dispatcher"}


def test_compose_builds_existing_targets_and_sets_existing_settings() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    built = {name: service for name, service in services.items() if "build" in service}
    assert set(built) == {"gateway", "dispatcher", "lookup", "verification", "curation", "trainer"}
    for service in built.values():
        assert service["build"]["target"] in TARGETS
        assert set(service["environment"]) <= KNOWN
    assert "noeviction" in services["redis"]["command"]


def test_every_pod_is_restricted_and_probed() -> None:
    assert {manifest["metadata"]["name"] for manifest in _deployments()} == {
        "gateway", "dispatcher", "lookup", "verification", "curation", "trainer",
    }
    for manifest in _deployments():
        pod = manifest["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["image"].removeprefix("byline-") in TARGETS
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "livenessProbe" in container
        assert {variable["name"].removesuffix("_FILE") for variable in container["env"]} <= KNOWN


def test_settings_in_the_config_map_exist_and_every_file_is_listed() -> None:
    (config,) = [manifest for manifest in _manifests("base") if manifest["kind"] == "ConfigMap"]
    assert set(config["data"]) <= KNOWN
    listed = yaml.safe_load((DEPLOY / "k8s" / "base" / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {path.name for path in (DEPLOY / "k8s" / "base").glob("*.yaml")} - {"kustomization.yaml"}


def test_workers_are_scaled_by_stages_that_exist() -> None:
    from byline.jobs.states import Stage

    scaled = [manifest for manifest in _manifests("keda") if manifest["kind"] == "ScaledObject"]
    query = " ".join(trigger["metadata"]["query"] for manifest in scaled for trigger in manifest["spec"]["triggers"])
    assert {stage.value for stage in Stage} == set(re.findall(r"'([a-z]+)'", query))
