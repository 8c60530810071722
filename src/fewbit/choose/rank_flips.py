"""The effect of the ranking loss: how often the keys of an attention head change their order, with it and without."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.objectives import flipped
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid, QParams, fake
from fewbit.core.plan import Choice, Json
from fewbit.execute.samples import Attention, OpSample, PairSample


def rank_flips(
    graph: Graph,
    product: Op,
    samples: Mapping[str, OpSample | PairSample],
    choices: Mapping[str, Choice],
    unranked: Mapping[str, QParams],
) -> list[dict[str, Json]]:
    """The share of key pairs of each head that change their order, with the plan's scales and with those without ranking.

    `unranked` are the latter, of the sites where they differ. Both projections and both operands of the product are
    quantized, the modules' inputs are float. Empty where a side of the product is no sampled projection.
    """
    sides: dict[str, tuple[Op, Attention]] = {}
    for name, sample in samples.items():
        attention = sample.attention if isinstance(sample, OpSample) else None
        if attention is not None and attention.product == product.name:
            sides[attention.side] = (graph.op(name), attention)
    if set(sides) != {"query", "key"}:
        return []

    def operand(kind: str, op: Op, attention: Attention) -> Tensor:
        """What a projection gives to the product of attention scores, (1, images, heads, ...)."""
        w = tensor_of(graph, graph.site(op.operands["weight"]))
        bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
        if kind == "float":
            return attention.operand(torch.nn.functional.linear(attention.x, w, bias)[None])

        def quantized(x: Tensor, site: str) -> Tensor:
            choice = choices[site]
            grid: Grid = choice.grid
            return fake(x, unranked.get(site, choice.qparams) if kind == "without" else choice.qparams, grid)

        x, weight = quantized(attention.x, op.operands["input"]), quantized(w, op.operands["weight"])
        out = torch.nn.functional.linear(x, weight, bias)
        return quantized(attention.operand(out[None]), product.operands[attention.side])

    scores = []
    for kind in ("float", "with", "without"):
        both = {side: operand(kind, op, attention) for side, (op, attention) in sides.items()}
        scores.append((both["query"] @ both["key"])[0])
    shares = [flipped(scores[0], score).tolist() for score in scores[1:]]
    return [
        {"op": product.name, "head": head, "with": ranked, "without": plain}
        for head, (ranked, plain) in enumerate(zip(*shares, strict=True))
    ]
