"""Matrix products and Einsum: an axis that is summed over must not hold rows, and two operands with rows must meet."""

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, aligned
from bln_serve.export.coupling.sizes import ONE, Dims
from bln_serve.export.coupling.states import Dependence, Tensor, UnprovedError

_SUMMED = "sums over the row axis"


def matrix_product(call: NodeCall) -> Sequence[Answer]:
    """MatMul of inputs 0 and 1."""
    call.rows_only_in(0, 1)
    return [product_of(call.input(0), call.input(1))]


def product_of(a: Tensor, b: Tensor) -> Answer:
    """Answer for a (..., i, k) times b (..., k, j), with rows in one of them or, on the same batch axis, in both."""
    if a.rank == 0 or b.rank == 0:
        raise UnprovedError("multiplies a scalar")
    left = a if a.rank > 1 else replace(a, dims=(ONE, *a.sizes), axis=None if a.axis is None else a.axis + 1)
    right = b if b.rank > 1 else replace(b, dims=(*b.sizes, ONE))
    answer = _matrices(left, right)
    dims = answer.dims or ()
    axis = answer.axis or 0
    if a.rank == 1:
        dims, axis = dims[:-2] + dims[-1:], axis - (axis == len(dims) - 1)
    if b.rank == 1:
        dims = dims[:-1]
    return replace(answer, dims=dims, axis=axis)


def _matrices(a: Tensor, b: Tensor) -> Answer:
    if a.axis == a.rank - 1 or b.axis == b.rank - 2:
        raise UnprovedError(_SUMMED)
    rank = max(a.rank, b.rank)
    dims = (*_batch_dims(a.sizes[:-2], b.sizes[:-2]), a.sizes[-2], b.sizes[-1])
    if a.axis == a.rank - 2 and b.axis is None:
        return Answer(rank - 2, a.fold, dims)
    if b.axis == b.rank - 1 and a.axis is None:
        return Answer(rank - 1, b.fold, dims)
    if a.axis == a.rank - 2 or b.axis == b.rank - 1:
        raise UnprovedError("multiplies every row with every other")
    return aligned([a, b]).answer(rank, dims)


def _batch_dims(first: Dims, second: Dims) -> Dims:
    rank = max(len(first), len(second))
    first, second = ((ONE,) * (rank - len(side)) + side for side in (first, second))
    pairs = zip(first, second, strict=True)
    return tuple(b if a == ONE else a if b in (ONE, a) else None for a, b in pairs)


def _transposed(tensor: Tensor, flag: int) -> Tensor:
    if not flag:
        return tensor
    order = [*range(tensor.rank - 2), tensor.rank - 1, tensor.rank - 2]
    axis = None if tensor.axis is None else order.index(tensor.axis)
    return replace(tensor, dims=tuple(tensor.sizes[place] for place in order), axis=axis)


def gemm(call: NodeCall) -> Sequence[Answer]:
    """Gemm: the product of two matrices, and a bias that is broadcast onto it."""
    a, b = (_transposed(call.input(i), call.attributes.get(f"trans{'AB'[i]}", 0)) for i in (0, 1))
    bias = call.given(2)
    if a.axis is None and b.axis is None:
        raise UnprovedError("adds rows to what holds none")
    answer = product_of(a, b)
    if bias is None:
        return [answer]
    matrix = Tensor(a.dtype, answer.dims, answer.axis, answer.fold)
    return [aligned([matrix, bias]).answer(matrix.rank, answer.dims)]


def fused_product(call: NodeCall) -> Sequence[Answer]:
    """FusedMatMul of com.microsoft: a MatMul of operands whose last two axes may be swapped first."""
    call.rows_only_in(0, 1)
    if call.attributes.get("transBatchA", 0) or call.attributes.get("transBatchB", 0):
        raise UnprovedError("moves its batch axes")
    a, b = (_transposed(call.input(i), call.attributes.get(f"trans{'AB'[i]}", 0)) for i in (0, 1))
    return [product_of(a, b)]


def einsum(call: NodeCall) -> Sequence[Answer]:
    """Einsum: rows must bear one letter wherever they stand, and the output must keep it."""
    terms, result = _letters(call)
    pairs = list(zip(terms, call.present, strict=True))
    if any(len(set(term)) != len(term) or len(term) != tensor.rank for term, tensor in pairs):
        raise UnprovedError("takes a diagonal")
    sizes = {mark: size for term, tensor in pairs for mark, size in zip(term, tensor.sizes, strict=True) if size != ONE}
    dims = tuple(sizes.get(mark, ONE) for mark in result)
    if not call.with_rows:
        return [Answer(dims=dims)]
    marks = {(term[tensor.axis], tensor.fold) for term, tensor in pairs if tensor.axis is not None}
    if len(marks) != 1:
        raise UnprovedError("multiplies every row with every other")
    ((letter, fold),) = marks
    if letter not in result:
        raise UnprovedError(_SUMMED)
    dependence = max(_beside(term, tensor, letter) for term, tensor in pairs)
    return [Answer(result.index(letter), fold, dims, dependence, "combines rows with a constant by slot")]


def _beside(term: str, tensor: Tensor, letter: str) -> Dependence:
    if tensor.axis is not None or letter not in term or tensor.sizes[term.index(letter)] == ONE:
        return Dependence.NOTHING
    if not tensor.is_constant:
        raise UnprovedError("combines rows with a tensor that may be as long by chance")
    return Dependence.SLOT


def _letters(call: NodeCall) -> tuple[list[str], str]:
    """Return the letters of each operand's axes and of the result's; an ellipsis becomes capitals no one uses."""
    left, arrow, right = call.attributes["equation"].replace(" ", "").partition("->")
    if not arrow:
        raise UnprovedError("does not name its result")
    terms = left.split(",")
    if len(terms) != len(call.present):
        raise UnprovedError("names another number of operands")
    spare = "".join(letter for letter in ascii_uppercase if letter not in left)
    counts = [each.rank - len(term.replace("...", "")) for term, each in zip(terms, call.present, strict=True)]
    longest = max((count for term, count in zip(terms, counts, strict=True) if "..." in term), default=0)
    if min(counts) < 0 or longest > len(spare):
        raise UnprovedError("names more axes than there are")
    shared = spare[:longest]
    expanded = [term.replace("...", shared[longest - count :]) for term, count in zip(terms, counts, strict=True)]
    return expanded, right.replace("...", shared)


RULES: Rules = {"Einsum": einsum, "Gemm": gemm, "MatMul": matrix_product}
