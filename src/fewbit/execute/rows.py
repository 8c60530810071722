"""Rows of what an op with a weight reads, cut from a tensor: tokens of a linear layer, patches of a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fewbit.capture.canonicalize import LINEAR
from fewbit.capture.kinds import shape_for_one
from fewbit.capture.sites import WEIGHTED
from fewbit.core.fx import argument, aten, constant, is_call
from fewbit.core.graph import Graph, Op

WIDE = 2048  # entries of a row above which fewer rows are sampled: 16 MB of one op at most


def padded(op: Node, tensor: str, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, range]]:
    """What an op reads of a tensor, from the tensor's value in each batch, and the indices of the images in the batch.

    A site lies before the zeros that a convolution reads around it.
    """
    padding, node = [], cast(Node, op.args[0])
    while node.name != tensor:
        padding.append(node)
        node = cast(Node, node.args[0])
    first = 0
    for batch in batches:
        value = batch
        for node in reversed(padding):
            value = applied(node, value, len(batch))
        yield value, range(first, first + len(batch))
        first += len(batch)


def row_key(graph: Graph, op: Op, nodes: Mapping[str, Node]) -> tuple[Any, ...] | None:
    """The tensor that an op reads and how its rows are cut from it; None where rows cannot be."""
    node = nodes[op.node]
    if op.kind not in WEIGHTED:
        return None
    source = cast(Node, node.args[0]).name
    if is_call(node, LINEAR) and op.kind == "linear":
        return (source,)
    if op.kind not in ("conv", "depthwise") or not is_call(node, aten.conv2d.default):
        return None
    kernel = tuple(constant(graph.module, cast(Node, node.args[1])).shape[2:])
    geometry = (argument(node, 3, "stride", 1), argument(node, 4, "padding", 0), argument(node, 5, "dilation", 1))
    return (source, kernel, *(_pair(map_arg(v, partial(_number, images=1))) for v in geometry))


def _pair(value: Any) -> tuple[int, int]:
    both = list(value) if isinstance(value, list | tuple) else [value]
    return (both[0], both[-1])


def sampled(value: Tensor, key: tuple[Any, ...], images: range, tokens: int, seed: int) -> Tensor:
    """Rows (images, tokens, c_in) of a batch of the images with these numbers."""
    if len(key) == 1:
        rows = value.reshape(len(images), -1, value.shape[-1])
        return torch.stack([x[places_of(len(x), tokens, i, seed)] for i, x in zip(images, rows, strict=True)])
    _, (kh, kw), (sh, sw), (ph, pw), (dh, dw) = key
    padded = torch.nn.functional.pad(value, (pw, pw, ph, ph)) if ph or pw else value
    windows = padded.unfold(2, (kh - 1) * dh + 1, sh).unfold(3, (kw - 1) * dw + 1, sw)[..., ::dh, ::dw]  # a view
    height, width = windows.shape[2:4]
    patches = []
    for i, image in enumerate(images):
        places = places_of(height * width, tokens, image, seed)
        patches.append(windows[i, :, places // width, places % width].transpose(0, 1).flatten(1))
    return torch.stack(patches)


def kept_rows(value: Tensor, key: tuple[Any, ...], tokens: int) -> int:
    """How many rows of an image are sampled: fewer of a convolution with patches wider than `WIDE`."""
    width = value.shape[1] * math.prod(key[1]) if len(key) > 1 else 1
    return min(tokens, max(1, tokens * WIDE // width))


def places_of(count: int, tokens: int, image: int, seed: int) -> Tensor:
    """Which rows of one image are sampled; they do not depend on the batch that the image is in."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + image)
    return torch.randperm(count, generator=generator)[:tokens].sort().values


def applied(node: Node, value: Any, images: int) -> Any:
    """One node of a path for this number of images: what its shapes are computed from, or a batch in them, is theirs."""
    arguments = cast("tuple[Any, ...]", map_arg(node.args[1:], partial(_number, images=images)))
    sizes = node.args[1] if is_call(node, aten.view.default, aten.reshape.default) else ()
    if isinstance(sizes, list | tuple) and sizes and isinstance(sizes[0], int) and sizes[0] > 0:
        arguments = ([shape_for_one(node)[0] * images, *arguments[0][1:]],)
    return cast(Any, node.target)(value, *arguments, **dict(node.kwargs))


def _number(node: Node, images: int) -> Any:
    """What a node that computes with sizes gives for this number of images of the size that the graph was looked at with."""
    if is_call(node, aten.sym_size.int):
        source, axis = cast("tuple[Node, int]", node.args)
        size = shape_for_one(source)[axis]
        return size * images if axis == 0 else size
    return cast(Any, node.target)(*map_arg(node.args, partial(_number, images=images)), **dict(node.kwargs))
