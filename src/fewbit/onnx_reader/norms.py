"""Operators that normalize what they read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.arithmetic import swish
from fewbit.onnx_reader.values import Node, Registry, Value, tensor


def batch_norm(node: Node, x: Value, scale: Value, bias: Value, mean: Value, var: Value) -> Tensor:
    if node.get("training_mode", 0):
        raise ValueError("it is in training mode; export the model for inference")
    statistics = tensor(mean), tensor(var)
    return F.batch_norm(tensor(x), *statistics, tensor(scale), tensor(bias), False, 0.0, node.get("epsilon", 1e-5))


def instance_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    return F.instance_norm(tensor(x), None, None, tensor(scale), tensor(bias), eps=node.get("epsilon", 1e-5))


def layer_norm(node: Node, x: Value, scale: Value, bias: Value = None) -> Any:
    x, axis, eps = tensor(x), node.get("axis", -1), node.get("epsilon", 1e-5)
    return normed(node, x, tensor(scale), None if bias is None else tensor(bias), axis % x.ndim, eps)


def normed(node: Node, x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Any:
    shape, is_plain = list(x.shape[axis:]), True
    if scale is not None:
        is_plain = list(scale.shape) == shape and (bias is None or list(bias.shape) == shape)
    if is_plain:
        y = F.layer_norm(x, shape, scale, bias, eps)
    else:
        y = F.layer_norm(x, shape, None, None, eps)
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
    if len([name for name in node.outputs if name]) < 2:
        return y
    axes = tuple(range(axis, x.ndim))
    mean = x.mean(axes, keepdim=True)
    return y, mean, torch.rsqrt(((x - mean) ** 2).mean(axes, keepdim=True) + eps)


def rms_norm(node: Node, x: Value, scale: Value, *, usual: float = 1e-5) -> Tensor:
    """x over the root of its mean square, times a scale; `usual` is the epsilon of a node that has none."""
    x = tensor(x)
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + node.get("epsilon", usual)) * tensor(scale)


def group_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    x, gamma, beta, groups = tensor(x), tensor(scale), tensor(bias), node.get("num_groups")
    if gamma.shape[0] != x.shape[1]:  # up to opset 20 there was one number for each group
        gamma, beta = (v.repeat_interleave(x.shape[1] // groups) for v in (gamma, beta))
    return F.group_norm(x, groups, gamma, beta, node.get("epsilon", 1e-5))


def local_response(node: Node, x: Value) -> Tensor:
    x, size = tensor(x), node.get("size")
    squares = F.pad((x * x).unsqueeze(1), [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2])
    total = torch.stack([squares.narrow(2, i, x.shape[1]) for i in range(size)]).sum(0)
    scale = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total.squeeze(1)
    return x / scale ** node.get("beta", 0.75)


NORMS: Registry = {
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_response,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "SwiGLU": lambda node, gate, x: swish(node, gate) * tensor(x),
}
