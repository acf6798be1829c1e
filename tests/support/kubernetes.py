"""What must hold of a folder's manifests, as lists of problems: empty for ours, not for manifests spoilt on purpose."""

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import kubernetes_validate
import msgspec
import yaml

from bln_serve.errors import UsageError
from bln_serve.manifest import FORMAT_VERSION
from bln_serve.serving.app import create_app
from bln_serve.serving.settings import Settings, from_command_line
from support import kserve
from support.kserve import Labels, Manifest
from support.server import ROOT

BASE = ROOT / "docker" / "kubernetes"
KSERVE = BASE / "kserve"
ARTIFACTS = ROOT / "tests" / "golden" / "artifacts"

# The first whose preStop sleeps unless an operator forbids it (KEP 3960: beta), and the newest that has schemas here.
OLDEST, NEWEST = "1.30", "1.37"

DEPLOYMENT_MODE = "serving.kserve.io/deploymentMode"

# What the process still takes once shutdown_timeout_s is over, as its --help says.
ENDS_WITHIN_S = 2


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


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def is_kserve(manifests: list[Manifest]) -> bool:
    return any(manifest["kind"] == "InferenceService" for manifest in manifests)


def deployment(manifests: list[Manifest]) -> Manifest:
    """Return the Deployment; for KServe the one that its controller makes."""
    if is_kserve(manifests):
        return kserve.deployment(of_kind(manifests, "InferenceService"), of_kind(manifests, "ServingRuntime"))
    return of_kind(manifests, "Deployment")


def invalid(manifests: list[Manifest], version: str) -> Iterator[str]:
    """Yield what an API server of this version would refuse, or drop without a word."""
    try:
        for manifest in manifests:
            if manifest["kind"] in ("ServingRuntime", "InferenceService"):
                kserve.check_form(manifest)
            else:
                _validate(manifest, version)
        if is_kserve(manifests):
            _validate(deployment(manifests), version)
    except (kubernetes_validate.ValidationError, msgspec.ValidationError) as error:
        yield str(error)


def _validate(manifest: Manifest, version: str) -> None:
    # It falls back to the newest schemas it has, and would so pass for a version that it does not know.
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


@cache
def service_routes() -> frozenset[str]:
    with mock.patch.dict(os.environ, clear=True):
        app = create_app(Settings(paths=(ARTIFACTS,)))
    return frozenset(app.openapi()["paths"])


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
    if service["metadata"].get("annotations", {}).get(DEPLOYMENT_MODE) != "Standard":
        yield "Knative's rules would refuse the service"
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
