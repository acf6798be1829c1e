"""What the Open Inference Protocol says of a server and of a model.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bln_serve.manifest import Manifest
from bln_serve.serving import binary_tensors
from bln_serve.serving.open_inference import known
from bln_serve.signature import TensorSpec


def server_metadata(version: str) -> dict[str, Any]:
    """Return what GET /v2 says of a service of this version."""
    return {"name": "bln_serve", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(
    name: str, versions: Sequence[int], manifest: Manifest, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what GET /v2/models/NAME says.

    Args:
        name: of the model.
        versions: those that are served.
        manifest: of the version that the metadata are of.
        parameters: what there is to say beside the manifest, by names that begin with `bln_`.

    Returns:
        A JSON object. Rows are -1 in its shapes; facts that are null are left out.
    """
    facts = {
        "bln_statistics": manifest.statistics,
        "bln_row_coupling": manifest.row_coupling.value,
        "bln_row_coupling_reason": manifest.row_coupling_reason,
        "bln_mini_batch_rows": manifest.mini_batch_rows,
        "bln_min_mini_batch_rows": manifest.min_mini_batch_rows,
        "bln_max_mini_batch_rows": manifest.max_mini_batch_rows,
        **parameters,
    }
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": "onnxruntime_onnx",
        "inputs": [_tensor_metadata(spec) for spec in manifest.signature.inputs],
        "outputs": [_tensor_metadata(spec) for spec in manifest.signature.outputs],
        "parameters": known(facts),
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if size is None else size for size in spec.shape]
    return {"name": spec.name, "datatype": binary_tensors.datatype_of(np.dtype(spec.dtype)), "shape": shape}
