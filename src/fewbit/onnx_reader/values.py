"""What flows between the nodes of a file: tensors that depend on the image, and arrays whose numbers are known before.

Shapes and other integers are known: as numbers, or, where the batch is in them, as symbols of torch.export in an object array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from torch import SymBool, SymFloat, SymInt, Tensor

SYMBOLS = (SymInt, SymFloat, SymBool)
REAL = (np.dtype(np.float16), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16))  # computed in float32


@dataclass
class Known:
    """An array whose numbers are known before the image is; `stored` is the same as a tensor of the module.

    `written` says that the file holds it, or what follows from the file alone, and not from the size of the images that run.
    `asked` becomes true when a node reads it as a tensor.
    """

    array: np.ndarray
    stored: Tensor | None = None
    written: bool = False
    asked: bool = field(default=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim


Value = Tensor | Known | None


@dataclass(frozen=True)
class Node:
    """One node of a file: its operator, the opset that this is of, and its attributes as Python values."""

    name: str
    op: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    batch: int | None = None  # the fixed batch of the file
    now: Any = None  # the batch that runs in its place
    seen: set[str] = field(default_factory=set, compare=False, repr=False)  # attributes that were asked for

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return self.attributes.get(name, default)

    def __str__(self) -> str:
        domain = f"{self.domain}." if self.domain else ""
        return f"{domain}{self.op} '{self.name}' (opset {self.opset})"


def tensor(value: Value) -> Tensor:
    """The value as a tensor, whether it depends on the image or not."""
    if isinstance(value, Tensor):
        return value
    assert value is not None
    value.asked = True
    if value.stored is None:
        value.stored = _made(value.array)
    return value.stored


def _made(array: np.ndarray) -> Tensor:
    if array.dtype == object:
        return torch.tensor(array.tolist())
    if array.size == 0:
        return torch.empty(array.shape, dtype=torch_type(array.dtype))
    return torch.tensor(array.tolist(), dtype=torch_type(array.dtype))


def torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.float32 if dtype in REAL else torch.from_numpy(np.empty(0, dtype)).dtype


def known(array: Any) -> Known:
    """An array of numbers and symbols; one that holds no symbol gets a type of numbers, and floats become float32."""
    if not isinstance(array, np.ndarray):
        flat = np.empty(1, dtype=object)
        flat[0] = array
        array = flat.reshape(()) if isinstance(array, SYMBOLS) else np.asarray(array)
    if array.dtype == object and not any(isinstance(v, SYMBOLS) for v in array.flat):
        array = np.array(array.tolist(), dtype=None if array.size else np.int64).reshape(array.shape)
    return Known(array.astype(np.float32) if array.dtype in REAL else array)


def sizes(values: Sequence[Any]) -> Known:
    """A list of integers, some of which may be symbols."""
    array = np.empty(len(values), dtype=object)
    array[:] = list(values)
    return Known(array.astype(np.int64)) if not any(isinstance(v, SYMBOLS) for v in values) else Known(array)


def numbers(value: Value, what: str) -> list[Any]:
    """The numbers of a known value, for what torch has to know before the image is there."""
    if not isinstance(value, Known):
        raise ValueError(f"its {what} is computed from the image, and torch has to know it before")
    return list(value.array.reshape(-1).tolist())


def number(value: Value, default: Any = None) -> Any:
    """The one number of a known value, None where it is computed from the image."""
    if value is None:
        return default
    return value.array.reshape(-1)[0] if isinstance(value, Known) and value.array.size == 1 else None


def scalar(value: Value, beside: Value) -> Any:
    """A known single number as a Python number where it leaves the type and rank of a tensor beside it as they are."""
    if not isinstance(value, Known) or value.array.size != 1 or not isinstance(beside, Tensor) or value.ndim > beside.ndim:
        return None
    one = value.array.reshape(-1)[0]
    if isinstance(one, SYMBOLS) or (value.array.dtype.kind == "f") != beside.dtype.is_floating_point:
        return None
    return None if beside.dtype == torch.bool else one.item()


def torch_of(number_of_type: int) -> torch.dtype | None:
    """The torch type that values of an ONNX type are computed in; None for one that torch has not."""
    return TYPES.get(number_of_type)


_T = onnx.TensorProto
TYPES: dict[int, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.FLOAT16: torch.float32,
    _T.BFLOAT16: torch.float32,
    _T.DOUBLE: torch.float32,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.BOOL: torch.bool,
}

Operator = Callable[..., Any]
Registry = dict[str, Operator]
