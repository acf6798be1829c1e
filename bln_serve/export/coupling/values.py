"""Arithmetic on short vectors of sizes, such as the target of a Reshape that is put together from a Shape."""

from collections.abc import Callable, Mapping

import onnx

from bln_serve.export.coupling.calls import NodeCall
from bln_serve.export.coupling.constants import LONGEST, whole_numbers
from bln_serve.export.coupling.sizes import ONE, Dims, Size, product

_WHOLE = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_EXACT_FOR_SIZES = (*_WHOLE, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_Pair = Callable[[Size, Size], Size | None]


def entries(call: NodeCall) -> Dims | None:
    """Return the entries of a node's first output where it is a scalar or a short vector, as far as they are known."""
    fold = _FOLDS.get(call.node.op_type)
    dims = call.outputs[0].dims if call.outputs else None
    if fold is None or (dims is not None and len(dims) > 1):
        return None
    found = fold(call)
    return found if found is not None and len(found) <= LONGEST else None


def _values(call: NodeCall, index: int = 0) -> Dims | None:
    tensor = call.given(index)
    return None if tensor is None else tensor.values


def _same(call: NodeCall) -> Dims | None:
    return _values(call)


def _pairwise(pair: _Pair) -> Callable[[NodeCall], Dims | None]:
    def fold(call: NodeCall) -> Dims | None:
        result = _values(call)
        for other in call.present[1:]:
            result = _zip(result, other.values, pair)
        return result

    return fold


def _zip(first: Dims | None, second: Dims | None, pair: _Pair) -> Dims | None:
    if first is None or second is None or (len(first) != len(second) and 1 not in (len(first), len(second))):
        return None
    length = max(len(first), len(second))
    if not first or not second:
        return ()
    first, second = (side * length if len(side) == 1 else side for side in (first, second))
    return tuple(None if a is None or b is None else pair(a, b) for a, b in zip(first, second, strict=True))


def _plus(sign: int) -> _Pair:
    def pair(first: Size, second: Size) -> Size | None:
        if second == Size(0):
            return first
        if first.symbols != second.symbols:
            return Size(sign * second.factor, second.symbols) if first == Size(0) else None
        total = first.factor + sign * second.factor
        return Size(total, first.symbols if total else ())

    return pair


def _divide(call: NodeCall) -> Dims | None:
    return _pairwise(_quotient if call.input(0).dtype in _WHOLE else Size.over)(call)


def _quotient(first: Size, second: Size) -> Size | None:
    if first.number is None or not second.number:
        return first.over(second)
    rounded_down = abs(first.number) // abs(second.number)  # ONNX rounds towards zero, Python downwards
    return Size(rounded_down if (first.number < 0) == (second.number < 0) else -rounded_down)


def _cast(call: NodeCall) -> Dims | None:
    to, source = call.attributes.get("to"), _values(call)
    if to == onnx.TensorProto.BOOL and (numbers := call.input(0).numbers) is not None:
        return tuple(Size(int(number != 0)) for number in numbers)
    return source if to in _EXACT_FOR_SIZES else None


def _extreme(pick: Callable[[int, int], int]) -> _Pair:
    def pair(first: Size, second: Size) -> Size | None:
        if first == second:
            return first
        if first.number is None or second.number is None:
            return None
        return Size(pick(first.number, second.number))

    return pair


def _equal(first: Size, second: Size) -> Size | None:
    if first == second:
        return ONE
    # A length is never negative, which decides the comparison with -1 that exporters make.
    signs = [size.factor for size in (first, second)]
    known = first.number is not None and second.number is not None
    return Size(0) if known or min(signs) < 0 < max(signs) else None


def _where(call: NodeCall) -> Dims | None:
    sides = [_values(call, index) for index in range(3)]
    length = max(len(side or ()) for side in sides)
    spread = [side * length if side is not None and len(side) == 1 else side for side in sides]
    if any(side is None or len(side) != length for side in spread):
        return None
    rows = zip(*(side or () for side in spread), strict=True)
    return tuple(None if which is None else (yes if which.factor else no) for which, yes, no in rows)


def _gather(call: NodeCall) -> Dims | None:
    source, indices = _values(call), call.input(1).numbers
    if source is None or indices is None or call.input(0).rank != 1:
        return None
    if any(not -len(source) <= index < len(source) for index in indices):
        return None
    return tuple(source[index] for index in indices)


def _slice(call: NodeCall) -> Dims | None:
    source = _values(call)
    if source is None or call.input(0).rank != 1:
        return None
    if call.version < 10:
        bounds = [call.attributes["starts"][0], call.attributes["ends"][0], 1]
    else:
        read = [tensor.numbers if (tensor := call.given(index)) is not None else [1] for index in (1, 2, 4)]
        if any(not numbers or len(numbers) != 1 for numbers in read):
            return None
        bounds = [numbers[0] for numbers in read if numbers]
    start, end, step = bounds
    return source[start:end:step] if step > 0 else None


def _concat(call: NodeCall) -> Dims | None:
    joined: list[Size | None] = []
    for tensor in call.present:
        if tensor.values is not None:
            joined += tensor.values
        elif tensor.dims is not None and len(tensor.dims) == 1 and (size := tensor.dims[0]) is not None:
            if size.number is None or size.number > LONGEST:
                return None
            joined += [None] * size.number
        else:
            return None
    return tuple(joined)


def _reduce_product(call: NodeCall) -> Dims | None:
    source = _values(call)
    return None if source is None else (product(source),)


def _constant_of_shape(call: NodeCall) -> Dims | None:
    numbers, fill = call.input(0).numbers, call.attributes.get("value")
    if numbers is None or len(numbers) > 1 or (numbers and not 0 <= numbers[0] <= LONGEST):
        return None
    if fill is None:
        return (Size(0),) * (numbers[0] if numbers else 1)
    return (whole_numbers(fill) or (None,)) * (numbers[0] if numbers else 1)


def _expand(call: NodeCall) -> Dims | None:
    source, target = _values(call), call.input(1).numbers
    if source is None or target is None or len(target) != 1 or not 0 < target[0] <= LONGEST:
        return None
    return source * target[0] if len(source) == 1 else source if target[0] in (1, len(source)) else None


def _size(call: NodeCall) -> Dims | None:
    x = call.input(0)
    return None if x.dims is None or x.may_end_early else (product(x.dims),)


_FOLDS: Mapping[str, Callable[[NodeCall], Dims | None]] = {
    "Add": _pairwise(_plus(1)),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": _pairwise(_equal),
    "Expand": _expand,
    "Flatten": _same,
    "Gather": _gather,
    "Identity": _same,
    "Max": _pairwise(_extreme(max)),
    "Min": _pairwise(_extreme(min)),
    "Mul": _pairwise(lambda first, second: first * second),
    "ReduceProd": _reduce_product,
    "Reshape": _same,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _same,
    "Sub": _pairwise(_plus(-1)),
    "Unsqueeze": _same,
    "Where": _where,
}
