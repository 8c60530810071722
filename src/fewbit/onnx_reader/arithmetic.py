"""Operators that work number by number: arithmetic, comparison, logic, activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.values import Known, Node, Operator, Registry, Value, number, scalar, tensor, torch_of

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little with them


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda node, x: function(tensor(x))


def binary(function: Callable[[Any, Any], Any]) -> Operator:
    """An operator of two tensors; a single known number stays a number, as the author of a module would have typed it."""

    def call(node: Node, a: Value, b: Value) -> Any:
        left, right = scalar(a, b), scalar(b, a)
        return function(tensor(a) if left is None else left, tensor(b) if right is None else right)

    return call


def many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, *values: functools.reduce(function, map(tensor, values))


def clip(node: Node, x: Value, low: Value = None, high: Value = None) -> Tensor:
    least, most = number(low, node.get("min")), number(high, node.get("max"))
    if (low is not None and least is None) or (high is not None and most is None):
        ends = [None if v is None else tensor(v) for v in (low, high)]
        return torch.clamp(tensor(x), *ends)
    x = tensor(x)
    convert = float if x.dtype.is_floating_point else int
    if x.dtype.is_floating_point:  # the ends of the type are no ends
        least = None if least is None or least <= torch.finfo(torch.float32).min else least
        most = None if most is None or most >= torch.finfo(torch.float32).max else most
    least, most = (None if v is None else convert(v) for v in (least, most))
    if least is None and most is None:
        return x
    if (least, most) == (0.0, None):
        return F.relu(x)
    return F.relu6(x) if (least, most) == (0.0, 6.0) else torch.clamp(x, least, most)


def division(a: Any, b: Any) -> Any:
    whole = all(not (v.dtype.is_floating_point if isinstance(v, Tensor) else isinstance(v, float)) for v in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def power(node: Node, x: Value, exponent: Value) -> Tensor:
    one, x = number(exponent), tensor(x)
    if one is not None and isinstance(exponent, Known) and exponent.ndim <= x.ndim:
        value = float(one)
        if not x.dtype.is_floating_point:
            return torch.pow(x.float(), value).round().to(x.dtype)
        return torch.pow(x, int(value) if value.is_integer() else value)
    return torch.pow(x, tensor(exponent)).to(x.dtype)


def modulo(node: Node, a: Value, b: Value) -> Tensor:
    x, y, truncated = tensor(a), tensor(b), node.get("fmod", 0)
    if x.dtype in UNSIGNED:
        return torch.remainder(x.to(torch.int64), y.to(torch.int64)).to(x.dtype)
    return torch.fmod(x, y) if truncated else torch.remainder(x, y)


def shift(node: Node, a: Value, b: Value) -> Tensor:
    x, y = tensor(a), tensor(b)
    wide, by = x.to(torch.int64), y.to(torch.int64)
    return (wide << by if node.get("direction") == "LEFT" else wide >> by).to(x.dtype)


def gelu(node: Node, x: Value) -> Tensor:
    return F.gelu(tensor(x), approximate="tanh" if node.get("approximate", "none") == "tanh" else "none")


def hard_sigmoid(node: Node, x: Value) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return F.hardsigmoid(tensor(x))
    return torch.clamp(tensor(x) * alpha + beta, 0.0, 1.0)


def prelu(node: Node, x: Value, slope: Value) -> Tensor:
    x = tensor(x)
    weight = tensor(slope)
    place = weight.ndim - x.ndim + 1  # of the channels among the slopes, whose last dimension stands at that of x
    by_channel = x.ndim > 1 and place >= 0 and weight.shape[place] == weight.numel() == x.shape[1]
    if x.dtype.is_floating_point and x.ndim > 1 and (weight.numel() == 1 or by_channel):
        return F.prelu(x, weight.reshape(-1))
    return torch.where(x < 0, x * weight, x)


def cast(node: Node, x: Value) -> Tensor:
    number_of_type = node.get("to")
    dtype = torch_of(number_of_type)
    if dtype is None:
        raise ValueError(f"it casts to type {number_of_type} of ONNX, which torch has not")
    x = tensor(x)
    return x if x.dtype == dtype else x.to(dtype)


def where(node: Node, condition: Value, a: Value, b: Value) -> Tensor:
    chosen = tensor(condition)
    x, y = tensor(a), tensor(b)
    return torch.where(chosen, x, y)


def is_infinite(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    up, down = node.get("detect_positive", 1), node.get("detect_negative", 1)
    if up and down:
        return torch.isinf(x)
    if not up and not down:
        return torch.zeros_like(x, dtype=torch.bool)
    return x == (math.inf if up else -math.inf)


def shrink(node: Node, x: Value) -> Tensor:
    x, bias, limit = tensor(x), node.get("bias", 0.0), node.get("lambd", 0.5)
    shrunk = torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))
    return shrunk.to(x.dtype)


def mean_of(node: Node, *values: Value) -> Tensor:
    return functools.reduce(torch.add, map(tensor, values)) / len(values)


def swish(node: Node, x: Value) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(tensor(x)) if alpha == 1.0 else tensor(x) * torch.sigmoid(tensor(x) * alpha)


def dropout(node: Node, x: Value, ratio: Value = None, training: Value = None) -> Any:
    if training is not None and not (isinstance(training, Known) and not training.array.any()):
        raise ValueError("it is in training mode; export the model for inference")
    x = tensor(x)
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(node.outputs) > 1 else x


def celu(node: Node, x: Value) -> Tensor:
    return F.celu(tensor(x), node.get("alpha", 1.0))


def bits(node: Node, x: Value) -> Tensor:
    dtype = torch_of(node.get("to"))
    if dtype is None:
        raise ValueError(f"it casts to type {node.get('to')} of ONNX, which torch has not")
    return tensor(x).view(dtype)


ARITHMETIC: Registry = {
    "Abs": unary(torch.abs),
    "Acos": unary(torch.acos),
    "Acosh": unary(torch.acosh),
    "Add": binary(lambda a, b: a + b),
    "And": binary(torch.logical_and),
    "Asin": unary(torch.asin),
    "Asinh": unary(torch.asinh),
    "Atan": unary(torch.atan),
    "Atanh": unary(torch.atanh),
    "BitCast": bits,
    "BitShift": shift,
    "BitwiseAnd": many(torch.bitwise_and),
    "BitwiseNot": lambda node, x: torch.bitwise_not(tensor(x).to(torch.int64)).to(tensor(x).dtype),
    "BitwiseOr": many(torch.bitwise_or),
    "BitwiseXor": many(torch.bitwise_xor),
    "Cast": cast,
    "CastLike": lambda node, x, like: tensor(x).to(tensor(like).dtype),
    "Ceil": unary(torch.ceil),
    "Celu": celu,
    "Clip": clip,
    "Cos": unary(torch.cos),
    "Cosh": unary(torch.cosh),
    "Div": binary(division),
    "Dropout": dropout,
    "Elu": lambda node, x: F.elu(tensor(x), node.get("alpha", 1.0)),
    "Equal": binary(lambda a, b: a == b),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": gelu,
    "Greater": binary(lambda a, b: a > b),
    "GreaterOrEqual": binary(lambda a, b: a >= b),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Identity": lambda node, x: x,
    "IsInf": is_infinite,
    "IsNaN": unary(torch.isnan),
    "LeakyRelu": lambda node, x: F.leaky_relu(tensor(x), node.get("alpha", 0.01)),
    "Less": binary(lambda a, b: a < b),
    "LessOrEqual": binary(lambda a, b: a <= b),
    "Log": unary(torch.log),
    "Max": many(torch.maximum),
    "Mean": mean_of,
    "Min": many(torch.minimum),
    "Mish": unary(F.mish),
    "Mod": modulo,
    "Mul": binary(lambda a, b: a * b),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": binary(torch.logical_or),
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": unary(torch.reciprocal),
    "Relu": unary(F.relu),
    "Round": unary(torch.round),
    "Selu": lambda node, x: _selu(node, tensor(x)),
    "Shrink": shrink,
    "Sigmoid": unary(torch.sigmoid),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Sinh": unary(torch.sinh),
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(lambda a, b: a - b),
    "Sum": many(torch.add),
    "Swish": swish,
    "Tan": unary(torch.tan),
    "Tanh": unary(torch.tanh),
    "ThresholdedRelu": lambda node, x: F.threshold(tensor(x), node.get("alpha", 1.0), 0.0),
    "Where": where,
    "Xor": binary(torch.logical_xor),
}


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))
