"""The checks of the manifests can fail: one wrong field or value at a time, and each is found."""

from typing import Any

import pytest
from support.kserve import Manifest
from support.kubernetes import BASE, DEPLOYMENT_MODE, KSERVE, NEWEST, files, invalid, of_kind, problems

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
    ("InferenceService", "metadata/annotations", {DEPLOYMENT_MODE: "RawDeployment"}, "Knative's rules would refuse"),
]


@pytest.mark.parametrize(("kind", "path", "value", "problem"), FAULTS)
def test_a_fault_is_found(kind: str, path: str, value: Any, problem: str) -> None:
    assert problem in "\n".join(problems(spoilt(kind, path, value)))
