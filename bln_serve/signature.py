"""What goes into a model and comes out: names, dtypes, shapes and value ranges, and the check of a request against it.

A shape's first dimension is the rows of a request and is written None; the others are fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError

Arrays = dict[str, NDArray[Any]]

# A kind of array may become a dtype of these kinds without changing what the values mean.
_ACCEPTED_KINDS = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
_KIND_NAMES = {
    "f": "floats",
    "i": "integers",
    "u": "integers",
    "b": "booleans",
    "U": "text",
    "S": "bytes",
    "O": "mixed values",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as the ONNX file and the requests call it.
        dtype: NumPy's name, such as float32.
        shape: None for the rows, then fixed dimensions.
        value_range: lowest and highest allowed value, both inclusive, where values outside would fail the model.
        typical_range: where values are expected to lie, as the model's own Rescaling or Normalization says. Others are
            taken too.
        labels: what the entries of an output's last dimension mean.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    value_range: tuple[int, int] | None = None
    typical_range: tuple[float, float] | None = None
    labels: tuple[str, ...] | None = None

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    def describe(self) -> str:
        """Return the spec in a person's words, such as `float32 (rows, 8, 8)`."""
        return f"{self.dtype} ({', '.join('rows' if size is None else str(size) for size in self.shape)})"

    def validate(self, value: NDArray[Any]) -> NDArray[Any]:
        """Return `value` as this input's dtype, contiguous, or refuse it.

        Args:
            value: any array; integers are taken for a float input, and wider numbers if their values fit.

        Returns:
            The same values with this spec's dtype, C-contiguous, in native byte order.

        Raises:
            InvalidInputError: wrong rank, shape or kind; no rows; NaN or infinity; a number that does not fit the
                dtype; a value outside `value_range`.
        """
        self._check_shape(value)
        target = self._dtype
        if value.dtype.kind not in _ACCEPTED_KINDS[target.kind]:
            raise self._error(f"Received: {_KIND_NAMES.get(value.dtype.kind, value.dtype.name)}")
        if target.kind in "iu" and (self.value_range or value.dtype != target):
            self._check_integers(value, target)
        if value.dtype == target:
            cast = value if value.flags.c_contiguous and value.flags.aligned else value.copy()
        else:
            with np.errstate(over="ignore"):
                cast = np.ascontiguousarray(value, target)
        if target.kind == "f":
            self._check_floats(value, cast)
        return cast

    def _check_shape(self, value: NDArray[Any]) -> None:
        if value.ndim != len(self.shape) or value.shape[1:] != self.shape[1:]:
            raise self._error(f"Received: shape {value.shape}")
        if value.shape[0] == 0:
            raise self._error("Received: no rows. Send at least one")

    def _check_floats(self, value: NDArray[Any], cast: NDArray[Any]) -> None:
        if np.count_nonzero(np.isfinite(cast)) != cast.size:  # three times as fast as all() where it is called often
            if not np.isfinite(value).all():
                raise self._error(f"Received: {_first_non_finite(value)}. Every number must be finite")
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(cast))[0])
            raise self._error(f"Received: {value[at]} at index {list(at)}, which {self.dtype} cannot hold")
        if self.value_range:
            self._check_range(value, *self.value_range)

    def _check_integers(self, value: NDArray[Any], target: np.dtype[Any]) -> None:
        limits = np.iinfo(target)
        self._check_range(value, *(self.value_range or (limits.min, limits.max)))

    def _check_range(self, value: NDArray[Any], low: int, high: int) -> None:
        outside = (value < low) | (value > high)
        if outside.any():
            at = tuple(int(i) for i in np.argwhere(outside)[0])
            raise self._error(f"Received: {value[at]} at index {list(at)}. Every value must be from {low} to {high}")

    def _error(self, received: str) -> InvalidInputError:
        return InvalidInputError(f"Expected input {self.name!r} to be {self.describe()}. {received}.")


def _first_non_finite(value: NDArray[Any]) -> str:
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
    return f"{value[at]} at index {list(at)}"


@dataclass(frozen=True)
class ModelSignature:
    """A model's inputs and outputs. All have the same rows."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    def named(self, values: Mapping[str, Any] | NDArray[Any]) -> Mapping[str, Any]:
        """Give a single input its name.

        Raises:
            InvalidInputError: `values` is one array, and the model has several inputs.
        """
        if isinstance(values, Mapping):
            return values
        if len(self.inputs) != 1:
            raise InvalidInputError(
                f"Expected inputs by name: {self._input_names()}. Received: one array without a name."
            )
        return {self.inputs[0].name: values}

    def validate(self, values: Mapping[str, NDArray[Any]]) -> Arrays:
        """Check one request's inputs.

        Args:
            values: an array for each input, by name.

        Returns:
            The arrays as `TensorSpec.validate` returns them, in the signature's order.

        Raises:
            InvalidInputError: an input is missing, unknown or wrong, or the inputs differ in rows.
        """
        if self._by_name.keys() != values.keys():
            raise InvalidInputError(
                f"Expected inputs: {self._input_names()}. Received: {', '.join(map(repr, values)) or 'none'}."
            )
        checked = {name: spec.validate(values[name]) for name, spec in self._by_name.items()}
        if len(checked) == 1:
            return checked
        rows = {name: array.shape[0] for name, array in checked.items()}
        if len(set(rows.values())) > 1:
            raise InvalidInputError(f"Expected the same number of rows in every input. Received: {rows}.")
        return checked

    def _input_names(self) -> str:
        return ", ".join(f"{spec.name!r} {spec.describe()}" for spec in self.inputs)


def rows_of(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return the rows of validated inputs."""
    return int(next(iter(arrays.values())).shape[0])
