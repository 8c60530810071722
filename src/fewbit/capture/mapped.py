"""An exported program whose weights are pages of its own file, which the system reads when needed and drops at will."""

from __future__ import annotations

import copy
import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fewbit.core.pages import mapped as pages_of

CONFIG = "data/weights/model_weights_config.json"


def mapped(program: ExportedProgram, path: Path) -> ExportedProgram:
    """The program with the weights of the file that it was written to, as `torch.export.save` stores them: each in a member of
    its own that is not compressed. What lies there in another way stays as it is, and so does the program that is given.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    rows = json.loads(reader.get_record(CONFIG))["config"] if CONFIG in reader.get_all_records() else {}
    pages = pages_of(path)
    state = {
        name: _stored(tensor, rows.get(name), reader, pages) if isinstance(tensor, Tensor) else tensor
        for name, tensor in program.state_dict.items()
    }
    result = copy.copy(program)
    result._state_dict = state
    return result


def _stored(tensor: Tensor, row: Any, reader: Any, pages: mmap.mmap) -> Tensor:
    """A weight in the file; the tensor itself where the file has it in another form."""
    if row is None or row["use_pickle"] or tensor.layout != torch.strided or not tensor.numel():
        return tensor
    meta = row["tensor_meta"]
    sizes, strides = ([one.get("as_int") for one in meta[key]] for key in ("sizes", "strides"))
    record = f"data/weights/{row['path_name']}"
    start = reader.get_record_offset(record) + meta["storage_offset"]["as_int"] * tensor.itemsize
    if (tuple(sizes), tuple(strides)) != (tuple(tensor.shape), tensor.stride()) or start % tensor.itemsize:
        return tensor
    span = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    value = torch.frombuffer(pages, dtype=tensor.dtype, count=span, offset=start).as_strided(sizes, strides)
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
