"""Keras's recurrent layers as custom nodes, one a layer, which `recurrent` lowers.

    y, h[, c] = com.bln::Recurrent(x[, h0[, c0]], W, R, B)      as `recurrent` says

is what one way through time computes, or both of a Bidirectional. What the layer makes of it (its last output or all,
its states, the merging of both ways) are plain operations behind the node. Whatever a layer may do that this is not, is
left to the plain conversion, with the reason: that is right, and a loop.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from bln_serve.export.custom_ops import RECURRENT
from bln_serve.export.marks import Mark, Recorder
from bln_serve.export.recurrent_cells import KINDS, alike, attributes_of, tables_of, unknown_activation

_ARGUMENTS = ("sequences", "initial_state", "mask", "training")
# A subclass may compute something else.
_CLASSES = (
    keras.layers.LSTM,
    keras.layers.GRU,
    keras.layers.SimpleRNN,
    keras.layers.RNN,
    keras.layers.Bidirectional,
)


@dataclass(frozen=True)
class Fallback:
    """A recurrent layer that is left to the plain conversion.

    Attributes:
        reason: half a sentence, about the layer.
    """

    reason: str

    def note(self, layer: str) -> str:
        """Return what is to be said of the layer of this name."""
        return f"{layer} runs as the plain conversion makes it: {self.reason}"


def call(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], recorder: Recorder) -> Any:
    """Mark a recurrent layer's call.

    Args:
        layer: any Keras layer, built.
        args: of its call.
        kwargs: of its call.
        recorder: takes the marks.

    Returns:
        What the call answers, in the layer's own structure; a `Fallback` if only the plain conversion can; None if the
        layer is no recurrent one.
    """
    if not isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional)):
        return None
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    states = [] if given.get("initial_state") is None else keras.tree.flatten(given["initial_state"])
    reasons = _reasons(layer, given["sequences"], given.get("mask"), states)
    if (reason := next(reasons, None)) is not None:
        return Fallback(reason)
    # Keras casts before a call what is a float, and inside it integers and states.
    x = tf.cast(given["sequences"], layer.compute_dtype)
    states = [tf.cast(state, layer.compute_dtype) for state in states]
    if isinstance(layer, keras.layers.Bidirectional):
        return _both_ways(layer, x, states, recorder)
    y, *after = _marked(layer, [layer], x, states, recorder)
    output = y if layer.return_sequences else after[0]
    return (output, *after) if layer.return_state else output


def unmarked(model: Any, asked: Iterable[Any]) -> list[str]:
    """Return a note for each recurrent layer of a model that is called where no stand-in is asked.

    Args:
        model: a Keras model.
        asked: the layers that a stand-in was asked about. It is not asked about what these call themselves.
    """
    seen = {id(layer) for layer in asked}
    notes = [
        Fallback(f"{holder.name} calls it itself, where it cannot be marked").note(layer.name)
        for layer, holder, inside in _recurrent_layers(model, seen, inside=False)
        if inside or id(layer) not in seen
    ]
    return list(dict.fromkeys(notes))


def _recurrent_layers(holder: Any, seen: set[int], *, inside: bool) -> Iterator[tuple[Any, Any, bool]]:
    for layer in holder._layers:
        if isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional)):
            yield layer, holder, inside
        else:
            yield from _recurrent_layers(layer, seen, inside=inside or id(layer) in seen)


def _reasons(layer: Any, x: Any, mask: Any, states: Sequence[Any]) -> Iterator[str]:
    """Yield why a call cannot be marked; each reason takes those before it for granted not to be there."""
    ways = _ways(layer)
    for part in (layer, *ways):
        if type(part) not in _CLASSES:
            yield f"its class {type(part).__name__} may compute something else than ONNX's operators"
    for way in ways:
        if type(way.cell) not in KINDS:
            yield f"its cell {type(way.cell).__name__} may compute something else than ONNX's operators"
        if activation := unknown_activation(way.cell):
            yield f"ONNX Runtime's operators cannot have the activation {activation}"
    if any(way.stateful for way in ways):
        yield "it is stateful"
    if len(ways) == 2 and ways[0].go_backwards:
        yield "its forward layer goes backwards"
    dtypes = {part.compute_dtype for part in (layer, *ways, *(way.cell for way in ways))}
    if dtypes != {"float32"}:
        yield f"ONNX Runtime's operators compute in float32, and it in {' and '.join(sorted(dtypes))}"
    if getattr(x, "_keras_mask", None) is not None or any(each is not None for each in keras.tree.flatten(mask)):
        yield "its input is masked"
    if len(x.shape) != 3 or not x.shape[1]:
        yield f"its input has the shape {tuple(x.shape)}, not (rows, time steps, features) with steps known to be there"
    expected = [(x.shape[0], way.cell.units) for way in ways for _ in range(KINDS[type(way.cell)].states)]
    received = [tuple(state.shape) for state in states]
    if states and received != expected:
        yield f"its initial states have the shapes {received}, not {expected}"


def _ways(layer: Any) -> list[Any]:
    return [layer.forward_layer, layer.backward_layer] if isinstance(layer, keras.layers.Bidirectional) else [layer]


def _both_ways(layer: Any, x: Any, states: Sequence[Any], recorder: Recorder) -> Any:
    """Return what a Bidirectional answers."""
    ways = _ways(layer)
    joined, outputs, after = (_together if alike(*(way.cell for way in ways)) else _apart)(layer, x, states, recorder)
    merged = [joined] if layer.merge_mode == "concat" else _merged(layer.merge_mode, *outputs)
    results = (*merged, *after) if layer.return_state else tuple(merged)
    return results if len(results) > 1 else results[0]


def _together(layer: Any, x: Any, states: Sequence[Any], recorder: Recorder) -> tuple[Any, list[Any], list[Any]]:
    """Mark both ways as one node; return their outputs side by side and each by itself, and their states."""
    y, *after = _marked(layer, _ways(layer), x, states, recorder)
    joined = y if layer.return_sequences else after[0]
    halves = [tf.split(state, 2, axis=-1) for state in after]
    return joined, tf.split(joined, 2, axis=-1), [pair[way] for way in (0, 1) for pair in halves]


def _apart(layer: Any, x: Any, states: Sequence[Any], recorder: Recorder) -> tuple[Any, list[Any], list[Any]]:
    """Mark each way as a node of its own, since one ONNX operator cannot be both."""
    outputs, after, left = [], [], list(states)
    for way in _ways(layer):
        count = KINDS[type(way.cell)].states
        y, *own = _marked(layer, [way], x, left[:count], recorder)
        outputs.append(y if layer.return_sequences else own[0])
        after += own
        left = left[count:]
    return tf.concat(outputs, axis=-1), outputs, after


def _merged(merge_mode: str | None, y: Any, y_reverse: Any) -> list[Any]:
    if merge_mode is None:
        return [y, y_reverse]
    if merge_mode == "mul":
        return [y * y_reverse]
    total = y + y_reverse
    return [total / 2 if merge_mode == "ave" else total]


def _marked(layer: Any, ways: Sequence[Any], x: Any, states: Sequence[Any], recorder: Recorder) -> tuple[Any, ...]:
    """Mark one node for one way through time or for both.

    Returns:
        y (rows, time, ways * units), the ways side by side, each step at its time, or in the order of processing where
        the layer itself goes backwards; then each state behind the last step, (rows, ways * units).
    """
    cells, kind = [way.cell for way in ways], KINDS[type(ways[0].cell)]
    rows, time, _ = x.shape
    units = sum(cell.units for cell in cells)
    prefix = recorder.prefix(ways[0])
    attributes = {
        **attributes_of(cells),
        "direction": "bidirectional" if len(ways) == 2 else "reverse" if ways[0].go_backwards else "forward",
        "reversed_output": int(ways[0] is layer and layer.go_backwards),
    }
    tables = {f"{prefix}/{name}": values for name, values in tables_of(cells, layer.compute_dtype).items()}
    state = (rows, units)
    mark = Mark(
        RECURRENT, layer.name, attributes, tables, (rows, time, units), layer.compute_dtype, (state,) * kind.states
    )
    before = [tf.concat(states[index :: kind.states], axis=-1) for index in range(kind.states)] if states else []
    return recorder.mark_all([x, *before], mark)
