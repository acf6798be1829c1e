"""The manifests: valid for every Kubernetes they claim, and at one with the service and with one another. No cluster.

What must hold of a folder's manifests is written as a list of problems, empty for ours, so that each check can also be
run on manifests spoilt on purpose.

KServe's fields are those of its own source, pkg/apis/serving/v1alpha1/servingruntime_types.go and
pkg/apis/serving/v1beta1/{predictor,predictor_model,component,podspec}.go.
"""

import asyncio
import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import kubernetes_validate
import msgspec
import pytest
import yaml
from support.server import COMMAND, DEADLINE_S, ROOT, Server, environment

import bln_serve
from bln_serve.errors import UsageError
from bln_serve.manifest import FORMAT_VERSION
from bln_serve.serving.app import create_app
from bln_serve.serving.settings import Settings, from_command_line

BASE = ROOT / "docker" / "kubernetes"
KSERVE = BASE / "kserve"
ARTIFACTS = ROOT / "tests" / "golden" / "artifacts"

# The first whose preStop sleeps unless an operator forbids it (KEP 3960: beta), and the newest that has schemas here.
OLDEST, NEWEST = "1.30", "1.37"

# What the process still takes once shutdown_timeout_s is over, as its --help says.
ENDS_WITHIN_S = 2

Manifest = dict[str, Any]
Labels = dict[str, str]


def kustomization(folder: Path) -> Manifest:
    loaded: Manifest = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return loaded


def files(folder: Path) -> list[Manifest]:
    return [yaml.safe_load((folder / name).read_text()) for name in kustomization(folder)["resources"]]


@cache
def _rendered(folder: Path) -> str:
    finished = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True)
    assert finished.stderr == ""  # where it says what is out of date
    return finished.stdout


def rendered(folder: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(_rendered(folder)))


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders them, is not installed")
every_folder = pytest.mark.parametrize("folder", [BASE, KSERVE], ids=["base", "kserve"])
each_way = pytest.mark.parametrize("read", [files, pytest.param(rendered, marks=needs_kubectl)])


class Closed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename="camel"):
    """An unknown field is an error: an API server drops it without a word."""


class Metadata(Closed):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
    labels: Labels = {}
    annotations: Labels = {}


class Format(Closed):
    name: str
    version: str | None = None


class SupportedFormat(Format):
    auto_select: bool = False
    priority: Annotated[int, msgspec.Meta(ge=1)] | None = None


class RuntimeSpec(Closed):
    supported_model_formats: list[SupportedFormat]
    containers: list[Manifest]
    volumes: list[Manifest] = []
    protocol_versions: list[Literal["v1", "v2", "grpc-v1", "grpc-v2"]] = []
    labels: Labels = {}
    annotations: Labels = {}


class ServingRuntime(Closed):
    api_version: Literal["serving.kserve.io/v1alpha1"]
    kind: Literal["ServingRuntime"]
    metadata: Metadata
    spec: RuntimeSpec


class Model(Closed):
    model_format: Format
    runtime: str | None = None
    storage_uri: str | None = None


class Predictor(Closed):
    """What a predictor has beside the fields of a pod."""

    model: Model
    min_replicas: Annotated[int, msgspec.Meta(ge=0)] = 1
    max_replicas: Annotated[int, msgspec.Meta(ge=0)] = 0
    scale_metric: Literal["cpu", "memory", "concurrency", "rps"] | None = None
    scale_target: int | None = None
    deployment_strategy: Manifest = {}
    batcher: Manifest | None = None
    labels: Labels = {}
    annotations: Labels = {}


class InferenceServiceSpec(Closed):
    predictor: Manifest


class InferenceService(Closed):
    api_version: Literal["serving.kserve.io/v1beta1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: InferenceServiceSpec


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def is_kserve(manifests: list[Manifest]) -> bool:
    return any(manifest["kind"] == "InferenceService" for manifest in manifests)


def split_predictor(manifests: list[Manifest]) -> tuple[Manifest, Manifest]:
    """Part a predictor's own fields from those of its pod."""
    predictor = of_kind(manifests, "InferenceService")["spec"]["predictor"]
    own = {name: predictor[name] for name in Predictor.__struct_encode_fields__ if name in predictor}
    return own, {name: value for name, value in predictor.items() if name not in own}


def deployment(manifests: list[Manifest]) -> Manifest:
    """Return the Deployment; for KServe the one that its controller makes, the claim's mount included."""
    if not is_kserve(manifests):
        return of_kind(manifests, "Deployment")
    runtime, (own, of_pod) = of_kind(manifests, "ServingRuntime")["spec"], split_predictor(manifests)
    model = {"name": "kserve-pvc-source", "mountPath": "/mnt/models", "readOnly": True}
    container = copy.deepcopy(runtime["containers"][0])
    container["volumeMounts"] = [*container.get("volumeMounts", []), model]
    claim = own["model"]["storageUri"].removeprefix("pvc://").partition("/")[0]
    volume = {"name": model["name"], "persistentVolumeClaim": {"claimName": claim}}
    labels = {"app": "predictor"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "predictor"},
        "spec": {
            "selector": {"matchLabels": labels},
            "strategy": own.get("deploymentStrategy", {}),
            "template": {
                "metadata": {
                    "labels": {**of_kind(manifests, "InferenceService")["metadata"].get("labels", {}), **labels}
                },
                "spec": {
                    **of_pod,
                    "containers": [container, *runtime["containers"][1:]],
                    "volumes": [*runtime.get("volumes", []), volume],
                },
            },
        },
    }


def invalid(manifests: list[Manifest], version: str) -> Iterator[str]:
    """Yield what an API server of this version would refuse, or drop without a word."""
    try:
        for manifest in manifests:
            if manifest["kind"] == "ServingRuntime":
                msgspec.convert(manifest, ServingRuntime)
            elif manifest["kind"] == "InferenceService":
                msgspec.convert(manifest, InferenceService)
                msgspec.convert(split_predictor(manifests)[0], Predictor)
            else:
                _validate(manifest, version)
        if is_kserve(manifests):
            _validate(deployment(manifests), version)
    except (kubernetes_validate.ValidationError, msgspec.ValidationError) as error:
        yield str(error)


def _validate(manifest: Manifest, version: str) -> None:
    # It falls back to the newest schemas it has, and would so pass for a version that it does not know.
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


@every_folder
@each_way
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_they_are_valid(folder: Path, read: Callable[[Path], list[Manifest]], version: str) -> None:
    assert list(invalid(read(folder), version)) == []


def test_the_newest_version_is_the_newest_there_is() -> None:
    assert kubernetes_validate.latest_version().startswith(f"{NEWEST}.")


def test_an_older_kubernetes_would_drop_the_pause_before_the_signal() -> None:
    (problem,) = invalid(files(BASE), "1.28")
    assert "'sleep' was unexpected" in problem


@every_folder
def test_no_file_is_left_out(folder: Path) -> None:
    listed = kustomization(folder)["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in folder.glob("*.yaml"))
    assert len(files(folder)) == len(listed)


POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"
RUNTIME = "spec/containers/0"
PREDICTOR = "spec/predictor"
REMOVED = object()


def spoilt(kind: str, path: str, value: Any) -> list[Manifest]:
    """Return a folder's manifests with one value replaced, added or removed."""
    manifests = files(KSERVE if kind in ("ServingRuntime", "InferenceService") else BASE)
    *parents, last = path.split("/")
    target: Any = of_kind(manifests, kind)
    for step in parents:
        target = target[int(step) if step.isdigit() else step]
    if value is REMOVED:
        del target[last]
    else:
        target[last] = value
    return manifests


WRONG_FIELDS = [
    ("Deployment", f"{POD}/enableServiceLink", False, "'enableServiceLink' was unexpected"),
    ("Deployment", f"{CONTAINER}/readinessProbe/httpget", {}, "'httpget' was unexpected"),
    ("Deployment", f"{CONTAINER}/env/0/value", 20, "20 is not of type 'string'"),
    ("Deployment", "spec/selector", REMOVED, "'selector' is a required property"),
    ("Service", "spec/ports/0/port", "http", "'http' is not of type 'integer'"),
    ("NetworkPolicy", "spec/Egress", [], "'Egress' was unexpected"),
    ("HorizontalPodAutoscaler", "spec/behaviour", {}, "'behaviour' was unexpected"),
    ("PodDisruptionBudget", "spec/minimum", 1, "'minimum' was unexpected"),
    ("ServingRuntime", "spec/securityContext", {}, "unknown field `securityContext`"),
    ("ServingRuntime", "spec/protocolVersions", ["v3"], "Invalid enum value 'v3'"),
    ("ServingRuntime", f"{RUNTIME}/port", 8000, "'port' was unexpected"),
    ("ServingRuntime", f"{RUNTIME}/resources/limits", ["cpu"], "is not of type 'object'"),
    ("InferenceService", "metadata/name", "digits_cnn", "matching regex"),
    ("InferenceService", f"{PREDICTOR}/minReplica", 2, "'minReplica' was unexpected"),
    ("InferenceService", f"{PREDICTOR}/minReplicas", "2", "Expected `int`, got `str`"),
    ("InferenceService", f"{PREDICTOR}/model/format", {}, "unknown field `format`"),
    ("InferenceService", f"{PREDICTOR}/securityContext/privileged", False, "'privileged' was unexpected"),
    ("InferenceService", f"{PREDICTOR}/deploymentStrategy/maxSurge", 1, "'maxSurge' was unexpected"),
]


@pytest.mark.parametrize(("kind", "path", "value", "problem"), WRONG_FIELDS)
def test_a_wrong_field_is_found(kind: str, path: str, value: Any, problem: str) -> None:
    (found,) = invalid(spoilt(kind, path, value), NEWEST)
    assert problem in found


@cache
def service_routes() -> frozenset[str]:
    with mock.patch.dict(os.environ, clear=True):
        app = create_app(Settings(paths=(ARTIFACTS,)))
    return frozenset(getattr(route, "path", "") for route in app.routes)


@cache
def image_variables() -> dict[str, str]:
    return dict(re.findall(r"(BLN_SERVE_\w+)=(\S+)", (ROOT / "docker" / "Dockerfile").read_text()))


def settings_of(container: Manifest) -> Settings:
    """Read the settings as the process in this container does: the image's variables, the manifest's, the arguments."""
    variables = image_variables() | {each["name"]: each["value"] for each in container.get("env", [])}
    with mock.patch.dict(os.environ, variables, clear=True):
        return from_command_line(container.get("args", []))


def problems(manifests: list[Manifest]) -> list[str]:
    """Return what is wrong with a folder's manifests, beyond their form."""
    whole = deployment(manifests)
    pod = whole["spec"]["template"]["spec"]
    try:
        settings = [settings_of(container) for container in pod["containers"]]
    except UsageError as error:
        return [str(error)]
    found = [
        *security_problems(pod),
        *model_problems(manifests, pod, settings[0]),
        *shutdown_problems(pod, settings[0]),
    ]
    for container in pod["containers"]:
        found += [*probe_problems(container, settings[0].port), *resource_problems(container)]
    if whole["spec"]["strategy"].get("rollingUpdate", {}).get("maxUnavailable") != 0:
        found.append("an update takes pods away before their successors are ready")
    return [*found, *(kserve_problems if is_kserve(manifests) else base_problems)(manifests)]


OF_POD = {"fsGroup": 10001}
OF_CONTAINER = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
    "allowPrivilegeEscalation": False,
    "privileged": None,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def security_problems(pod: Manifest) -> Iterator[str]:
    for name in ("automountServiceAccountToken", "enableServiceLinks"):
        if pod.get(name) is not False:
            yield f"{name} is not false"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if name in pod:
            yield f"{name} is set"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        effective = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        for name, value in {**OF_POD, **OF_CONTAINER}.items():
            if effective.get(name) != value:
                yield f"{name} is {effective.get(name)!r}"
        temporary = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
        for mount in container["volumeMounts"]:
            if (mount["name"] in temporary) == mount.get("readOnly", False):
                yield f"{mount['mountPath']} is {'read-only' if mount.get('readOnly') else 'writable'}"


def model_problems(manifests: list[Manifest], pod: Manifest, settings: Settings) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {
        mount["mountPath"]: volumes[mount["name"]]["persistentVolumeClaim"]["claimName"]
        for mount in pod["containers"][0]["volumeMounts"]
        if "persistentVolumeClaim" in volumes.get(mount["name"], {})
    }
    # KServe's folder has no claim of its own.
    expected = of_kind(files(BASE) if is_kserve(manifests) else manifests, "PersistentVolumeClaim")["metadata"]["name"]
    if claims != {str(path): expected for path in settings.paths}:
        yield f"the service reads {', '.join(map(str, settings.paths))}, and mounted is {claims}"


def shutdown_problems(pod: Manifest, settings: Settings) -> Iterator[str]:
    pause = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = pause + settings.shutdown_timeout_s + ENDS_WITHIN_S
    if not pause:
        yield "nothing waits until requests no longer come"
    if pod.get("terminationGracePeriodSeconds", 30) < needed:
        yield f"a pod needs {needed} s to end, and is killed before"


def probe_problems(container: Manifest, listens_on: int) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if list(ports.values()) != [listens_on]:
        yield f"the service listens on {listens_on}, and the container's ports are {ports}"
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        asked = container.get(probe, {}).get("httpGet", {})
        if asked.get("path") != path or path not in service_routes():
            yield f"{probe} asks for {asked.get('path')}"
        if asked.get("port") not in [*ports, *ports.values()]:
            yield f"{probe} asks on port {asked.get('port')}"


def resource_problems(container: Manifest) -> Iterator[str]:
    resources = container.get("resources", {})
    limits = resources.get("limits", {})
    if not re.fullmatch(r"[1-9][0-9]*", str(limits.get("cpu"))):
        yield f"the CPU limit is {limits.get('cpu')}, no whole number"
    if "memory" not in limits:
        yield "there is no memory limit"
    if resources.get("requests") != limits:
        yield "requests are not the limits"


def base_problems(manifests: list[Manifest]) -> Iterator[str]:
    spec = of_kind(manifests, "Deployment")["spec"]
    labels, container = spec["template"]["metadata"]["labels"], spec["template"]["spec"]["containers"][0]
    for kind, selector in selectors(manifests).items():
        if not selector or not selector.items() <= labels.items():
            yield f"the {kind} does not select the pods"
        if selector.items() <= kustomization(KSERVE)["labels"][0]["pairs"].items():
            yield f"the {kind} selects KServe's pods, too"
    if of_kind(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"] != {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": of_kind(manifests, "Deployment")["metadata"]["name"],
    }:
        yield "the HorizontalPodAutoscaler scales something else"
    if "replicas" in spec:
        yield "every apply undoes what the autoscaler did"
    if spec["template"]["spec"].get("serviceAccountName") != of_kind(manifests, "ServiceAccount")["metadata"]["name"]:
        yield "the pods have the service account of somebody else"
    yield from network_problems(manifests, container["ports"][0])


def selectors(manifests: list[Manifest]) -> dict[str, Labels]:
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    found: dict[str, Labels] = {
        "Service": of_kind(manifests, "Service")["spec"]["selector"],
        "NetworkPolicy": of_kind(manifests, "NetworkPolicy")["spec"]["podSelector"].get("matchLabels", {}),
        "topologySpreadConstraint": pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    }
    for kind in ("Deployment", "PodDisruptionBudget"):
        found[kind] = of_kind(manifests, kind)["spec"]["selector"]["matchLabels"]
    return found


def network_problems(manifests: list[Manifest], port: Manifest) -> Iterator[str]:
    (entry,) = of_kind(manifests, "Service")["spec"]["ports"]
    if entry["targetPort"] not in (port["name"], port["containerPort"]):
        yield f"the Service leads to port {entry['targetPort']}"
    policy = of_kind(manifests, "NetworkPolicy")["spec"]
    if sorted(policy["policyTypes"]) != ["Egress", "Ingress"] or policy.get("egress"):
        yield "the NetworkPolicy lets the pods call out"
    for rule in policy["ingress"]:
        if [each.get("port") for each in rule.get("ports", [])] != [port["containerPort"]]:
            yield "the NetworkPolicy opens other ports"
        if not rule.get("from"):
            yield "the NetworkPolicy lets everybody in"


def kserve_problems(manifests: list[Manifest]) -> Iterator[str]:
    service, runtime = of_kind(manifests, "InferenceService"), of_kind(manifests, "ServingRuntime")
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    if service["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode") != "RawDeployment":
        yield "Knative would refuse the pod"
    if model.get("runtime") != runtime["metadata"]["name"]:
        yield "the InferenceService names another runtime"
    if [model["modelFormat"]] != runtime["spec"]["supportedModelFormats"]:
        yield "the runtime does not know the model's format"
    if model["modelFormat"] != {"name": "bln", "version": str(FORMAT_VERSION)}:
        yield "the format is not the artifacts'"
    if not re.fullmatch(r"pvc://[a-z0-9-]+/\w+", model["storageUri"]):
        yield "the model is not one folder of a claim"
    security = runtime["spec"]["containers"][0]["securityContext"]
    if security != {name: value for name, value in OF_CONTAINER.items() if value is not None}:
        yield "under another InferenceService the runtime's container is less secure"
    if "batcher" in predictor:
        yield "the batcher mixes the rows of several clients"
    spoken = {"v1": "/v1/models/", "v2": "/v2/models/"}
    speaks = {name for name, prefix in spoken.items() if any(path.startswith(prefix) for path in service_routes())}
    if set(runtime["spec"].get("protocolVersions", [])) != speaks:
        yield f"protocolVersions is not what the service speaks: {sorted(speaks)}"


@every_folder
@each_way
def test_they_fit_the_service_and_one_another(folder: Path, read: Callable[[Path], list[Manifest]]) -> None:
    assert problems(read(folder)) == []


FAULTS = [
    ("Deployment", f"{POD}/enableServiceLinks", True, "enableServiceLinks is not false"),
    ("Deployment", f"{POD}/automountServiceAccountToken", REMOVED, "automountServiceAccountToken is not false"),
    ("Deployment", f"{POD}/securityContext/runAsNonRoot", REMOVED, "runAsNonRoot is None"),
    ("Deployment", f"{POD}/securityContext/seccompProfile", REMOVED, "seccompProfile is None"),
    ("Deployment", f"{CONTAINER}/securityContext/runAsUser", 0, "runAsUser is 0"),
    ("Deployment", f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False, "readOnlyRootFilesystem is False"),
    ("Deployment", f"{CONTAINER}/securityContext/capabilities/add", ["NET_RAW"], "capabilities is"),
    (
        "Deployment",
        f"{POD}/initContainers",
        [{"name": "fetch", "volumeMounts": []}],
        "allowPrivilegeEscalation is None",
    ),
    ("Deployment", f"{CONTAINER}/securityContext/privileged", True, "privileged is True"),
    ("Deployment", f"{POD}/hostNetwork", True, "hostNetwork is set"),
    ("Deployment", f"{CONTAINER}/volumeMounts/0/readOnly", False, "/models is writable"),
    ("Deployment", f"{CONTAINER}/volumeMounts/1/readOnly", True, "/tmp is read-only"),
    ("Deployment", f"{CONTAINER}/volumeMounts/0/mountPath", "/model", "the service reads /models, and mounted is"),
    ("PersistentVolumeClaim", "metadata/name", "models", "the service reads /models, and mounted is"),
    ("Deployment", f"{POD}/terminationGracePeriodSeconds", 31, "a pod needs 32 s to end"),
    ("Deployment", f"{POD}/terminationGracePeriodSeconds", REMOVED, "a pod needs 32 s to end"),
    ("Deployment", f"{CONTAINER}/env/0/value", "30", "a pod needs 42 s to end"),
    ("Deployment", f"{CONTAINER}/lifecycle", REMOVED, "nothing waits"),
    ("Deployment", f"{CONTAINER}/env/0/name", "BLN_SERVE_SHUTDOWN", "variables that name a setting"),
    ("Deployment", f"{CONTAINER}/env/0/value", "20s", "to be a valid integer"),
    ("Deployment", f"{CONTAINER}/readinessProbe/httpGet/path", "/ready", "readinessProbe asks for /ready"),
    ("Deployment", f"{CONTAINER}/livenessProbe/httpGet/path", "/readyz", "livenessProbe asks for /readyz"),
    ("Deployment", f"{CONTAINER}/startupProbe", REMOVED, "startupProbe asks for None"),
    ("Deployment", f"{CONTAINER}/livenessProbe/httpGet/port", 8080, "livenessProbe asks on port 8080"),
    ("Deployment", f"{CONTAINER}/ports/0/containerPort", 8080, "the service listens on 8000"),
    ("Deployment", f"{CONTAINER}/resources/limits/cpu", "1500m", "the CPU limit is 1500m"),
    ("Deployment", f"{CONTAINER}/resources/limits/cpu", 0.5, "the CPU limit is 0.5"),
    ("Deployment", f"{CONTAINER}/resources/limits/memory", REMOVED, "there is no memory limit"),
    ("Deployment", f"{CONTAINER}/resources/requests/cpu", "1", "requests are not the limits"),
    ("Deployment", "spec/strategy/rollingUpdate/maxUnavailable", 1, "an update takes pods away"),
    ("Deployment", "spec/replicas", 2, "every apply undoes"),
    ("Deployment", f"{POD}/serviceAccountName", "default", "of somebody else"),
    ("Deployment", "spec/template/metadata/labels", {}, "the Deployment does not select the pods"),
    ("Service", "spec/selector", {"app": "bln"}, "the Service does not select the pods"),
    ("Service", "spec/selector", {"app.kubernetes.io/name": "bln-serve"}, "the Service selects KServe's pods, too"),
    ("PodDisruptionBudget", "spec/selector/matchLabels", {"app": "bln"}, "the PodDisruptionBudget does not select"),
    ("NetworkPolicy", "spec/podSelector/matchLabels", {"app": "bln"}, "the NetworkPolicy does not select"),
    ("HorizontalPodAutoscaler", "spec/scaleTargetRef/name", "bln", "scales something else"),
    ("Service", "spec/ports/0/targetPort", 8080, "the Service leads to port 8080"),
    ("NetworkPolicy", "spec/egress", [{}], "call out"),
    ("NetworkPolicy", "spec/policyTypes", ["Ingress"], "call out"),
    ("NetworkPolicy", "spec/ingress/0/from", REMOVED, "lets everybody in"),
    ("NetworkPolicy", "spec/ingress/0/ports/0/port", 8080, "opens other ports"),
    ("ServingRuntime", f"{RUNTIME}/securityContext/readOnlyRootFilesystem", REMOVED, "readOnlyRootFilesystem is None"),
    ("ServingRuntime", f"{RUNTIME}/securityContext/seccompProfile", REMOVED, "under another InferenceService"),
    ("ServingRuntime", f"{RUNTIME}/args", ["/models"], "the service reads /models, and mounted is"),
    ("ServingRuntime", f"{RUNTIME}/resources/limits/cpu", "1.5", "the CPU limit is 1.5"),
    ("ServingRuntime", f"{RUNTIME}/ports/0/containerPort", 8080, "the service listens on 8000"),
    ("ServingRuntime", "spec/protocolVersions", ["v2"], "protocolVersions is not what the service speaks"),
    ("InferenceService", f"{PREDICTOR}/enableServiceLinks", True, "enableServiceLinks is not false"),
    ("InferenceService", f"{PREDICTOR}/terminationGracePeriodSeconds", 30, "a pod needs 32 s to end"),
    ("InferenceService", f"{PREDICTOR}/deploymentStrategy", REMOVED, "an update takes pods away"),
    ("InferenceService", f"{PREDICTOR}/model/runtime", "bln", "names another runtime"),
    ("InferenceService", f"{PREDICTOR}/model/modelFormat/version", "2", "does not know the model's format"),
    ("InferenceService", f"{PREDICTOR}/model/storageUri", "pvc://bln-serve-models", "not one folder of a claim"),
    ("InferenceService", f"{PREDICTOR}/model/storageUri", "pvc://models/digits_cnn", "mounted is"),
    ("InferenceService", f"{PREDICTOR}/batcher", {"maxBatchSize": 8}, "mixes the rows of several clients"),
    ("InferenceService", "metadata/annotations", {}, "Knative would refuse the pod"),
]


@pytest.mark.parametrize(("kind", "path", "value", "problem"), FAULTS)
def test_a_fault_is_found(kind: str, path: str, value: Any, problem: str) -> None:
    assert problem in "\n".join(problems(spoilt(kind, path, value)))


@every_folder
def test_the_image_is_this_release(folder: Path) -> None:
    described = kustomization(folder)
    assert described["images"] == [{"name": "bln-serve", "newTag": bln_serve.__version__}]
    assert described["labels"][0]["pairs"]["app.kubernetes.io/version"] == bln_serve.__version__


@needs_kubectl
@every_folder
def test_every_container_gets_the_tag(folder: Path) -> None:
    containers = deployment(rendered(folder))["spec"]["template"]["spec"]["containers"]
    assert [container["image"] for container in containers] == [f"bln-serve:{bln_serve.__version__}"]


@needs_kubectl
def test_every_resource_of_the_base_is_labelled_and_no_selector_names_the_version() -> None:
    manifests = rendered(BASE)
    pairs = kustomization(BASE)["labels"][0]["pairs"]
    pod = deployment(manifests)["spec"]["template"]
    assert all(pairs.items() <= each["metadata"]["labels"].items() for each in [*manifests, pod])
    assert not any("app.kubernetes.io/version" in selector for selector in selectors(manifests).values())


def test_the_user_is_the_image_s() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    security = deployment(files(BASE))["spec"]["template"]["spec"]["securityContext"]
    assert f"\nUSER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert image_variables()["BLN_SERVE_HOST"] == "0.0.0.0"


def service_links(service: Manifest) -> dict[str, str]:
    """Return what a kubelet injects for a Service with one port, as `{NAME}_SERVICE_*` and as Docker's links did."""
    name = service["metadata"]["name"].upper().replace("-", "_")
    (port,) = service["spec"]["ports"]
    address, number, link = "10.0.0.1", str(port["port"]), f"{name}_PORT_{port['port']}_TCP"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": number,
        f"{name}_SERVICE_PORT_{port['name'].upper()}": number,
        f"{name}_PORT": f"tcp://{address}:{number}",
        link: f"tcp://{address}:{number}",
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": number,
        f"{link}_ADDR": address,
    }


def manifest_variables(folder: Path) -> dict[str, str]:
    (container,) = deployment(files(folder))["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize(
    ("injected", "sentence"),
    [
        ("all", "Expected environment variables that name a setting. Received: BLN_SERVE_"),
        (
            "BLN_SERVE_SERVICE_HOST",
            "Expected environment variables that name a setting. Received: BLN_SERVE_SERVICE_HOST.",
        ),
        ("BLN_SERVE_PORT", "Expected --port (BLN_SERVE_PORT) to be a valid integer"),
    ],
)
def test_with_service_links_the_service_refuses_to_start(injected: str, sentence: str) -> None:
    links = service_links(of_kind(files(BASE), "Service"))
    finished = subprocess.run(
        [*COMMAND, ARTIFACTS / "tiny_mpmm"],
        env=environment(**manifest_variables(BASE), **(links if injected == "all" else {injected: links[injected]})),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {sentence}")


@every_folder
def test_as_the_manifests_start_it_the_probes_find_the_models(folder: Path, tmp_path: Path) -> None:
    """With the manifest's variables and the volume as it is mounted: a repository, or one model's folder, renamed."""
    mounted = tmp_path / "models"
    shutil.copytree(ARTIFACTS / "tiny_mpmm", mounted if folder is KSERVE else mounted / "tiny_mpmm")
    (container,) = deployment(files(folder))["spec"]["template"]["spec"]["containers"]
    variables = {**manifest_variables(folder), "BLN_SERVE_PATHS": str(tmp_path if folder is KSERVE else mounted)}
    arguments = [str(tmp_path / Path(argument).name) for argument in container.get("args", [])]
    server = Server(*arguments, **variables)
    try:
        assert asyncio.run(probed(server, container)) == {"/healthz": 200, "/readyz": 200, "/models/tiny_mpmm": 200}
    finally:
        server.end()


async def probed(server: Server, container: Manifest) -> dict[str, int]:
    probes = (container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe"))
    paths = {probe["httpGet"]["path"] for probe in probes} | {"/models/tiny_mpmm"}
    async with server.client() as client:
        await server.wait_until_ready(client)
        return {path: (await client.get(path)).status_code for path in paths}
