"""Operators that move numbers: shapes, cuts, joins, paddings, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from fewbit.onnx_reader.values import Known, Node, Registry, Value, known, number, numbers, sizes, tensor, torch_of


def shape(node: Node, x: Tensor) -> Known:
    return sizes(x.shape[slice(node.get("start", 0), node.get("end"))])


def size(node: Node, x: Tensor) -> Known:
    return known(math.prod(x.shape))


def reshape(node: Node, x: Value, wanted: Value) -> Tensor:
    y, target = tensor(x), numbers(wanted, "shape")
    copied = bool(target) and not node.get("allowzero", 0) and isinstance(target[0], int) and target[0] == 0
    if not node.get("allowzero", 0):
        if node.batch is not None and copied and not isinstance(x, Tensor):
            target[0] = node.now
        target = [y.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(target)]
    if isinstance(x, Tensor) and isinstance(wanted, Known) and not copied:  # what is copied is of the batch that runs
        target = freed(node, y, target, written=wanted.written)
    start = len(target) - 1
    if 0 < start < y.ndim - 1 and list(map(str, y.shape[:start])) == list(map(str, target[:start])):
        last, rest = target[start], math.prod(y.shape[start:])
        if not isinstance(last, int) or last == -1 or (isinstance(rest, int) and last == rest):
            return y.flatten(start)  # as text: comparing symbols would guard on them
    return y.reshape(target)


def freed(node: Node, x: Tensor, target: list[Any], *, written: bool) -> list[Any]:
    """A shape for the file's fixed batch, for the batch that runs in its place; `written` says that all of it is the file's."""
    batch, now, total = node.batch, node.now, math.prod(x.shape)
    symbolic = not isinstance(now, int)
    if batch is None or not target or not all(isinstance(n, int) for n in target) or (symbolic and isinstance(total, int)):
        return target
    one = total // now  # numbers of one image
    if isinstance(one, SymInt) and one.node.maybe_as_int() is None:  # of any size
        return [target[0] // batch * now, *target[1:]] if -1 in target[1:] and target[0] % batch == 0 else target
    one = int(one)
    if -1 in target:
        if not written and not symbolic and target[0] != batch:
            return target
        rest = -math.prod(target)
        target = [batch * one // rest if n == -1 else n for n in target]
    elif not symbolic and math.prod(target) == total:
        return target
    if math.prod(target) != batch * one or target[0] % batch:
        return target
    return [target[0] // batch * now, *target[1:]]


def flatten(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1 and x.ndim > 1:
        return x.flatten(1)
    return x.reshape(1, -1) if axis == 0 else x.reshape(math.prod(x.shape[:axis]), -1)


def _axes(node: Node, axes: Value) -> list[int] | None:
    return node.get("axes") if axes is None else numbers(axes, "axes")


def squeeze(node: Node, x: Value, axes: Value = None) -> Tensor:
    x, chosen = tensor(x), _axes(node, axes)
    if chosen is None:
        chosen = [i for i, n in enumerate(x.shape) if isinstance(n, int) and n == 1]
    for axis in sorted((a % x.ndim for a in chosen), reverse=True):
        x = x.squeeze(axis)
    return x


def unsqueeze(node: Node, x: Value, axes: Value = None) -> Tensor:
    x, chosen = tensor(x), _axes(node, axes) or []
    total = x.ndim + len(chosen)
    for axis in sorted(a % total for a in chosen):
        x = x.unsqueeze(axis)
    return x


def transpose(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    order = node.get("perm") or list(range(x.ndim))[::-1]
    if order == list(range(x.ndim)):
        return x
    moved = [i for i, p in enumerate(order) if i != p]
    return x.transpose(*moved) if len(moved) == 2 else x.permute(order)


def concat(node: Node, *values: Value) -> Tensor:
    parts, axis = [tensor(v) for v in values], node.get("axis", 1)
    if node.batch is not None and axis % parts[0].ndim and any(isinstance(v, Tensor) for v in values):
        constant = [isinstance(v, Known) and v.written and p.shape[0] == node.batch for p, v in zip(parts, values, strict=True)]
        parts = [p[:1].expand(node.now, *p.shape[1:]) if c else p for p, c in zip(parts, constant, strict=True)]
    return torch.cat(parts, axis)


def split(node: Node, x: Value, parts: Value = None) -> tuple[Tensor, ...]:
    x, axis, count = tensor(x), node.get("axis", 0), len(node.outputs)
    given = node.get("split") if parts is None else numbers(parts, "sizes of parts")
    if given is None:
        step = -(-x.shape[axis] // count)
        given = [step] * (count - 1) + [x.shape[axis] - step * (count - 1)]
    return x.split(given, axis)


def slices(node: Node, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None) -> Tensor:
    x = tensor(x)
    first = node.get("starts") if starts is None else numbers(starts, "start")
    last = node.get("ends") if ends is None else numbers(ends, "end")
    along = _axes(node, axes) or list(range(len(first)))
    strides = [1] * len(first) if steps is None else numbers(steps, "step")
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        if step > 0:
            x = cut(x, axis, start, end, step)
        else:
            n = x.shape[axis]
            rows = range(n)[start : None if end < -n else end : step]
            x = x.index_select(axis, torch.tensor(list(rows), dtype=torch.int64))
    return x


def cut(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    whole = isinstance(start, int) and start == 0 and isinstance(end, int) and end >= 2**31 - 1
    if whole and step == 1:
        return x
    index: list[Any] = [slice(None)] * (axis % x.ndim)
    return x[(*index, slice(start, end, step))]


def expand(node: Node, x: Value, wanted: Value) -> Tensor:
    x, target = tensor(x), numbers(wanted, "shape")
    if node.batch is not None and len(target) >= x.ndim and target[0] == node.batch > 1:
        target[0] = node.now
    lead = len(target) - x.ndim
    if lead < 0:
        target = [1] * -lead + target
        lead = 0
    return x.expand([-1 if isinstance(n, int) and n == 1 and i >= lead else n for i, n in enumerate(target)])


def filled(node: Node, wanted: Value) -> Tensor:
    value = node.get("value")
    dtype = torch.float32 if value is None else tensor(known(value)).dtype
    return torch.full(numbers(wanted, "shape"), 0.0 if value is None else value.reshape(-1)[0].item(), dtype=dtype)


def counted(node: Node, start: Value, limit: Value, step: Value) -> Tensor:
    ends = [numbers(v, "range")[0] for v in (start, limit, step)]
    is_real = isinstance(start, Known) and start.array.dtype.kind == "f"
    return torch.arange(*ends, dtype=torch.float32 if is_real else torch.int64)


PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(node: Node, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    x = tensor(x)
    given = (node.get("pads") or node.get("paddings")) if pads is None else numbers(pads, "padding")
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in numbers(axes, "axes")]
    half = len(given) // 2
    before, after = dict(zip(along, given[:half], strict=True)), dict(zip(along, given[half:], strict=True))
    ends = [(before.get(a, 0), after.get(a, 0)) for a in range(x.ndim)]
    mode = PAD_MODES[node.get("mode", "constant")]
    if mode == "constant":
        while len(ends) > 1 and ends[0] == (0, 0):
            ends.pop(0)
        fill = number(value, node.get("value", 0.0))
        if fill is None:
            raise ValueError("its value is computed from the image")
        widths = [n for pair in reversed(ends) for n in pair]
        if not any(widths):
            return x
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), widths, value=int(fill)).bool()
        return F.pad(x, widths, value=float(fill) if x.dtype.is_floating_point else int(fill))
    for axis, (low, high) in enumerate(ends):
        x = _pad_by_index(x, axis, low, high, mode)
    return x


def _pad_by_index(x: Tensor, axis: int, low: int, high: int, mode: str) -> Tensor:
    if not low and not high:
        return x
    n = x.shape[axis]
    if low < 0 or high < 0:
        x = x.narrow(axis, max(-low, 0), n + min(low, 0) + min(high, 0))
        return _pad_by_index(x, axis, max(low, 0), max(high, 0), mode)
    if not isinstance(n, int) and x.ndim == 4 and axis > 1:  # of any size, for which there are no numbers
        return F.pad(x, (low, high, 0, 0) if axis == 3 else (0, 0, low, high), mode)
    places = range(-low, n + high)
    if mode == "replicate":
        rows = [min(max(i, 0), n - 1) for i in places]
    elif mode == "circular":
        rows = [i % n for i in places]
    else:
        period = max(2 * (n - 1), 1)
        rows = [min(i % period, period - i % period) for i in places]
    return x.index_select(axis, torch.tensor(rows, dtype=torch.int64))


def depth_to_space(node: Node, x: Value) -> Tensor:
    x, block = tensor(x), node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    x = x.reshape(b, block, block, c // (block * block), h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // (block * block), h * block, w * block)


def space_to_depth(node: Node, x: Value) -> Tensor:
    x, block = tensor(x), node.get("blocksize")
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block)
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    return x.permute(order).reshape(b, c * block * block, h // block, w // block)


def tile(node: Node, x: Value, repeats: Value) -> Tensor:
    return tensor(x).repeat(numbers(repeats, "repeats"))


def trilu(node: Node, x: Value, k: Value = None) -> Tensor:
    x, shift = tensor(x), number(k, 0)
    return (torch.triu if node.get("upper", 1) else torch.tril)(x, int(shift))


def eye_like(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    dtype = torch_of(node.get("dtype")) if node.get("dtype") else x.dtype
    return torch.diagonal_scatter(
        torch.zeros(x.shape, dtype=dtype), torch.ones(_diagonal(x.shape, node.get("k", 0)), dtype=dtype), node.get("k", 0)
    )


def _diagonal(shape: Sequence[int], k: int) -> int:
    rows, columns = shape
    return max(min(rows + min(k, 0), columns - max(k, 0)), 0)


def centre(node: Node, x: Value, wanted: Value) -> Tensor:
    """CenterCropPad."""
    x = tensor(x)
    target = numbers(wanted, "shape")
    axes = node.get("axes") or list(range(x.ndim))
    for axis, n in zip(axes, target, strict=True):
        have = x.shape[axis]
        if n <= have:
            x = x.narrow(axis, (have - n) // 2, n)
        else:
            before = (n - have) // 2
            ends = [(0, 0)] * x.ndim
            ends[axis % x.ndim] = (before, n - have - before)
            x = F.pad(x, [v for pair in reversed(ends) for v in pair])
    return x


SHAPE: Registry = {
    "CenterCropPad": centre,
    "Concat": concat,
    "ConstantOfShape": filled,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Pad": pad,
    "Range": counted,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": slices,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
