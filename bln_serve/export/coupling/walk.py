"""From a graph's inputs to its outputs, node by node."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import onnx

from bln_serve.export.coupling import causes, constants, inference, operators, subgraphs, values
from bln_serve.export.coupling.calls import Answer, Inferred, NodeCall
from bln_serve.export.coupling.elementwise import RANDOM
from bln_serve.export.coupling.sizes import Dims, Size
from bln_serve.export.coupling.states import Cause, Dependence, Tensor, Trail, UnprovedError, lost
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, EMBEDDING, attributes_of, is_op

# Bodies inside bodies are followed again for each round of the outer one.
_DEEPEST = 16
_MOST_VISITS = 100_000

_SUBGRAPHS = {"If": subgraphs.branch, "Loop": subgraphs.loop, "Scan": subgraphs.scan}
# What a rule meets in a node whose attributes or inputs are not as its operator wants them.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Scope = ChainMap[str, Tensor]


@dataclass
class Walk:
    """One walk through a model.

    Attributes:
        versions: of the operators, by domain.
        ir_version: of the model.
        fixed_rows: how many rows there are, where the model is made for one number.
        layer_rows: how many entries of its axis 0 a row makes, for each BLN node met so far; None where unproved.
    """

    versions: Mapping[str, int]
    ir_version: int
    fixed_rows: int | None
    layer_rows: dict[str, int | None] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)
    _visits: int = 0

    def graph(self, graph: onnx.GraphProto, scope: Scope) -> list[Tensor]:
        """Follow a graph whose inputs stand in the scope, and return its outputs."""
        for tensor in graph.initializer:
            scope.maps[0].setdefault(tensor.name, constants.of_tensor(tensor))
        for sparse in graph.sparse_initializer:
            dims = tuple(map(Size, sparse.dims))
            scope.maps[0].setdefault(sparse.values.name, Tensor(sparse.values.data_type, dims))
        for node in graph.node:
            for name, tensor in zip(node.output, self._node(node, scope), strict=False):
                if name:
                    scope[name] = tensor
        return [_found(value.name, scope) for value in graph.output]

    def _node(self, node: onnx.NodeProto, scope: Scope) -> list[Tensor]:
        inputs = tuple(_found(name, scope) if name else None for name in node.input)
        if is_op(node, EMBEDDING) and len(inputs) > 1 and node.input[1] not in scope:
            inputs = (inputs[0], None)
        trail = Trail(
            causes.label(node), next((each.trail for each in inputs if each is not None and each.trail), None)
        )
        try:
            tensors = self._outputs(node, inputs, scope, trail)
        except UnprovedError as error:
            tensors = [lost(causes.first(inputs, Cause(causes.sentence(node, str(error)), trail)))] * len(node.output)
        except MALFORMED as error:
            said = f"is not as its operator wants it ({type(error).__name__})"
            tensors = [lost(causes.first(inputs, Cause(causes.sentence(node, said), trail)))] * len(node.output)
        if is_op(node, BATCH_LAYER_NORMALIZATION):
            self._note(node, inputs)
        return tensors

    def _note(self, node: onnx.NodeProto, inputs: Sequence[Tensor | None]) -> None:
        x = inputs[0] if inputs else None
        rows = x.fold.number if x is not None and x.axis == 0 else None
        self.layer_rows[node.name] = rows if self.layer_rows.get(node.name, rows) == rows else None

    def _outputs(
        self, node: onnx.NodeProto, inputs: tuple[Tensor | None, ...], scope: Scope, trail: Trail
    ) -> list[Tensor]:
        if any(tensor is not None and tensor.is_lost for tensor in inputs):
            raise UnprovedError("takes what is lost")
        domain = "" if node.domain in operators.STANDARD else node.domain
        version = self.versions.get(domain, 1)
        if domain == "" and node.op_type in _SUBGRAPHS:
            call = NodeCall(node, version, attributes_of(node), inputs, ())
            return self._subgraph(call, scope, trail)
        unknown = (Inferred(0, None),) * len(node.output)
        outputs = unknown if domain else inference.infer(node, inputs, version, self.ir_version)
        call = NodeCall(node, version, attributes_of(node), inputs, outputs, self.fixed_rows)
        if domain == "" and node.op_type == "Constant":
            constant = constants.of_attributes(dict(call.attributes))
            return [constant or Tensor(*_of(outputs[0]))]
        answers = list(_answers(call, domain))
        answers += [answers[-1]] * (len(outputs) - len(answers))
        return [self._tensor(call, index, answer, trail) for index, answer in enumerate(answers[: len(outputs)])]

    def _tensor(self, call: NodeCall, index: int, answer: Answer, trail: Trail) -> Tensor:
        """Put together what the rule says with what the inputs depend on."""
        data, layout = _parted(call)
        tensor = answer.tensor(call.outputs[index], _dtype(call))
        _require_sound_layout(answer, tensor, data, layout)
        dependence = max([answer.dependence, *(each.dependence for each in data)], default=answer.dependence)
        if tensor.axis is None:
            dependence = max([dependence, *(each.dependence for each in layout)])
            tensor, dependence = _with_values(tensor, dependence, call, index)
        elif dependence is Dependence.ROW_COUNT:
            dependence = Dependence.OTHER_ROWS
        if tensor.dims is not None and (tensor.axis is not None or dependence is Dependence.NOTHING):
            tensor = replace(tensor, dims=self._named(tensor.dims, call.node.output[index]))
        if dependence is Dependence.NOTHING and tensor.axis is None:
            return tensor
        cause = causes.cause_of(call, dependence, answer, trail)
        # Beside rows that are all there, a constant with too few entries is refused by the runtime.
        ends = [each.may_end_early for each in data if each.axis is not None]
        early = tensor.axis is not None and (answer.may_end_early or (bool(ends) and all(ends)))
        return replace(tensor, dependence=dependence, cause=cause, trail=trail, may_end_early=early)

    def _named(self, dims: Dims, name: str) -> Dims:
        """Give unknown sizes a name: no row and no number of rows changes them."""
        place = "/".join([*self._path, name])
        return tuple(Size(1, (f"{place}[{axis}]",)) if size is None else size for axis, size in enumerate(dims))

    def _subgraph(self, call: NodeCall, scope: Scope, trail: Trail) -> list[Tensor]:
        cause = Cause(causes.sentence(call.node, "carries on what does not keep its layout"), trail)

        def run(body: onnx.GraphProto, tensors: Sequence[Tensor]) -> list[Tensor]:
            with self._inside(call.node, body):
                inner = scope.new_child({value.name: tensor for value, tensor in zip(body.input, tensors, strict=True)})
                return self.graph(body, inner)

        found = _SUBGRAPHS[call.node.op_type](call, run, cause)
        return [self._through(tensor, name, trail) for tensor, name in zip(found, call.node.output, strict=False)]

    def _through(self, tensor: Tensor, name: str, trail: Trail) -> Tensor:
        """Return what leaves a body: with names for unknown sizes, and the node on its trail."""
        if tensor.is_constant:
            return tensor
        if tensor.dims is not None and tensor.axis is not None:
            tensor = replace(tensor, dims=self._named(tensor.dims, name))
        return replace(tensor, trail=tensor.trail or trail)

    @contextmanager
    def _inside(self, node: onnx.NodeProto, body: onnx.GraphProto) -> Iterator[None]:
        self._visits += len(body.node) + 1
        if len(self._path) >= _DEEPEST or self._visits > _MOST_VISITS:
            raise UnprovedError("nests its bodies too deeply to be followed")
        held = next(item.name for item in node.attribute if item.type == item.GRAPH and item.g == body)
        self._path.append(f"{node.output[0] if node.output else node.name}.{held}")
        try:
            yield
        finally:
            self._path.pop()


def _found(name: str, scope: Scope) -> Tensor:
    return scope.get(name) or lost(Cause(f"{name!r} is read before anything makes it", None))


def _answers(call: NodeCall, domain: str) -> Sequence[Answer]:
    """Ask the operator's rule; where no input has rows, what comes out has none either."""
    op_type = call.node.op_type
    if domain == "" and op_type in RANDOM:
        return [Answer(dependence=Dependence.OTHER_ROWS, reason="is random")]
    rule = operators.rule_of(domain, op_type)
    plain = domain == "" and op_type in operators.WITHOUT_ROWS
    if rule is None and not plain:
        shown = f"{domain}::{op_type}" if domain else op_type
        raise UnprovedError(f"is of an operator that is not known here ({shown})")
    if op_type not in operators.ALWAYS_ASKED and any(each.is_sequence for each in call.present):
        raise UnprovedError("takes a sequence")
    if not call.present and op_type != "SequenceEmpty":
        raise UnprovedError("takes nothing")
    if rule is not None and (call.with_rows or op_type in operators.ALWAYS_ASKED):
        return rule(call)
    if call.with_rows and op_type not in operators.SHAPE_READERS:
        raise UnprovedError("is not followed through rows")
    return [Answer()]


def _parted(call: NodeCall) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs whose entries count, and those that only say how something is laid out."""
    if call.node.domain in operators.STANDARD:
        if call.node.op_type in operators.SHAPE_READERS:
            return [], []
        places = operators.LAYOUT_INPUTS.get(call.node.op_type, ())
    else:
        places = ()
    pairs = [(index, tensor) for index, tensor in enumerate(call.inputs) if tensor is not None]
    return [each for index, each in pairs if index not in places], [each for index, each in pairs if index in places]


def _require_sound_layout(answer: Answer, tensor: Tensor, data: Sequence[Tensor], layout: Sequence[Tensor]) -> None:
    """Check what every rule must keep to.

    Raises:
        UnprovedError: sizes come from rows, or may grow with them along another axis; or rows vanished unexplained.
    """
    if any(each.axis is not None or each.dependence is Dependence.OTHER_ROWS for each in layout):
        raise UnprovedError("takes sizes or places from the rows")
    if tensor.axis is None:
        if answer.dependence is not Dependence.OTHER_ROWS and any(each.axis is not None for each in data):
            raise UnprovedError("loses the row axis")
        return
    computed = any(not each.is_constant for each in layout)
    others = (size for axis, size in enumerate(tensor.sizes) if axis != tensor.axis)
    if computed and None in others:
        raise UnprovedError("may make a second axis as long as the rows")


def _with_values(tensor: Tensor, dependence: Dependence, call: NodeCall, index: int) -> tuple[Tensor, Dependence]:
    """Add the entries, where they are sizes: known ones depend on the number of rows alone, or on nothing."""
    if tensor.is_sequence or call.node.domain not in operators.STANDARD or index:
        return tensor, dependence
    known = tensor.values if tensor.values is not None else values.entries(call)
    if known is not None and None not in known:
        grows = any(size is not None and size.has_rows for size in known)
        return replace(tensor, values=known), Dependence.ROW_COUNT if grows else Dependence.NOTHING
    if call.node.op_type in operators.SHAPE_READERS:
        x = call.input(0)
        dependence = Dependence.ROW_COUNT if x.axis is not None else x.dependence
    return replace(tensor, values=known), dependence


def _dtype(call: NodeCall) -> int:
    """Return the dtype that outputs have where shape inference is silent: as a look-up says, or as the first input."""
    if is_op(call.node, EMBEDDING) and (said := call.attributes.get("element_type")):
        return int(said)
    return next((each.dtype for each in call.present if each.dtype), 0)


def _of(inferred: Inferred) -> tuple[int, Dims | None]:
    return inferred.dtype, inferred.dims
