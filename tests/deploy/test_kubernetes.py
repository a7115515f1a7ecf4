"""The manifests: valid by Kubernetes' published schemas, and what they name is there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dit_runtime import cli as runtime
from dit_serve import cli
from dit_serve.app import Service, Settings
from dit_serve.guard import OPEN
from dit_serve.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
OBJECTS = [table for file in sorted(FOLDER.glob("*.yaml")) for table in yaml.safe_load_all(file.read_text())]
VERSIONS = ("1.30", "1.37")  # the first with preStop.sleep by default, and the newest


def of(kind: str) -> dict[str, Any]:
    (table,) = [table for table in OBJECTS if table["kind"] == kind]
    return table


def pods() -> list[dict[str, Any]]:
    return [table["spec"]["template"]["spec"] for table in OBJECTS if "template" in table["spec"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("table", OBJECTS, ids=lambda table: table["kind"])
def test_they_are_valid(table, version) -> None:
    kubernetes_validate.validate(table, version, strict=True)


def test_faults_are_seen() -> None:
    """A field that is not known, a wrong type, and one that is missing."""
    for change in (
        lambda container: container.update(resourcez={}),
        lambda container: container.update(args="--threads 4"),
        lambda container: container.pop("name"),
    ):
        table = copy.deepcopy(of("Deployment"))
        change(table["spec"]["template"]["spec"]["containers"][0])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(table, VERSIONS[-1], strict=True)


def test_containers_have_no_rights() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
            assert rights["allowPrivilegeEscalation"] is False and container["resources"]["limits"]["memory"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_what_they_start() -> None:
    """Programs of ours with options that they know, and folders that are mounted."""
    (server,), (job,) = (pod["containers"] for pod in pods())
    options = cli.parser().parse_args(server["args"])
    assert cli._named(options.bundles) == {"bundle": Path("/bundles/bundle")}
    assert (
        options.grace + server["lifecycle"]["preStop"]["sleep"]["seconds"] < pods()[0]["terminationGracePeriodSeconds"]
    )
    assert job["command"] == ["dit-run"]
    options = runtime.parser().parse_args(job["args"])
    places = {mount["mountPath"] for mount in job["volumeMounts"]}
    assert {str(options.bundle.parent), str(options.shards.parent)} < places and options.count == 50000


def test_what_they_ask_of_the_server() -> None:
    """Probes ask for paths that need no key; the autoscaler reads a metric that is there."""
    (server, _) = (pod["containers"][0] for pod in pods())
    paths = {server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    routes = {route.path for route in Service({}, Settings()).app()._app.routes}
    assert paths <= routes & set(OPEN)
    assert server["livenessProbe"]["httpGet"]["path"] == "/readyz"  # a server whose batcher has stopped starts again
    names = {family.name for family in Metrics({}).collect()}
    (metric,) = of("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in names


def test_they_mean_each_other() -> None:
    labels = of("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for table in (of("Deployment"), of("PodDisruptionBudget")):
        assert table["spec"]["selector"]["matchLabels"].items() <= labels
    assert of("Service")["spec"]["selector"].items() <= labels
    assert of("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    ports = {port["name"] for port in pods()[0]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in of("Service")["spec"]["ports"]} <= ports
    assert {port["port"] for rule in of("NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]} <= ports
    target = of("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of("Deployment")["metadata"]["name"])
