"""Operators that take or write numbers at given places: gather, scatter, one-hot."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewbit.onnx_reader.shape import cut
from fewbit.onnx_reader.values import Known, Node, Registry, Value, known, number, tensor


def gather(node: Node, x: Value, index: Value) -> Any:
    x, axis = tensor(x), node.get("axis", 0)
    if isinstance(index, Known) and index.array.dtype != object:
        n, rows = x.shape[axis], index.array.reshape(-1).tolist()
        if index.ndim == 0:
            return x.select(axis, rows[0])
        if index.ndim == 1 and rows and rows == list(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
            return cut(x, axis, rows[0], rows[-1] + 1, 1)
        if not isinstance(n, int) and any(r < 0 for r in rows):
            raise ValueError("it counts backwards along a size that is not fixed")
        picked = x.index_select(axis, tensor(known(index.array.reshape(-1) % n)) if isinstance(n, int) else tensor(index))
    else:
        places = tensor(index)
        index, n = places, x.shape[axis]
        picked = x.index_select(axis, torch.where(places < 0, places + n, places).reshape(-1).long())
    axis %= x.ndim
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]) if index.ndim != 1 else picked


def gather_elements(node: Node, x: Value, index: Value) -> Tensor:
    x, places, axis = tensor(x), tensor(index).long(), node.get("axis", 0)
    return torch.gather(x, axis, torch.where(places < 0, places + x.shape[axis], places))


def _nd_index(x: Tensor, index: Tensor, dims: int) -> tuple[Any, ...]:
    parts = index.long().unbind(-1)
    return (*[slice(None)] * dims, *parts)


def gather_nd(node: Node, x: Value, index: Value) -> Tensor:
    x, places, dims = tensor(x), tensor(index), node.get("batch_dims", 0)
    if not dims:
        return x[_nd_index(x, places, 0)]
    lead = x.shape[:dims]
    flat, flat_places = x.flatten(0, dims - 1), places.flatten(0, dims - 1)
    rows = torch.arange(flat.shape[0]).reshape(-1, *[1] * (flat_places.ndim - 2))
    picked = flat[(rows, *flat_places.long().unbind(-1))]
    return picked.reshape(*lead, *picked.shape[1:])


REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(node: Node, x: Value, index: Value, updates: Value) -> Tensor:
    x, places, new, axis = tensor(x), tensor(index).long(), tensor(updates), node.get("axis", 0)
    places = torch.where(places < 0, places + x.shape[axis], places)
    how = node.get("reduction", "none")
    if how == "none":
        return x.scatter(axis, places, new.to(x.dtype))
    return x.scatter_reduce(axis, places, new.to(x.dtype), REDUCE[how], include_self=True)


def scatter_nd(node: Node, x: Value, index: Value, updates: Value) -> Tensor:
    x, places, new, how = tensor(x), tensor(index).long(), tensor(updates), node.get("reduction", "none")
    depth = places.shape[-1]
    where = tuple(torch.where(p < 0, p + x.shape[i], p) for i, p in enumerate(places.unbind(-1)))
    if how in ("none", "add"):
        return x.index_put(where, new.to(x.dtype), accumulate=how == "add")
    flat_index = torch.zeros_like(where[0])
    for i, place in enumerate(where):
        flat_index = flat_index * x.shape[i] + place
    rows = x.reshape(math.prod(x.shape[:depth]), -1)
    flat = flat_index.reshape(-1, 1).expand(-1, rows.shape[1])
    done = rows.scatter_reduce(0, flat, new.to(x.dtype).reshape(flat.shape), REDUCE[how], include_self=True)
    return done.reshape(x.shape)


def one_hot(node: Node, index: Value, depth: Value, values: Value) -> Tensor:
    n, ends, axis = int(number(depth)), tensor(values), node.get("axis", -1)
    places = tensor(index).long()
    places = torch.where(places < 0, places + n, places).unsqueeze(axis)
    axis = axis % places.ndim
    classes = torch.arange(n).reshape([-1 if i == axis else 1 for i in range(places.ndim)])
    return torch.where(places == classes, ends[1], ends[0])


def reverse_sequence(node: Node, x: Value, lengths: Value) -> Tensor:
    x, along, batch = tensor(x), node.get("time_axis", 0), node.get("batch_axis", 1)
    steps = torch.arange(x.shape[along])
    lengths_of = tensor(lengths).long()[:, None]
    places = torch.where(steps < lengths_of, lengths_of - 1 - steps, steps)  # (batch, time)
    places = places if (batch, along) == (0, 1) else places.t()
    return torch.gather(x, along, places.reshape(*places.shape, *[1] * (x.ndim - 2)).expand(x.shape))


INDEXING: Registry = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
}
