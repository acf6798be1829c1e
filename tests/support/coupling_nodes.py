"""Graphs of hand-made nodes, and the row coupling that is found in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bln_serve.export.coupling import analyse
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, DOMAIN
from bln_serve.statistics import RowCoupling

INDEPENDENT, POSITIONAL, MINI_BATCH = RowCoupling.INDEPENDENT, RowCoupling.POSITIONAL, RowCoupling.MINI_BATCH


def model_of(
    nodes: Sequence[onnx.NodeProto],
    *,
    opset: int = 18,
    shape: Sequence[Any] = ("n", 3, 4),
    tables: dict[str, np.ndarray] | None = None,
    dtype: int = TensorProto.FLOAT,
    more_inputs: dict[str, Sequence[Any]] | None = None,
    output: str = "a",
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", dtype, list(shape))]
    inputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims)) for name, dims in (more_inputs or {}).items()
    ]
    stored = [numpy_helper.from_array(values, name) for name, values in (tables or {}).items()]
    graph = helper.make_graph(list(nodes), "g", inputs, [onnx.ValueInfoProto(name=output)], stored)
    domains = {"": opset, DOMAIN: 1, "com.microsoft": 1}
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=9
    )


def coupling_of(*nodes: onnx.NodeProto, **options: Any) -> RowCoupling:
    return analyse(model_of(nodes, **options)).row_coupling


def node(op_type: str, inputs: str, outputs: str = "a", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op_type,
        ["" if name == "_" else name for name in inputs.split()],
        outputs.split(),
        domain=domain,
        name=f"{op_type.lower()}_{outputs.split(maxsplit=1)[0]}",
        **attributes,
    )


TURNED = node("Transpose", "x", "t", perm=[1, 0, 2])


def bln_node(policy: str, m: int, source: str = "x", output: str = "a", layer: str = "bln1") -> onnx.NodeProto:
    return node(BATCH_LAYER_NORMALIZATION, source, output, domain=DOMAIN, policy=policy, m=m, layer=layer)


def int64(*entries: int) -> np.ndarray:
    return np.array(entries, np.int64)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)
