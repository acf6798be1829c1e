"""All rules, by domain and operator, and which inputs of an operator only say how something is laid out."""

from collections.abc import Mapping

from bln_serve.export.coupling import (
    custom,
    elementwise,
    indexing,
    networks,
    products,
    quantization,
    reductions,
    sequences,
    shaping,
    slicing,
)
from bln_serve.export.coupling.calls import Rule, Rules
from bln_serve.export.custom_ops import DOMAIN

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"

_STANDARD_RULES: Rules = {
    **elementwise.RULES,
    **indexing.RULES,
    **networks.RULES,
    **products.RULES,
    **quantization.RULES,
    **reductions.RULES,
    **sequences.RULES,
    **shaping.RULES,
    **slicing.RULES,
    **shaping.GROWING,
    **indexing.GROWING,
}
_BY_DOMAIN: Mapping[str, Rules] = {
    **dict.fromkeys(STANDARD, _STANDARD_RULES),
    DOMAIN: custom.OWN,
    MICROSOFT: custom.MICROSOFT,
}

ALWAYS_ASKED = {*shaping.GROWING, *indexing.GROWING, *slicing.RULES, *sequences.RULES, "Einsum"}
"""Standard operators whose rule is asked also where no input has rows: ONNX infers no broadcasting in an Einsum."""

WITHOUT_ROWS = {"Compress", "Det", "EyeLike", "NonMaxSuppression", "NonZero", "SequenceLength", "Size", "Unique"}
"""Standard operators that are followed only where nothing they read comes from rows."""

LAYOUT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "Upsample": (1,),
}
"""Inputs that say sizes and places: the number of rows may stand there without becoming a value."""

SHAPE_READERS = ("Shape", "Size")
"""Operators that read an input's sizes and not its entries."""


def rule_of(domain: str, op_type: str) -> Rule | None:
    """Return an operator's rule, None for an operator that is not known."""
    return _BY_DOMAIN.get(domain, {}).get(op_type)
