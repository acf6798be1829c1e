"""Operators that treat each entry alone, under NumPy's broadcasting."""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, aligned, kept
from bln_serve.export.coupling.sizes import ONE, Dims
from bln_serve.export.coupling.states import UnprovedError

_OF_ONE = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
_OF_SEVERAL = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]
# Before these versions of the operators a second operand was broadcast only where an attribute said so, and where.
_BROADCAST_SINCE = 7


def of_one(call: NodeCall) -> Sequence[Answer]:
    """Keep rows where they are."""
    call.rows_only_in(0)
    return [kept(call.input(0), call.input(0).sizes)]


def of_several(call: NodeCall) -> Sequence[Answer]:
    """Rows of all operands must meet."""
    if call.version < _BROADCAST_SINCE:
        raise UnprovedError("is of a version with broadcasting of its own")
    rank = max(each.rank for each in call.present)
    dims = call.outputs[0].dims or _broadcast([each.sizes for each in call.present], rank)
    return [aligned(call.present).answer(rank, dims)]


def _broadcast(shapes: Sequence[Dims], rank: int) -> Dims:
    """Return the sizes after broadcasting, where shape inference is silent because it does not know a dtype."""
    columns = zip(*((ONE,) * (rank - len(sizes)) + sizes for sizes in shapes), strict=True)
    longer = [{size for size in column if size != ONE} for column in columns]
    return tuple(ONE if not sizes else sizes.pop() if len(sizes) == 1 else None for sizes in longer)


def scalars_beside(call: NodeCall) -> Sequence[Answer]:
    """Input 0 is treated entry by entry; the others are one number each, the same for all rows."""
    call.rows_only_in(0)
    if any(each.dims is None or len(each.dims) > 0 for each in call.present[1:]):
        raise UnprovedError("takes as a bound what is not known to be a single number")
    return [kept(call.input(0), call.input(0).sizes)]


def _clip(call: NodeCall) -> Sequence[Answer]:
    return scalars_beside(call)


def _cast_like(call: NodeCall) -> Sequence[Answer]:
    return [kept(call.input(0), call.input(0).sizes)]


def _dropout(call: NodeCall) -> Sequence[Answer]:
    """Dropout passes its input on at inference; in training it is random."""
    training = call.given(2)
    at_inference = training is None or (training.array is not None and not training.array.any())
    if call.version < _BROADCAST_SINCE:
        at_inference = bool(call.attributes.get("is_test"))
    if not at_inference:
        raise UnprovedError("is random in training mode")
    call.rows_only_in(0)
    answer = kept(call.input(0), call.input(0).sizes)
    return [answer] * len(call.outputs)


RULES: Rules = {
    **dict.fromkeys(_OF_ONE, of_one),
    **dict.fromkeys(_OF_SEVERAL, of_several),
    "CastLike": _cast_like,
    "Clip": _clip,
    "Dropout": _dropout,
}

RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
