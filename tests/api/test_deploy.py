"""The files of settings/deploy against the server that they run: paths, metrics, settings, times."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import msgspec
import pytest
import yaml

from settings.fields import by_env
from settings.load import load
from tests.api.conftest import RunningServer

FOLDER = Path(__file__).parents[2] / "settings" / "deploy"
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))


def documents() -> list[Any]:
    return [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def of_kind(kind: str) -> list[Any]:
    found = [one for one in documents() if one["kind"] == kind]
    assert found
    return found


def compose() -> Any:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


def pods() -> list[Any]:
    return [one["spec"]["template"]["spec"] for kind in ("StatefulSet", "Deployment") for one in of_kind(kind)]


def seconds(text: str) -> float:
    return load(env={"EFT_SERVER_DRAIN_TIMEOUT": text}).settings.server.drain_timeout


def test_probes_ask_for_what_the_server_answers(server: RunningServer) -> None:
    for pod in pods():
        container = pod["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
        assert {name: probe["path"] for name, probe in probes.items()} == {
            "startup": "/ready",
            "readiness": "/ready",
            "liveness": "/health",
        }
        for probe in probes.values():
            assert ports[probe["port"]] == load(env={}).settings.server.port
            assert httpx.get(f"{server.url}{probe['path']}", trust_env=False).status_code == 200


def test_autoscaling_goes_by_metrics_that_are_exported(server: RunningServer) -> None:
    (scaled,) = of_kind("ScaledObject")
    queries = " ".join(trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    wanted = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"eft:\w+", queries)}
    assert {"eft:request_queue_time_seconds", "eft:num_requests_waiting"} == wanted
    pod = next(one for one in of_kind("Deployment"))["spec"]["template"]["metadata"]["annotations"]
    text = httpx.get(f"{server.url}{pod['prometheus.io/path']}", trust_env=False).text
    assert wanted <= set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert scaled["spec"]["scaleTargetRef"]["name"] in {one["metadata"]["name"] for one in of_kind("Deployment")}


def test_routers_find_the_metrics_that_the_page_names(server: RunningServer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    named = set(re.findall(r"vllm:\w+", page))
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    assert len(named) == 3
    assert named <= set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_pods_have_time_to_drain() -> None:
    drain = seconds(of_kind("ConfigMap")[0]["data"]["EFT_SERVER_DRAIN_TIMEOUT"])
    for pod in pods():
        command, slept = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert pod["terminationGracePeriodSeconds"] > drain + float(slept)
    shared = compose()["x-eft"]
    assert seconds(shared["stop_grace_period"]) > seconds(shared["environment"]["EFT_SERVER_DRAIN_TIMEOUT"])


def test_variables_are_settings_and_their_values_are_taken() -> None:
    configured = of_kind("ConfigMap")[0]["data"]
    plain = {name: re.sub(r"\$\{\w+(:-(\w*)|:\?.*)?\}", r"\2", value) or "secret"
             for name, value in compose()["x-eft"]["environment"].items()}  # fmt: skip
    for variables in (configured, plain):
        assert set(variables) <= set(by_env())
        settings = load(env=variables).settings
        mounted = settings.adapters.shared_store
        assert mounted == "/var/lib/eft-store"
    for pod in pods():
        assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} >= {mounted, "/var/lib/eft"}


def test_names_in_the_manifests_meet() -> None:
    for one in (*of_kind("StatefulSet"), *of_kind("Deployment")):
        spec = one["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        services = [service for service in of_kind("Service") if service["spec"]["selector"].items() <= labels.items()]
        assert [service["metadata"]["name"] for service in services] == [one["metadata"]["name"]]
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in spec["template"]["spec"]["containers"][0]["volumeMounts"]} == volumes
    assert of_kind("StatefulSet")[0]["spec"]["replicas"] == 1  # one process has a state directory


def test_compose_names_what_it_declares() -> None:
    found = compose()
    declared = set(found["volumes"])
    for service in found["services"].values():
        named = {volume.partition(":")[0] for volume in service["volumes"] if ":" in volume}
        assert named <= declared
        assert set(service.get("depends_on", {})) <= set(found["services"])
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
            assert port.endswith(":8000")


@pytest.mark.parametrize("release", ["1.29", "1.34"])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path, release: str) -> None:
    """By Kubernetes' own schemas, which the package carries; a key that they do not know is refused."""
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if one["apiVersion"].startswith("keda.sh/"):  # not Kubernetes' own, but for a part of it
            one = _autoscaler(msgspec.convert(one, ScaledObject, strict=True))
        schemas.validate(one, release, strict=True)
        for changed in ({**one, "metdata": {}}, {**one, "metadata": {"name": 3}}):
            with pytest.raises(schemas.ValidationError):
                schemas.validate(changed, release, strict=True)


# -- KEDA --------------------------------------------------------------------------------------------
#
# The fields that the manifest has, of https://keda.sh/docs/latest/reference/scaledobject-spec/ and
# https://keda.sh/docs/latest/scalers/prometheus/. Another one is refused: Kubernetes would drop it without a word.


Int32 = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Number = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)?$")]
"""KEDA's triggers have texts alone."""


class StrictObject(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """Part of a manifest."""


class ScaleTarget(StrictObject):
    name: str


class PodAutoscaler(StrictObject):
    behavior: dict[str, Any]
    """Kubernetes' own, of a HorizontalPodAutoscaler."""


class AdvancedScaling(StrictObject):
    horizontal_pod_autoscaler_config: PodAutoscaler


class PrometheusQuery(StrictObject):
    server_address: Annotated[str, msgspec.Meta(pattern="^https?://")]
    query: str
    threshold: Number


class PrometheusTrigger(StrictObject):
    type: Literal["prometheus"]
    metric_type: Literal["Value", "AverageValue"]
    metadata: PrometheusQuery


class ScaledObjectSpec(StrictObject):
    scale_target_ref: ScaleTarget
    min_replica_count: Int32
    max_replica_count: Int32
    cooldown_period: Int32
    advanced: AdvancedScaling
    triggers: Annotated[list[PrometheusTrigger], msgspec.Meta(min_length=1)]


class ObjectName(StrictObject):
    name: Annotated[str, msgspec.Meta(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]


class ScaledObject(StrictObject):
    api_version: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: ObjectName
    spec: ScaledObjectSpec


def _autoscaler(scaled: ScaledObject) -> dict[str, Any]:
    """The HorizontalPodAutoscaler that KEDA makes of it, but for its metrics."""
    spec = scaled.spec
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec.scale_target_ref.name}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": scaled.metadata.name},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": spec.min_replica_count,
            "maxReplicas": spec.max_replica_count,
            "behavior": spec.advanced.horizontal_pod_autoscaler_config.behavior,
        },
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.cooldownPeriod", "600"),
        ("spec.minReplicas", 1),
        ("spec.triggers.0.metadata.threshold", 2),
        ("spec.triggers.0.metadata.treshold", "2"),
        ("spec.triggers.1.metricType", "Average"),
        ("spec.scaleTargetRef", None),
        ("apiVersion", "keda.sh/v1"),
    ],
)
def test_what_keda_would_refuse_or_drop_is_noticed(path: str, value: object) -> None:
    (scaled,) = of_kind("ScaledObject")
    assert msgspec.convert(scaled, ScaledObject, strict=True).spec.min_replica_count >= 1
    *way, last = path.split(".")
    place = scaled
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(scaled, ScaledObject, strict=True)
