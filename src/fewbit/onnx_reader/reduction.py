"""Operators that join numbers along axes: sums, extremes, softmax, sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.values import Node, Operator, Registry, Value, numbers, tensor


def reduced(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """An operator over axes that are an attribute or a second input; none given are all."""

    def call(node: Node, x: Value, axes: Value = None) -> Tensor:
        x = tensor(x)
        chosen = node.get("axes") if axes is None else numbers(axes, "axes")
        keep, none_is_all = bool(node.get("keepdims", 1)), not node.get("noop_with_empty_axes", 0)
        return function(x, tuple(chosen or range(x.ndim)), keep) if chosen or none_is_all else function(x, (), True)

    return call


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not axes:
        return x
    if x.ndim == 4 and {a % 4 for a in axes} == {2, 3} and x.dtype.is_floating_point:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return pooled if keep else pooled.flatten(1)
    return torch.mean(x, axes, keepdim=keep) if x.dtype.is_floating_point else x.float().mean(axes, keepdim=keep).to(x.dtype)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _extreme(function: Callable[..., Tensor], end: str) -> Callable[..., Tensor]:
    def call(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if not axes:
            return x
        if x.dtype == torch.bool:
            return call(x.to(torch.uint8), axes, keep).bool()
        if any(x.shape[a] == 0 for a in axes):
            info = torch.finfo(x.dtype) if x.dtype.is_floating_point else torch.iinfo(x.dtype)
            value = (float("inf") if end == "max" else float("-inf")) if x.dtype.is_floating_point else getattr(info, end)
            return _sum(x, axes, keep) + value
        return function(x, axes, keep)

    return call


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(torch.abs(x), axes, keep)


def _squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sqrt(_squares(x, axes, keep).float()).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x.float(), axes, keepdim=keep).to(x.dtype) if axes else x


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep).float()).to(x.dtype)


def softmax(function: Callable[..., Tensor]) -> Operator:
    """Along an axis; up to opset 12 over all that is behind it."""

    def call(node: Node, x: Value) -> Tensor:
        x = tensor(x)
        axis = node.get("axis", 1 if node.opset < 13 else -1)
        if node.opset >= 13 or axis % x.ndim == x.ndim - 1:
            return function(x, axis)
        axis %= x.ndim
        if all(isinstance(n, int) and n == 1 for n in x.shape[axis + 1 :]):  # classes of one pixel
            return function(x, axis)
        return function(x.flatten(axis), -1).reshape(x.shape)

    return call


def _hardmax(x: Tensor, axis: int) -> Tensor:
    places = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, places, 1.0)


def best(function: Callable[..., Tensor]) -> Operator:
    def call(node: Node, x: Value) -> Tensor:
        x, axis, keep = tensor(x), node.get("axis", 0), bool(node.get("keepdims", 1))
        if not node.get("select_last_index", 0):
            return function(x, axis, keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)

    return call


def cumulated(function: Callable[..., Tensor], neutral: int) -> Operator:
    def call(node: Node, x: Value, axis: Value) -> Tensor:
        x, along = tensor(x), int(numbers(axis, "axis")[0])
        x = x.flip(along) if node.get("reverse", 0) else x
        y = function(x, along).to(x.dtype)
        if node.get("exclusive", 0):
            first = torch.full_like(x.narrow(along, 0, 1), neutral)
            y = torch.cat([first, y.narrow(along, 0, x.shape[along] - 1)], along)
        return y.flip(along) if node.get("reverse", 0) else y

    return call


def top_k(node: Node, x: Value, k: Value = None) -> tuple[Tensor, Tensor]:
    count = node.get("k") if k is None else numbers(k, "k")[0]
    x, axis = tensor(x), node.get("axis", -1)
    order = torch.sort(x, dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


def lp_normalization(node: Node, x: Value) -> Tensor:
    x, axis, p = tensor(x), node.get("axis", -1), node.get("p", 2)
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def mean_variance(node: Node, x: Value) -> Tensor:
    x, axes = tensor(x), node.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


REDUCTION: Registry = {
    "ArgMax": best(torch.argmax),
    "ArgMin": best(torch.argmin),
    "CumProd": cumulated(torch.cumprod, 1),
    "CumSum": cumulated(torch.cumsum, 0),
    "Hardmax": softmax(_hardmax),
    "LogSoftmax": softmax(torch.log_softmax),
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance,
    "ReduceL1": reduced(_l1),
    "ReduceL2": reduced(_l2),
    "ReduceLogSum": reduced(_log_sum),
    "ReduceLogSumExp": reduced(_log_sum_exp),
    "ReduceMax": reduced(_extreme(torch.amax, "min")),
    "ReduceMean": reduced(_mean),
    "ReduceMin": reduced(_extreme(torch.amin, "max")),
    "ReduceProd": reduced(_product),
    "ReduceSum": reduced(_sum),
    "ReduceSumSquare": reduced(_squares),
    "Softmax": softmax(torch.softmax),
    "TopK": top_k,
}
