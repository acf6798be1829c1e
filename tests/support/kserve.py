"""KServe's two resources, field by field, and the Deployment that its controller makes of them.

The fields are those of its own source, pkg/apis/serving/v1alpha1/servingruntime_types.go and
pkg/apis/serving/v1beta1/{predictor,predictor_model,component,podspec}.go.
"""

import copy
from typing import Annotated, Any, Literal

import msgspec

Manifest = dict[str, Any]
Labels = dict[str, str]


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


def check_form(manifest: Manifest) -> None:
    """Check a resource's own fields; those of a pod and its containers are Kubernetes's, in `deployment`.

    Raises:
        msgspec.ValidationError: a field is unknown, or has a value that it cannot have.
    """
    if manifest["kind"] == "ServingRuntime":
        msgspec.convert(manifest, ServingRuntime)
    else:
        msgspec.convert(manifest, InferenceService)
        msgspec.convert(split_predictor(manifest)[0], Predictor)


def split_predictor(service: Manifest) -> tuple[Manifest, Manifest]:
    """Part a predictor's own fields from those of its pod."""
    predictor = service["spec"]["predictor"]
    own = {name: predictor[name] for name in Predictor.__struct_encode_fields__ if name in predictor}
    return own, {name: value for name, value in predictor.items() if name not in own}


def deployment(service: Manifest, runtime: Manifest) -> Manifest:
    """Return the Deployment that the controller makes, the claim's mount included."""
    (own, of_pod), of_runtime = split_predictor(service), runtime["spec"]
    model = {"name": "kserve-pvc-source", "mountPath": "/mnt/models", "readOnly": True}
    container = copy.deepcopy(of_runtime["containers"][0])
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
                "metadata": {"labels": {**service["metadata"].get("labels", {}), **labels}},
                "spec": {
                    **of_pod,
                    "containers": [container, *of_runtime["containers"][1:]],
                    "volumes": [*of_runtime.get("volumes", []), volume],
                },
            },
        },
    }
