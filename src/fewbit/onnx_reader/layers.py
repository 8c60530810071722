"""Operators with weights or windows: products, convolutions, poolings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.values import Node, Registry, Value, numbers, tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
ADAPTIVE_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def paddings(
    node: Node, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """[(before, after)] of each axis, as `pads` or `auto_pad` give them."""
    how, pads = node.get("auto_pad", "NOTSET"), node.get("pads") or [0] * (2 * len(kernel))
    if how == "VALID":
        return [(0, 0)] * len(kernel)
    if how == "NOTSET":
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    ends = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        ends.append((small, large) if how == "SAME_UPPER" else (large, small))
    return ends


def padded(x: Tensor, ends: Sequence[Any], value: float = 0.0) -> Tensor:
    return F.pad(x, [n for pair in reversed(ends) for n in pair], value=value) if any(any(p) for p in ends) else x


def symmetric(ends: Sequence[Any]) -> bool:
    return all(low == high >= 0 for low, high in ends)


def conv(node: Node, x: Value, w: Value, b: Value = None) -> Tensor:
    x, w = tensor(x), tensor(w)
    dims = w.ndim - 2
    stride, dilation = node.get("strides") or [1] * dims, node.get("dilations") or [1] * dims
    ends = paddings(node, x.shape[2:], w.shape[2:], stride, dilation)
    if not symmetric(ends):
        x, ends = padded(x, ends), [(0, 0)] * dims
    bias = None if b is None else tensor(b)
    return CONV[dims](x, w, bias, stride, [low for low, _ in ends], dilation, node.get("group", 1))


def conv_transpose(node: Node, x: Value, w: Value, b: Value = None) -> Tensor:
    x, w = tensor(x), tensor(w)
    dims, kernel = w.ndim - 2, list(w.shape[2:])
    stride, dilation = node.get("strides") or [1] * dims, node.get("dilations") or [1] * dims
    extra, wanted = node.get("output_padding") or [0] * dims, node.get("output_shape")
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in zip(x.shape[2:], stride, kernel, dilation, extra, strict=True)
    ]
    how = node.get("auto_pad", "NOTSET")
    if wanted or how.startswith("SAME"):
        target = wanted[-dims:] if wanted else [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
        ends = []
        for have, want in zip(full, target, strict=True):
            total = max(have - want, 0)
            small, large = total // 2, total - total // 2
            ends.append((small, large) if how == "SAME_UPPER" else (large, small))
            if wanted and have < want:
                extra[len(ends) - 1] += want - have
    else:
        ends = paddings(node, x.shape[2:], kernel, stride, dilation)
    bias = None if b is None else tensor(b)
    function, rest = CONV_TRANSPOSE[dims], (node.get("group", 1), dilation)
    if symmetric(ends) and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        return function(x, w, bias, stride, [low for low, _ in ends], extra, *rest)
    if all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        whole = function(x, w, bias, stride, 0, extra, *rest)
    else:
        whole = F.pad(function(x, w, None, stride, 0, 0, *rest), [n for e in reversed(extra) for n in (0, e)])
        whole = whole if bias is None else whole + bias.reshape(-1, *[1] * dims)
    return padded(whole, [(-low, -high) for low, high in ends])


def gemm(node: Node, a: Value, b: Value, c: Value = None) -> Tensor:
    x, w = tensor(a), tensor(b)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    x = x.t() if node.get("transA", 0) else x
    bias = None if c is None else tensor(c)
    if bias is not None and bias.ndim == 2 and bias.shape[0] == 1:
        bias = bias.reshape(-1)
    if alpha != 1:
        w = w * alpha
    if bias is not None and beta != 1:
        bias = bias * beta
    weight = w if node.get("transB", 0) else w.t()
    if bias is None or (bias.ndim == 1 and bias.shape == weight.shape[:1]):
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias


def windows(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[Any]]:
    """The kernel, strides, dilations and paddings of a pooling. `auto_pad` pads as for a window whose places are next to each
    other, whatever its dilations: so onnxruntime does, of a pooling and not of a convolution.
    """
    kernel = node.get("kernel_shape")
    near = [1] * len(kernel)
    stride, dilation = node.get("strides") or near, node.get("dilations") or near
    return kernel, stride, dilation, paddings(node, x.shape[2:], kernel, stride, near)


def _rounded_up(node: Node, x: Tensor, kernel: list[int], stride: list[int], dilation: list[int], ends: list[Any]) -> list[Any]:
    """The paddings with which sizes rounded down are what `ceil_mode` makes of them: no window begins in the padding."""
    if not node.get("ceil_mode", 0):
        return ends
    larger = []
    for n, k, s, d, (low, high) in zip(x.shape[2:], kernel, stride, dilation, ends, strict=True):
        span, total = (k - 1) * d + 1, n + low + high
        count = -(-(total - span) // s) + 1
        count -= (count - 1) * s >= n + low
        larger.append((low, max(high, (count - 1) * s + span - n - low)))
    return larger


def max_pool(node: Node, x: Value) -> Any:
    x = tensor(x)
    is_real = x.dtype.is_floating_point
    kernel, stride, dilation, ends = windows(node, x)
    dims = len(kernel)
    values = x if is_real else x.float()
    whole = ends
    if not symmetric(ends) or any(2 * low > k for (low, _), k in zip(ends, kernel, strict=True)):
        whole = _rounded_up(node, x, kernel, stride, dilation, ends)
        values = padded(values, whole, float("-inf"))
        inside, up = [0] * dims, False
    else:
        inside, up = [low for low, _ in ends], bool(node.get("ceil_mode", 0))
    if len(node.outputs) < 2:
        pooled = MAX_POOL[dims](values, kernel, stride, inside, dilation, up)
        return pooled if is_real else pooled.to(x.dtype)
    pooled, places = MAX_POOL[dims](values, kernel, stride, inside, dilation, up, return_indices=True)
    return pooled.to(x.dtype), _whole_places(node, x, values, places, whole if not any(inside) else [(0, 0)] * dims)


def _whole_places(node: Node, x: Tensor, values: Tensor, places: Tensor, ends: list[Any]) -> Tensor:
    """Places within a padded map as places within the whole tensor."""
    coordinates: list[Tensor] = []
    rest = places
    for n in reversed(values.shape[2:]):
        coordinates.insert(0, rest % n)
        rest = rest // n
    inner = torch.zeros_like(places)
    strides = [math.prod(x.shape[3 + i :]) for i in range(x.ndim - 2)]
    if node.get("storage_order", 0):
        strides = [math.prod(x.shape[2 : 2 + i]) for i in range(x.ndim - 2)]
    padding = values.shape != x.shape
    for c, stride, (low, _) in zip(coordinates, strides, ends, strict=True):
        inner = inner + (c - (low if padding else 0)) * stride
    maps = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
    return inner + maps * math.prod(x.shape[2:])


def avg_pool(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    kernel, stride, dilation, ends = windows(node, x)
    dims, up, counted = len(kernel), bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if not any(any(p) for p in ends) and list(kernel) == list(x.shape[2:]):
        return ADAPTIVE_AVG[dims](x, 1)
    fits = symmetric(ends) and all(2 * low <= k for (low, _), k in zip(ends, kernel, strict=True))
    if fits and set(dilation) == {1} and not (up and counted):
        return AVG_POOL[dims](x, kernel, stride, [low for low, _ in ends], up, counted or not any(low for low, _ in ends))
    whole = _rounded_up(node, x, kernel, stride, dilation, ends)
    ones = padded(torch.ones(1, 1, *x.shape[2:]), ends, 1.0 if counted else 0.0)
    extra = [(0, high - own) for (_, high), (_, own) in zip(whole, ends, strict=True)]
    return _sums(padded(x, whole), kernel, stride, dilation) / _sums(padded(ones, extra), kernel, stride, dilation)


def _sums(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """The sum under each window."""
    dims = len(kernel)
    if set(dilation) == {1}:
        return AVG_POOL[dims](x, kernel, stride) * math.prod(kernel)
    channels = x.shape[1]
    return CONV[dims](x, torch.ones(channels, 1, *kernel), None, stride, 0, dilation, channels)


def lp_pool(node: Node, x: Value) -> Tensor:
    x, p = tensor(x), node.get("p", 2)
    kernel, stride, dilation, ends = windows(node, x)
    whole = _rounded_up(node, x, kernel, stride, dilation, ends)
    return _sums(padded(x.abs() ** p, whole), kernel, stride, dilation) ** (1 / p)


def global_lp_pool(node: Node, x: Value) -> Tensor:
    x, p = tensor(x), node.get("p", 2)
    return (x.abs() ** p).sum(tuple(range(2, x.ndim)), keepdim=True) ** (1 / p)


def over_whole_map(pools: Mapping[int, Callable[..., Tensor]]) -> Callable[[Node, Value], Tensor]:
    return lambda node, x: pools[tensor(x).ndim - 2](tensor(x), 1)


def max_unpool(node: Node, x: Value, places: Value, wanted: Value = None) -> Tensor:
    x, index = tensor(x), tensor(places)
    kernel, stride = node.get("kernel_shape"), node.get("strides") or [1] * len(node.get("kernel_shape"))
    pads = node.get("pads") or [0] * (2 * len(kernel))
    ends = list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    size = [(n - 1) * s + k - low - high for n, s, k, (low, high) in zip(x.shape[2:], stride, kernel, ends, strict=True)]
    target = size if wanted is None else numbers(wanted, "output shape")[-len(size) :]
    flat = torch.zeros(x.shape[0] * x.shape[1] * math.prod(size)).scatter(0, index.reshape(-1), x.reshape(-1))
    return padded(flat.reshape(*x.shape[:2], *size), [(0, t - s) for t, s in zip(target, size, strict=True)])


def einsum(node: Node, *values: Value) -> Tensor:
    return torch.einsum(node.get("equation"), *map(tensor, values))


def col2im(node: Node, x: Value, image: Value, block: Value) -> Tensor:
    x, size, kernel = tensor(x), tuple(numbers(image, "image shape")), tuple(numbers(block, "block shape"))
    dims = len(size)
    stride, dilation = node.get("strides") or [1] * dims, node.get("dilations") or [1] * dims
    pads = node.get("pads") or [0] * (2 * dims)
    if dims != 2 or pads[:dims] != pads[dims:]:
        raise ValueError("it joins blocks in other than two dimensions, or with uneven padding")
    return F.fold(x, size, kernel, tuple(dilation), tuple(pads[:dims]), tuple(stride))


def deform_conv(node: Node, x: Value, w: Value, offset: Value, b: Value = None, mask: Value = None) -> Tensor:
    from torchvision.ops import deform_conv2d

    x, w = tensor(x), tensor(w)
    stride, dilation = node.get("strides") or [1, 1], node.get("dilations") or [1, 1]
    pads = node.get("pads") or [0, 0, 0, 0]
    if pads[:2] != pads[2:]:
        raise ValueError("its padding is uneven")
    bias, hidden = (None if v is None else tensor(v) for v in (b, mask))
    return deform_conv2d(x, tensor(offset), w, bias, stride, pads[:2], dilation, hidden)


LAYERS: Registry = {
    "AveragePool": avg_pool,
    "Col2Im": col2im,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DeformConv": deform_conv,
    "Det": lambda node, x: torch.linalg.det(tensor(x)),
    "Einsum": einsum,
    "Gemm": gemm,
    "GlobalAveragePool": over_whole_map(ADAPTIVE_AVG),
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": over_whole_map(ADAPTIVE_MAX),
    "LpPool": lp_pool,
    "MatMul": lambda node, a, b: torch.matmul(tensor(a), tensor(b)),
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
