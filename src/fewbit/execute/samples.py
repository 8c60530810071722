"""Replay: what single ops read in the float graph, sampled, so that a method can compute their outputs again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.canonicalize import LINEAR, SOFTMAX
from fewbit.capture.fx import MOVES, SCALINGS, argument, aten, constant, is_call, is_constant, is_scaling
from fewbit.capture.sites import WEIGHTED
from fewbit.core.values import Graph, Op
from fewbit.errors import BadImages
from fewbit.execute.watch import Watcher

ROWS = 2048  # rows of one op that are kept over all images
WIDE = 2048  # entries of a row above which fewer are kept: 16 MB of one op at most
RANKED_IMAGES = 4  # images whose attention scores are kept
QUERIES = 16  # queries of each of their heads


@dataclass(frozen=True)
class Attention:
    """A projection on its way into a product of attention scores, on a few images.

    `x` is the projection's input (images, tokens, c_in), all tokens, and `read` the same in a model that is quantized so far;
    `product` the op of the scores; `other` the float operand on the other side of it; `path` the views and scalings between
    the projection and its operand; `scale` what the product is multiplied by before the softmax; `queries` the rows that are
    looked at.
    """

    side: str
    x: Tensor
    product: str
    other: Tensor
    path: tuple[Node, ...]
    scale: float
    queries: Tensor
    read: Tensor | None = None

    def operand(self, output: Float[Tensor, "candidates images tokens c_out"]) -> Tensor:
        """The product's operand (candidates, images, heads, ...) for the projection's outputs; queries are sampled."""
        count, images = output.shape[:2]
        value = output.flatten(0, 1)
        for node in self.path:
            value = _applied(node, value, count * images)
        value = value.unflatten(0, (count, images))
        return value[..., self.queries, :] if self.side == "query" else value

    def scores(self, output: Float[Tensor, "candidates images tokens c_out"]) -> Float[Tensor, "candidates rows keys"]:
        """Scaled logits A = s Q Kᵀ for the projection's outputs; a row is one query of one head of one image."""
        value = self.operand(output)
        logits = value @ self.other if self.side == "query" else self.other @ value
        return (logits * self.scale).flatten(1, -2)


@dataclass(frozen=True)
class OpSample:
    """What one op has read: rows (images, tokens, c_in), the unfolded patches of a convolution; `attention` where it has one.

    An output of the op is a row times a row of the weight, flattened to (c_out, c_in); with groups each part of the channels
    reads its own part of the row. `read` are the same rows in a model that is quantized so far, where they are known; `seed`
    drew the tokens.
    """

    rows: Tensor
    attention: Attention | None = None
    read: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class PairSample:
    """What a product of two activations has read on a few images: left (images, ..., rows, d), some of its rows, and right
    (images, ..., d, columns); `scale` is what the product is multiplied by before a softmax. The same in a model that is
    quantized so far, where it is known.
    """

    left: Tensor
    right: Tensor
    scale: float
    rows: Tensor
    left_read: Tensor | None = None
    right_read: Tensor | None = None


@dataclass(frozen=True)
class _Score:
    """Where a projection meets the other side: the product, the path to it, and the scale behind it."""

    side: str
    product: Node
    path: tuple[Node, ...]
    scale: float


def op_samples(
    graph: Graph, batches: Iterable[Tensor], ops: Iterable[str], tokens: int = 16, seed: int = 0
) -> Mapping[str, OpSample | PairSample]:
    """Samples of the ops' inputs from one pass of the float graph over batches of (b, c, h, w) images.

    `tokens` rows of each image are kept, drawn with `seed` and the image's number; of inputs with fewer rows, all, and of very
    wide patches fewer. Linear layers, 2-d convolutions and products of two activations are sampled, the last on a few images;
    other ops have no entry. Ops that read the same tensor share it.
    """
    ops = list(ops)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    wanted = {name: key for name in ops if (key := _key(graph, graph.op(name), nodes)) is not None}
    scores = _scores(graph, nodes)
    pairs = [name for name in ops if _is_pair(graph.op(name), nodes)]
    operands = {cast(Node, a).name for name in wanted if name in scores for a in scores[name].product.args[:2]}
    operands |= {cast(Node, a).name for name in pairs for a in nodes[graph.op(name).node].args[:2]}
    inputs = {nodes[graph.op(name).node].args[0].name for name in wanted if name in scores}  # type: ignore[union-attr]
    rows: dict[tuple[Any, ...], list[Tensor]] = {key: [] for key in wanted.values()}
    whole: dict[str, list[Tensor]] = {name: [] for name in operands | inputs}

    def see(name: str, value: Tensor, count: int, first: int) -> None:
        for key, kept in rows.items():
            if key[0] == name:
                kept.append(_sampled(value, key, count, first, _kept(value, key, tokens), seed))
        if name in whole and first < RANKED_IMAGES:
            share = len(value) // count
            whole[name].append(value[: (RANKED_IMAGES - first) * share].clone())

    watched = {key[0] for key in rows} | set(whole)
    _watch(graph, batches, {name: [name] for name in watched}, see)
    joined = {key: torch.cat(kept) for key, kept in rows.items()}
    kept_whole = {name: torch.cat(parts) for name, parts in whole.items()}
    found: dict[str, OpSample | PairSample] = {}
    for name, key in wanted.items():
        sample = OpSample(joined[key], seed=seed)
        if name in scores:
            node = cast(Node, nodes[graph.op(name).node].args[0])
            product = next(op.name for op in graph.ops if op.node == scores[name].product.name)
            attention = _attention(scores[name], product, kept_whole[node.name], kept_whole, seed)
            sample = replace(sample, attention=attention)
        found[name] = sample
    for name in pairs:
        product_node = nodes[graph.op(name).node]
        left, right = (kept_whole[cast(Node, a).name] for a in product_node.args[:2])
        places = _places(left.shape[-2], QUERIES, 0, seed)
        scale = scale_behind(product_node) if "query" in graph.op(name).operands else 1.0
        found[name] = PairSample(left[..., places, :], right, scale, places)
    return found


def read_as(
    graph: Graph, op: Op, sample: OpSample | PairSample, tensor: str, batches: Sequence[Tensor]
) -> OpSample | PairSample:
    """The sample with what the op reads of a tensor in a quantized model: its value in each of the batches sampled from."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    if isinstance(sample, PairSample):
        whole = torch.cat(list(batches))[: len(sample.left)]
        if cast(Node, nodes[op.node].args[0]).name == tensor:
            return replace(sample, left_read=whole[..., sample.rows, :].clone())
        return replace(sample, right_read=whole.clone())
    key = _key(graph, op, nodes)
    assert key is not None
    values = _padded(nodes[op.node], tensor, batches)
    rows = [_sampled(x, key, count, first, sample.rows.shape[1], sample.seed) for x, count, first in values]
    read = replace(sample, read=torch.cat(rows))
    if sample.attention is not None:
        x = torch.cat(list(batches))[: len(sample.attention.x)].clone()
        read = replace(read, attention=replace(sample.attention, read=x))
    return read


def op_rows(
    graph: Graph, op: Op, tensor: str, batches: Iterable[Tensor], places: int, seed: int = 0
) -> Iterator[Tensor] | None:
    """What an op with a weight reads of a tensor, whose value in each batch is given: rows (n, c_in), one batch at a time.

    All tokens of a linear layer, `places` patches of each image of a convolution, the same for any value of the tensor; None
    where rows cannot be cut.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    key = _key(graph, op, nodes)
    if key is None:
        return None
    if len(key) == 1:
        return (batch.reshape(-1, batch.shape[-1]) for batch in batches)
    values = _padded(nodes[op.node], tensor, batches)
    return (_sampled(x, key, count, first, _kept(x, key, places), seed).flatten(0, 1) for x, count, first in values)


def _padded(op: Node, tensor: str, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """What an op reads of a tensor, whose value in each batch is given; the images of the batch, and the number of the first.

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
            value = _applied(node, value, len(batch))
        yield value, len(batch), first
        first += len(batch)


@dataclass(frozen=True)
class ChannelSample:
    """Values of each channel of one activation, drawn (channels, n), and the extremes of all of them (channels,)."""

    values: Tensor
    low: Tensor
    high: Tensor


def channel_samples(
    graph: Graph, batches: Iterable[Tensor], axes: Mapping[str, int], places: int = 16, seed: int = 0
) -> dict[str, ChannelSample]:
    """Samples of activation sites by channel, from one pass of the float graph over batches of (b, c, h, w) images.

    `axes` has the channel axis of each site that is asked for. `places` of each image are kept, drawn with `seed` and the
    image's number, the same for all channels; of fewer, all. Raises BadImages without a batch.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in axes}
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, value: Tensor, count: int, first: int) -> None:
        flat = value.movedim(axes[name], -1)
        flat = flat.reshape(count, -1, flat.shape[-1])
        low, high = flat.amin((0, 1)), flat.amax((0, 1))
        if name in ends:
            low, high = torch.minimum(low, ends[name][0]), torch.maximum(high, ends[name][1])
        ends[name] = (low, high)
        for i in range(count):
            kept[name].append(flat[i, _places(flat.shape[1], places, first + i, seed)].clone())

    nodes: dict[str, list[str]] = {}
    for name in axes:
        nodes.setdefault(graph.site(name).tensor, []).append(name)
    _watch(graph, batches, nodes, see)
    return {name: ChannelSample(torch.cat(kept[name]).t().contiguous(), *ends[name]) for name in axes}


def _watch(
    graph: Graph, batches: Iterable[Tensor], tensors: dict[str, list[str]], see: Callable[[str, Tensor, int, int], None]
) -> None:
    """One pass of the float graph: `see(name, value, images in the batch, number of the first)` for each tensor's names."""
    first = count = 0
    watcher = Watcher(graph, lambda name, value: see(name, value, count, first), tensors)
    with torch.no_grad():
        for batch in batches:
            count = len(batch)
            watcher.run(batch)
            first += count
    if not first:
        raise BadImages("no calibration images; a few dozen are needed: --images DIR.")


def _is_pair(op: Op, nodes: Mapping[str, Node]) -> bool:
    """A product of two activations with the same leading dimensions."""
    if op.kind != "matmul":
        return False
    shapes = [tuple(cast(Node, a).meta["tensor_meta"].shape) for a in nodes[op.node].args[:2]]
    return len(shapes[0]) >= 3 and shapes[0][:-2] == shapes[1][:-2] and shapes[0][0] >= 1


def _key(graph: Graph, op: Op, nodes: Mapping[str, Node]) -> tuple[Any, ...] | None:
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
    return (source, kernel, *(_pair(v) for v in geometry))


def _pair(value: Any) -> tuple[int, int]:
    both = list(value) if isinstance(value, list | tuple) else [value]
    return (both[0], both[-1])


def _sampled(value: Tensor, key: tuple[Any, ...], images: int, first: int, tokens: int, seed: int) -> Tensor:
    """Rows (images, tokens, c_in) of a batch that begins with image `first`."""
    if len(key) == 1:
        x = value.reshape(images, -1, value.shape[-1])
        return torch.stack([x[i, _places(x.shape[1], tokens, first + i, seed)] for i in range(images)])
    _, (kh, kw), (sh, sw), (ph, pw), (dh, dw) = key
    padded = torch.nn.functional.pad(value, (pw, pw, ph, ph))
    windows = padded.unfold(2, (kh - 1) * dh + 1, sh).unfold(3, (kw - 1) * dw + 1, sw)[..., ::dh, ::dw]  # a view
    height, width = windows.shape[2:4]
    picked = []
    for i in range(images):
        places = _places(height * width, tokens, first + i, seed)
        picked.append(windows[i, :, places // width, places % width].transpose(0, 1).flatten(1))
    return torch.stack(picked)


def _kept(value: Tensor, key: tuple[Any, ...], tokens: int) -> int:
    """How many rows of an image are kept: fewer of a convolution with patches wider than `WIDE`."""
    width = value.shape[1] * math.prod(key[1]) if len(key) > 1 else 1
    return min(tokens, max(1, tokens * WIDE // width))


def _places(count: int, tokens: int, image: int, seed: int) -> Tensor:
    """Which rows of one image are kept: the same whatever batch the image is in."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + image)
    return torch.randperm(count, generator=generator)[:tokens].sort().values


def _scores(graph: Graph, nodes: Mapping[str, Node]) -> dict[str, _Score]:
    """The linear ops whose output reaches a query or key operand through views and scalings alone, by name.

    A layer that reaches both sides (queries and keys in one matrix) is left out: neither side is float.
    """
    linears = {op.node: op.name for op in graph.ops if op.kind == "linear"}
    found: dict[str, _Score] = {}
    twice = set()
    for op in graph.ops:
        if "query" not in op.operands:
            continue
        product = nodes[op.node]
        scale = scale_behind(product)
        for side, operand in zip(("query", "key"), product.args[:2], strict=True):
            path, node = [], cast(Node, operand)
            while is_call(node, *MOVES) or is_scaling(node):
                path.append(node)
                node = cast(Node, node.args[0])
            if node.name not in linears or not _shapes_are_known(path):
                continue
            name = linears[node.name]
            if name in found:
                twice.add(name)
            found[name] = _Score(side, product, tuple(reversed(path)), scale)
    return {name: score for name, score in found.items() if name not in twice and _is_tokens(nodes[graph.op(name).node])}


def _is_tokens(linear: Node) -> bool:
    """The input has one row of tokens for each image."""
    shape = tuple(getattr(cast(Node, linear.args[0]).meta.get("tensor_meta"), "shape", ()))
    return len(shape) == 3 and shape[0] == 1 and not is_constant(linear.args[0])


def scale_behind(product: Node) -> float:
    """The numbers that the product is multiplied by on its way to the softmax."""
    scale, node = 1.0, product
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_scaling(node):
            scale = scale * cast(float, node.args[1]) if is_call(node, *SCALINGS[:2]) else scale / cast(float, node.args[1])
        elif is_call(node, *SOFTMAX):
            break
    return float(scale)


def _shapes_are_known(path: list[Node]) -> bool:
    """No shape on the path depends on anything but the number of images."""
    return all(is_call(n, aten.sym_size.int) and n.args[1] == 0 for node in path for n in node.all_input_nodes[1:])


def _applied(node: Node, value: Any, images: int) -> Any:
    """One node of a path, with the number of images in place of what its shapes are computed from."""
    arguments = torch.fx.node.map_arg(node.args[1:], lambda _: images)
    return cast(Any, node.target)(value, *arguments, **dict(node.kwargs))


def _attention(score: _Score, product: str, x: Tensor, whole: Mapping[str, Tensor], seed: int) -> Attention:
    left, right = (whole[cast(Node, a).name] for a in score.product.args[:2])
    queries = _places(left.shape[-2], QUERIES, 0, seed)
    other = right if score.side == "query" else left[..., queries, :]
    return Attention(score.side, x, product, other, score.path, score.scale, queries)
