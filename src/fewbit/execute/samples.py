"""Samples of the inputs of single ops in the float graph, from which a method can recompute their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.structure import Projection, projections, scale_behind
from fewbit.core.graph import Graph, Op
from fewbit.core.inputs import Batch
from fewbit.core.shelf import Rebatched
from fewbit.execute.rows import applied, kept_rows, padded, places_of, row_key, sampled
from fewbit.execute.watch import watch

ROWS = 2048  # most rows of one op over all images
RANKED_IMAGES = 4  # images whose attention scores are sampled
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
            value = applied(node, value, count * images)
        value = value.unflatten(0, (count, images))
        return value[..., self.queries, :] if self.side == "query" else value

    def scores(self, output: Float[Tensor, "candidates images tokens c_out"]) -> Float[Tensor, "candidates rows keys"]:
        """Scaled logits A = s Q Kᵀ for the projection's outputs; a row is one query of one head of one image."""
        value = self.operand(output)
        logits = value @ self.other if self.side == "query" else self.other @ value
        return (logits * self.scale).flatten(1, -2)


@dataclass(frozen=True)
class OpSample:
    """The sampled input of one op: rows (images, tokens, c_in), or unfolded patches of a convolution; `attention` if any.

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
    """The inputs of a product of two activations on a few images: left (images, ..., rows, d), some of its rows, and right
    (images, ..., d, columns); `scale` is what the product is multiplied by before a softmax. The same in a model that is
    quantized so far, where it is known.
    """

    left: Tensor
    right: Tensor
    scale: float
    rows: Tensor
    left_read: Tensor | None = None
    right_read: Tensor | None = None


def op_samples(
    graph: Graph, batches: Iterable[Batch], ops: Iterable[str], tokens: int = 16, seed: int = 0,
    ranked: int = RANKED_IMAGES,
) -> Mapping[str, OpSample | PairSample]:  # fmt: skip
    """Samples of the ops' inputs from one pass of the float graph over batches of images.

    `tokens` rows of each image are drawn with `seed` and the image's number; of inputs with fewer rows, all, and of very wide
    patches fewer. Linear layers, 2-d convolutions and products of two activations are sampled, the last on `ranked` images;
    other ops have no entry. Ops that read the same tensor share it.
    """
    ops = list(ops)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    row_keys = {name: key for name in ops if (key := row_key(graph, graph.op(name), nodes)) is not None}
    scores = projections(graph)
    pairs = [name for name in ops if _is_pair(graph.op(name), nodes)]
    operands = {cast(Node, a).name for name in row_keys if name in scores for a in scores[name].product.args[:2]}
    operands |= {cast(Node, a).name for name in pairs for a in nodes[graph.op(name).node].args[:2]}
    inputs = {nodes[graph.op(name).node].args[0].name for name in row_keys if name in scores}  # type: ignore[union-attr]
    rows: dict[tuple[Any, ...], list[Tensor]] = {key: [] for key in row_keys.values()}
    whole: dict[str, list[Tensor]] = {name: [] for name in operands | inputs}

    def record(name: str, value: Tensor, images: range) -> None:
        for key, parts in rows.items():
            if key[0] == name:
                parts.append(sampled(value, key, images, kept_rows(value, key, tokens), seed))
        if name in whole and images.start < ranked:
            share = len(value) // len(images)
            whole[name].append(value[: (ranked - images.start) * share].clone())

    watch(graph, batches, {name: partial(record, name) for name in {*whole, *(key[0] for key in rows)}})
    joined = {key: torch.cat(parts) for key, parts in rows.items()}
    tensors = {name: torch.cat(parts) for name, parts in whole.items()}
    samples: dict[str, OpSample | PairSample] = {}
    for name, key in row_keys.items():
        sample = OpSample(joined[key], seed=seed)
        if name in scores:
            node = cast(Node, nodes[graph.op(name).node].args[0])
            product = next(op.name for op in graph.ops if op.node == scores[name].product.name)
            attention = _attention(scores[name], product, tensors[node.name], tensors, seed)
            sample = replace(sample, attention=attention)
        samples[name] = sample
    for name in pairs:
        product_node = nodes[graph.op(name).node]
        left, right = (tensors[cast(Node, a).name] for a in product_node.args[:2])
        places = places_of(left.shape[-2], QUERIES, 0, seed)
        scale = scale_behind(product_node) if "query" in graph.op(name).operands else 1.0
        samples[name] = PairSample(left[..., places, :], right, scale, places)
    return samples


def read_as(
    graph: Graph, op: Op, sample: OpSample | PairSample, tensor: str, batches: Sequence[Tensor]
) -> OpSample | PairSample:
    """The sample with what the op reads of a tensor in a quantized model: its value in each of the batches sampled from."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    if isinstance(sample, PairSample):
        whole = Rebatched(batches, len(sample.left))[0]
        if cast(Node, nodes[op.node].args[0]).name == tensor:
            return replace(sample, left_read=whole[..., sample.rows, :].clone())
        return replace(sample, right_read=whole.clone())
    key = row_key(graph, op, nodes)
    assert key is not None
    values = padded(nodes[op.node], tensor, batches)
    rows = [sampled(x, key, images, sample.rows.shape[1], sample.seed) for x, images in values]
    read = replace(sample, read=torch.cat(rows))
    if sample.attention is not None:
        x = Rebatched(batches, len(sample.attention.x))[0].clone()
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
    key = row_key(graph, op, nodes)
    if key is None:
        return None
    if len(key) == 1:
        return (batch.reshape(-1, batch.shape[-1]) for batch in batches)
    values = padded(nodes[op.node], tensor, batches)
    return (sampled(x, key, images, kept_rows(x, key, places), seed).flatten(0, 1) for x, images in values)


@dataclass(frozen=True)
class ChannelSample:
    """Values of each channel of one activation, drawn (channels, n), and the extremes of all of them (channels,)."""

    values: Tensor
    low: Tensor
    high: Tensor


def channel_samples(
    graph: Graph, batches: Iterable[Batch], axes: Mapping[str, int], places: int = 16, seed: int = 0
) -> dict[str, ChannelSample]:
    """Samples of activation sites by channel, from one pass of the float graph over batches of images.

    `axes` has the channel axis of each requested site. `places` of each image are sampled, drawn with `seed` and the
    image's number, the same for all channels; of fewer, all. Raises BadImages without a batch.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in axes}
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, value: Tensor, images: range) -> None:
        flat = value.movedim(axes[name], -1)
        flat = flat.reshape(len(images), -1, flat.shape[-1])
        low, high = flat.amin((0, 1)), flat.amax((0, 1))
        if name in ends:
            low, high = torch.minimum(low, ends[name][0]), torch.maximum(high, ends[name][1])
        ends[name] = (low, high)
        samples[name] += [x[places_of(len(x), places, i, seed)].clone() for i, x in zip(images, flat, strict=True)]

    watch(graph, batches, {graph.site(name).tensor: partial(record, name) for name in axes})
    return {name: ChannelSample(torch.cat(samples[name]).t().contiguous(), *ends[name]) for name in axes}


def _is_pair(op: Op, nodes: Mapping[str, Node]) -> bool:
    """A product of two activations with the same leading dimensions."""
    if op.kind != "matmul":
        return False
    shapes = [tuple(cast(Node, a).meta["tensor_meta"].shape) for a in nodes[op.node].args[:2]]
    return len(shapes[0]) >= 3 and shapes[0][:-2] == shapes[1][:-2] and shapes[0][0] >= 1


def _attention(score: Projection, product: str, x: Tensor, whole: Mapping[str, Tensor], seed: int) -> Attention:
    left, right = (whole[cast(Node, a).name] for a in score.product.args[:2])
    queries = places_of(left.shape[-2], QUERIES, 0, seed)
    other = right if score.side == "query" else left[..., queries, :]
    return Attention(score.side, x, product, other, score.path, score.scale, queries)
