"""The float operators of com.microsoft that exporters and onnxruntime's optimizer write."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.attention import heads_apart
from fewbit.onnx_reader.layers import conv, gemm
from fewbit.onnx_reader.norms import normed, rms_norm
from fewbit.onnx_reader.resize import grid_sample
from fewbit.onnx_reader.shape import trilu
from fewbit.onnx_reader.values import Node, Registry, Value, tensor

EPSILON = 1e-12  # of norms that have none: ONNX's own have 1e-5


def activated(name: str, x: Tensor, parameters: list[float]) -> Tensor:
    alpha, beta = (*parameters, None, None)[:2]
    if name == "Clip":
        low, high = alpha if alpha is not None else -math.inf, beta if beta is not None else math.inf
        return F.relu6(x) if (low, high) == (0.0, 6.0) else torch.clamp(x, low, high)
    if name == "LeakyRelu":
        return F.leaky_relu(x, 0.01 if alpha is None else alpha)
    if name == "HardSigmoid":
        return torch.clamp(x * (0.2 if alpha is None else alpha) + (0.5 if beta is None else beta), 0.0, 1.0)
    plain: Registry = {
        "Relu": F.relu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "": lambda y: y,
    }
    if name not in plain:
        raise ValueError(f"its activation {name} is none of Relu, Tanh, Sigmoid, Clip, LeakyRelu, HardSigmoid")
    return plain[name](x)


def fused_conv(node: Node, x: Value, w: Value, b: Value = None, added: Value = None) -> Tensor:
    y = conv(node, x, w, b)
    y = y if added is None else y + tensor(added)
    return activated(node.get("activation", ""), y, node.get("activation_params") or [])


def fused_gemm(node: Node, a: Value, b: Value, c: Value = None) -> Tensor:
    parameters = [node.get(name) for name in ("activation_alpha", "activation_beta") if node.get(name) is not None]
    return activated(node.get("activation", ""), gemm(node, a, b, c), parameters)


def fused_matmul(node: Node, a: Value, b: Value) -> Tensor:
    x, y = tensor(a), tensor(b)
    for side in "AB":
        t = x if side == "A" else y
        if node.get(f"transBatch{side}", 0):
            t = t.permute(*range(1, t.ndim - 1), 0, t.ndim - 1)
        t = t.transpose(-2, -1) if node.get(f"trans{side}", 0) and t.ndim > 1 else t
        x, y = (t, y) if side == "A" else (x, t)
    product, alpha = torch.matmul(x, y), node.get("alpha", 1.0)
    return product if alpha == 1 else product * alpha


def fast_gelu(node: Node, x: Value, bias: Value = None) -> Tensor:
    return F.gelu(tensor(x) if bias is None else tensor(x) + tensor(bias), approximate="tanh")


def quick_gelu(node: Node, x: Value) -> Tensor:
    alpha = node.get("alpha", 1.702)
    return F.silu(tensor(x)) if alpha == 1 else tensor(x) * torch.sigmoid(tensor(x) * alpha)


def skip_layer_norm(node: Node, x: Value, skip: Value, gamma: Value, beta: Value = None, bias: Value = None) -> Any:
    total = tensor(x) + tensor(skip)
    total = total if bias is None else total + tensor(bias)
    shift, eps = None if beta is None else tensor(beta), node.get("epsilon", EPSILON)
    y = normed(replace(node, outputs=node.outputs[:1]), total, tensor(gamma), shift, total.ndim - 1, eps)
    return _with_sum(node, y, total)


def skip_rms_norm(node: Node, x: Value, skip: Value, gamma: Value, bias: Value = None) -> Any:
    total = tensor(x) + tensor(skip)
    total = total if bias is None else total + tensor(bias)
    return _with_sum(node, rms_norm(node, total, gamma, usual=EPSILON), total)


def _with_sum(node: Node, y: Tensor, total: Tensor) -> Any:
    """(y, mean, inverse deviation, sum): the sum is the new residual stream; statistics are of training alone."""
    if any(node.outputs[1:3]):
        raise ValueError("it gives its mean or its deviation away")
    return (y, None, None, total)[: max(len(node.outputs), 1)]


def attention(
    node: Node, x: Value, weights: Value, bias: Value = None, mask: Value = None, past: Value = None,
    added: Value = None, *rest: Value,
) -> Tensor:  # fmt: skip
    """The joint layer of queries, keys and values, and the attention behind it."""
    if past is not None or any(v is not None for v in rest) or len([name for name in node.outputs if name]) > 1:
        raise ValueError("it keeps keys and values for the next token, as language models do")
    if node.get("do_rotary", 0):
        raise ValueError("it rotates queries and keys (do_rotary); write that with RotaryEmbedding, or with Mul and Add")
    joint = F.linear(tensor(x), tensor(weights).t(), None if bias is None else tensor(bias))
    parts = node.get("qkv_hidden_sizes") or [joint.shape[-1] // 3] * 3
    q, k, v = (heads_apart(part, node.get("num_heads")) for part in joint.split(parts, -1))
    return _attended(node, q, k, v, _padding(mask), added)


def multi_head_attention(
    node: Node, query: Value, key: Value = None, value: Value = None, bias: Value = None, mask: Value = None,
    added: Value = None, *rest: Value,
) -> Tensor:  # fmt: skip
    if any(v is not None for v in rest) or len([name for name in node.outputs if name]) > 1:
        raise ValueError("it keeps keys and values for the next token, as language models do")
    heads, q = node.get("num_heads"), tensor(query)
    if key is None or value is None:
        raise ValueError("it reads queries, keys and values from one tensor")
    k, v = tensor(key), tensor(value)
    if bias is not None:
        width = tensor(bias).shape[0] - 2 * q.shape[-1]
        first, second, third = tensor(bias).split([q.shape[-1], q.shape[-1], width])
        q, k, v = q + first, k + second if k.ndim == 3 else k, v + third if v.ndim == 3 else v
    k, v = (t if t.ndim == 4 else heads_apart(t, heads) for t in (k, v))
    return _attended(node, heads_apart(q, heads), k, v, _padding(mask), added)


def _padding(mask: Value) -> Tensor | None:
    """Which keys are there, from a mask (batch, keys) of ones and zeros."""
    if mask is None:
        return None
    there = tensor(mask)
    if there.ndim != 2:
        raise ValueError(f"its mask of {there.ndim} dimensions is not taken; one of (batch, keys) is")
    return there.bool()[:, None, None, :]


def _attended(node: Node, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None, added: Value) -> Tensor:
    bias = None if added is None else tensor(added)
    if there is not None:
        hidden = torch.zeros(there.shape).masked_fill(torch.logical_not(there), node.get("mask_filter_value", -10000.0))
        bias = hidden if bias is None else bias + hidden
    causal, scale = bool(node.get("unidirectional", 0)), node.get("scale") or None
    if causal and bias is not None:
        raise ValueError("it is causal beside a mask")
    out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


MICROSOFT: Registry = {
    "Attention": attention,
    "BiasGelu": lambda node, x, bias: F.gelu(tensor(x) + tensor(bias)),
    "FastGelu": fast_gelu,
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": lambda node, x: F.gelu(tensor(x)),
    "GridSample": grid_sample,
    "MultiHeadAttention": multi_head_attention,
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_rms_norm,
    "Trilu": trilu,
}
