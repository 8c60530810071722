"""A model as an ONNX file; large weights in a second file beside it, since no ONNX file may have more than 2 GB."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from fewbit.files import beside, write_atomic
from fewbit.onnx_file import DATA

INSIDE = 1 << 30  # bytes of weights that stay in the file itself: they are held twice while it is written, or loaded
TWIN = 128 << 20  # the same for the float twin, which nobody ships


def save(model: ir.Model, path: Path, *, twin: bool = False) -> None:
    """Write a model as an ONNX file, whole or not at all. With more than `INSIDE` bytes of weights (a `twin`: `TWIN`) they
    stand in `<path>.data`, which is there before the file is.
    """
    stored = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    large = sum(tensor.nbytes for tensor in stored) > (TWIN if twin else INSIDE)
    write_atomic(path, lambda part: _with_data(model, part, path) if large else ir.save(model, part))


def _with_data(model: ir.Model, part: Path, path: Path) -> None:
    """Write the file to `part`, and its weights to where they belong."""
    data = path.with_name(path.name + DATA)
    folder = beside(data)
    folder.mkdir(exist_ok=True)
    try:
        ir.save(model, folder / path.name, external_data=data.name)
        os.replace(folder / data.name, data)
        os.replace(folder / path.name, part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
