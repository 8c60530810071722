"""The Attention of ONNX (opset 23 on), and the rotation of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.values import Node, Registry, Value, tensor


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, channels) -> (batch, heads, tokens, width)."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def attention(
    node: Node, q: Value, k: Value, v: Value, mask: Value = None, past_k: Value = None, past_v: Value = None,
    lengths: Value = None,
) -> Any:  # fmt: skip
    query, key, value = tensor(q), tensor(k), tensor(v)
    if flat := query.ndim == 3:
        heads, few = node.get("q_num_heads"), node.get("kv_num_heads")
        query, key, value = heads_apart(query, heads), heads_apart(key, few), heads_apart(value, few)
    offset: Any = 0
    if past_k is not None:
        offset = tensor(past_k).shape[2]
        key, value = torch.cat([tensor(past_k), key], 2), torch.cat([tensor(past_v), value], 2)
    elif lengths is not None:
        offset = (tensor(lengths).long() - query.shape[2]).reshape(-1, 1, 1, 1)
    keys, values = key, value
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        keys, values = (x.repeat_interleave(repeats, 1) for x in (key, value))
    bias = _bias(node, query, keys, mask, offset, lengths)
    scale = node.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    cap, mode = node.get("softcap", 0.0), node.get("qk_matmul_output_mode", 0)  # the latter of the fourth output
    if len(node.outputs) < 4 and not cap and (bias is None or lengths is None):
        out, scores = F.scaled_dot_product_attention(query, keys, values, bias, scale=scale), query
    else:
        out, scores = _opened(query, keys, values, bias, scale, cap, mode)
    out = out.transpose(1, 2).flatten(2) if flat else out
    return (out, key, value, scores)[: len(node.outputs)]


def _opened(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, cap: float, mode: int
) -> tuple[Tensor, Tensor]:
    """The same in single steps, for whoever reads the scores or caps them."""
    raw = scores = torch.matmul(query * scale, keys.transpose(-2, -1))
    capped = scores = torch.tanh(scores / cap) * cap if cap else scores
    scores = scores if bias is None else scores + bias
    probs = torch.softmax(scores, -1)
    if bias is not None:
        probs = torch.where(torch.isneginf(bias.amax(-1, keepdim=True)), torch.zeros_like(probs), probs)
    return torch.matmul(probs, values), (raw, capped, scores, probs)[mode]


def _bias(node: Node, query: Tensor, keys: Tensor, mask: Value, offset: Any, lengths: Value) -> Tensor | None:
    """What is added to the scores: the mask, minus infinity for later keys, for keys outside a window, for padding."""
    rows, columns = query.shape[2], keys.shape[2]
    bias = None if mask is None else tensor(mask)
    if bias is not None:
        short = columns - bias.shape[-1]
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape).masked_fill(torch.logical_not(bias), -math.inf)
        bias = F.pad(bias, (0, short), value=-math.inf) if short > 0 else bias
    place, hidden = torch.arange(rows)[:, None] + offset, None
    key = torch.arange(columns)
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    for wanted, test in (
        (node.get("is_causal", 0), lambda: key > place),
        (left >= 0, lambda: place - key > left),
        (right >= 0, lambda: key - place > right),
        (lengths is not None, lambda: key >= tensor(lengths).reshape(-1, 1, 1, 1)),
    ):
        if wanted:
            hidden = test() if hidden is None else torch.logical_or(hidden, test())
    if hidden is None:
        return bias
    added = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
    return added if bias is None else bias + added


def rotary(node: Node, x: Value, cos: Value, sin: Value, positions: Value = None) -> Tensor:
    x, c, s = tensor(x), tensor(cos), tensor(sin)
    flat = x.ndim == 3
    x = heads_apart(x, node.get("num_heads", 0)) if flat else x
    if positions is not None:
        c, s = c[tensor(positions).long()], s[tensor(positions).long()]
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    turned = 2 * c.shape[-1]
    part, rest = x[..., :turned], x[..., turned:]
    if node.get("interleaved", 0):
        a, b = part[..., 0::2], part[..., 1::2]
        part = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        part = torch.cat([a * c - b * s, a * s + b * c], -1)
    x = torch.cat([part, rest], -1) if rest.shape[-1] else part
    return x.transpose(1, 2).flatten(2) if flat else x


ATTENTION: Registry = {"Attention": attention, "RotaryEmbedding": rotary}
