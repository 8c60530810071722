"""Attention maps, float beside quantized: maps for the report, and how many key pairs changed order."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.choose.objectives import flipped
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch
from fewbit.core.plan import Plan
from fewbit.execute.executor import Executor


def attention_tables(
    graph: Graph, plan: Plan, images: Batch, drawn: int = 3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for the maps (first image, `drawn` ops spread from first to last) and for the flips of every op and head.

    Only maps of shape (b, heads, queries, keys) are used, not windowed attention.
    """
    nodes = {s.tensor: s.readers[0][0] for s in graph.sites if s.role == "probs" and len(s.shape) == 4 and s.shape[0] == 1}
    if not nodes:
        return [], []
    before, after = dict[str, Tensor](), dict[str, Tensor]()
    with torch.no_grad():
        for executor, maps_of in ((Executor(graph), before), (Executor.of(graph, plan), after)):
            executor(images, {tensor: partial(maps_of.__setitem__, op) for tensor, op in nodes.items()})
    names = list(before)
    flips = {name: flipped(before[name], after[name]).tolist() for name in names}
    indices = sorted({round(k * (len(names) - 1) / max(drawn - 1, 1)) for k in range(drawn)})
    maps = []
    for name in (names[k] for k in indices):
        keys = before[name].shape[-1]
        side = math.isqrt(keys - 1)
        token = side * side == keys - 1
        plain = math.isqrt(keys) if math.isqrt(keys) ** 2 == keys else 0
        maps.append(
            {
                "op": name,
                "image": 0,
                "float": _rounded(before[name][0]),
                "quantized": _rounded(after[name][0]),
                "flipped_share": flips[name],
                "class_token": token,
                "grid": [side, side] if token else [plain, plain],
            }
        )
    rows = [{"op": name, "head": h, "flipped_share": share} for name in names for h, share in enumerate(flips[name])]
    return maps, rows


def _rounded(maps: Tensor) -> list[Any]:
    """Heads x queries x keys with four digits: enough to draw, small on disk. At most 6 heads."""
    return [[[round(v, 4) for v in row] for row in head] for head in maps[:6].tolist()]
