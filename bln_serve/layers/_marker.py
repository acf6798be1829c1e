"""What may stand in for a layer's inference computation while a graph is traced for export."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Marker(Protocol):
    """Takes the place of a layer's inference computation."""

    def __call__(self, layer: Any, x: Any) -> Any:
        """Return a tensor with the shape and dtype of `x`, the input of the BatchLayerNormalization `layer`."""


_marker: ContextVar[Marker | None] = ContextVar("bln_marker", default=None)


@contextmanager
def marked_calls(marker: Marker) -> Iterator[None]:
    """Let `marker` stand in for every BLN layer's inference, in this thread or task, inside the `with` block."""
    token = _marker.set(marker)
    try:
        yield
    finally:
        _marker.reset(token)


def current_marker() -> Marker | None:
    """Return the marker of the innermost `marked_calls` block, or None outside of any."""
    return _marker.get()
