"""Operators on numbers that are known before the image is: shapes, axes, sizes. Symbols of the batch pass through.

Where all that a node reads is known it runs here, with numpy; the result is known in turn.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import SymFloat, SymInt

from fewbit.onnx_reader.values import SYMBOLS, Node, torch_of

Array = Any
MOST = 4096  # elements of an array that is made of numbers; larger ones become tensors
NUMPY = {
    torch.float32: np.float32, torch.int8: np.int8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
    torch.uint8: np.uint8, torch.uint16: np.uint16, torch.uint32: np.uint32, torch.uint64: np.uint64, torch.bool: np.bool_,
}  # fmt: skip


def each(symbolic: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays: numpy's, or the one for single numbers where symbols are among them."""

    def call(node: Node, *arrays: Array) -> Array:
        if all(a.dtype != object for a in arrays):
            return plain(*arrays)
        return np.frompyfunc(symbolic, len(arrays), 1)(*(a.astype(object) for a in arrays))

    return call


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        return np.trunc(a / b).astype(a.dtype) if (a.size and (a < 0).any()) or (b < 0).any() else a // b
    return a / b


def _quotient(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float | SymFloat) or isinstance(b, float | SymFloat) else a // b


def _reduced(symbolic: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(node: Node, x: Array, axes: Array | None = None) -> Array:
        chosen = node.get("axes") if axes is None else axes.reshape(-1).tolist()
        keep, none_is_all = bool(node.get("keepdims", 1)), not node.get("noop_with_empty_axes", 0)
        if not chosen and not none_is_all:
            return x
        if not x.size:
            return NotImplemented
        if x.dtype != object:
            return plain(x, axis=tuple(chosen) if chosen else None, keepdims=keep)
        if x.ndim > 1:
            return NotImplemented
        total = functools.reduce(symbolic, x.tolist())
        return _object([total]) if keep else _object([total]).reshape(())

    return call


def _object(values: Any) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _cast(node: Node, x: Array) -> Array:
    dtype = torch_of(node.get("to"))
    if dtype is None or (x.dtype != object and x.size > MOST):
        return NotImplemented
    if x.dtype != object:
        return x.astype(NUMPY[dtype])

    def one(v: Any) -> Any:
        if not isinstance(v, SYMBOLS):
            return float(v) if dtype.is_floating_point else bool(v) if dtype == torch.bool else int(v)
        return torch.sym_float(v) if dtype.is_floating_point else torch.sym_int(v) if isinstance(v, SymFloat) else v

    return np.frompyfunc(one, 1, 1)(x)


def _slice(node: Node, x: Array, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Array:
    starts = node.get("starts") if starts is None else starts.tolist()
    ends = node.get("ends") if ends is None else ends.tolist()
    axes = (node.get("axes") or range(len(starts))) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    index: list[Any] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if any(isinstance(v, SYMBOLS) for v in (start, end)):
            return NotImplemented
        index[axis] = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(index)]


def _gather(node: Node, x: Array, index: Array) -> Array:
    return np.take(x, index.astype(np.int64), axis=node.get("axis", 0))


def _axes(node: Node, axes: Array | None) -> list[int] | None:
    return node.get("axes") if axes is None else axes.reshape(-1).tolist()


def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, axes)
    return np.squeeze(x, tuple(chosen) if chosen is not None else None)


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, tuple(_axes(node, axes) or ()))


def _reshape(node: Node, x: Array, shape: Array) -> Array:
    wanted = shape.tolist()
    if any(isinstance(n, SYMBOLS) for n in wanted):
        return NotImplemented
    if not node.get("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _concat(node: Node, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=node.get("axis", 1))


def _filled(node: Node, shape: Array) -> Array:
    """ConstantOfShape, where its shape is short and has no symbol."""
    wanted = shape.tolist()
    if any(isinstance(n, SYMBOLS) for n in wanted) or math.prod(wanted) > MOST:
        return NotImplemented
    value = node.get("value")
    return np.full(wanted, 0.0 if value is None else value.reshape(-1)[0], dtype=np.float32 if value is None else value.dtype)


def _range(node: Node, start: Array, limit: Array, step: Array) -> Array:
    ends = [a.reshape(-1)[0] for a in (start, limit, step)]
    if any(isinstance(n, SYMBOLS) for n in ends):
        return NotImplemented
    result = np.arange(*ends, dtype=start.dtype if start.dtype != object else np.int64)
    return result if result.size <= MOST else NotImplemented


def _expand(node: Node, x: Array, shape: Array) -> Array:
    wanted = shape.tolist()
    if any(isinstance(n, SYMBOLS) for n in wanted):
        return NotImplemented
    result = np.broadcast_shapes(x.shape, tuple(wanted))
    return np.broadcast_to(x, result) if math.prod(result) <= MOST else NotImplemented


def _split(node: Node, x: Array, parts: Array | None = None) -> Any:
    axis, count = node.get("axis", 0), len(node.outputs)
    given = node.get("split") if parts is None else parts.tolist()
    step = -(-x.shape[axis] // count)
    ends = np.cumsum(given)[:-1] if given else [min(step * i, x.shape[axis]) for i in range(1, count)]
    return tuple(np.split(x, ends, axis=axis))


def _where(node: Node, condition: Array, a: Array, b: Array) -> Array:
    if condition.dtype == object:
        return np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)(condition, a.astype(object), b.astype(object))
    return np.where(condition, a, b) if a.dtype == b.dtype else np.where(condition, a.astype(object), b.astype(object))


def _shape(node: Node, x: Array) -> Array:
    return np.array(x.shape[slice(node.get("start", 0), node.get("end"))], dtype=np.int64)


def _transpose(node: Node, x: Array) -> Array:
    return np.transpose(x, node.get("perm"))


def _tile(node: Node, x: Array, repeats: Array) -> Array:
    if any(isinstance(n, SYMBOLS) for n in repeats.tolist()):
        return NotImplemented
    return np.tile(x, repeats.tolist())


def _floor(x: Any) -> Any:
    return x if isinstance(x, int | SymInt) else torch.sym_float(math.floor(x))


HOST: dict[str, Callable[..., Any]] = {
    "Abs": each(abs, np.abs),
    "Add": each(operator.add, np.add),
    "And": each(lambda a, b: bool(a) and bool(b), np.logical_and),
    "Cast": _cast,
    "Ceil": each(lambda x: -_floor(-x), np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": each(_quotient, _divided),
    "Equal": each(operator.eq, np.equal),
    "Expand": _expand,
    "Floor": each(_floor, np.floor),
    "Gather": _gather,
    "Greater": each(operator.gt, np.greater),
    "GreaterOrEqual": each(operator.ge, np.greater_equal),
    "Identity": lambda node, x: x,
    "Less": each(operator.lt, np.less),
    "LessOrEqual": each(operator.le, np.less_equal),
    "Max": each(lambda *v: functools.reduce(torch.sym_max, v), lambda *v: functools.reduce(np.maximum, v)),
    "Min": each(lambda *v: functools.reduce(torch.sym_min, v), lambda *v: functools.reduce(np.minimum, v)),
    "Mod": lambda node, a, b: each(operator.mod, np.fmod if node.get("fmod", 0) else np.mod)(node, a, b),
    "Mul": each(operator.mul, np.multiply),
    "Neg": each(operator.neg, np.negative),
    "Not": each(operator.not_, np.logical_not),
    "Or": each(lambda a, b: bool(a) or bool(b), np.logical_or),
    "Range": _range,
    "ReduceMax": _reduced(torch.sym_max, np.max),
    "ReduceMin": _reduced(torch.sym_min, np.min),
    "ReduceProd": _reduced(operator.mul, np.prod),
    "ReduceSum": _reduced(operator.add, np.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda node, x: np.array(x.size, dtype=np.int64),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": each(lambda x: torch.sym_float(x) ** 0.5, np.sqrt),
    "Squeeze": _squeeze,
    "Sub": each(operator.sub, np.subtract),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
