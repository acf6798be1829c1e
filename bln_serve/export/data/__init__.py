"""Rows from outside, to calibrate with or to select on: read, and held against the model's signature.

names      which array is which input or target
sources    files, functions, datasets and arrays, as arrays by name
rows       what is handed on, by mini-batches: Data, read
labels     targets held against the loss that they are for: check_labels
"""

from bln_serve.export.data.labels import check_labels
from bln_serve.export.data.rows import Data, read

__all__ = ["Data", "check_labels", "read"]
