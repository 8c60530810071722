"""How much each element of an activation matters: the square of its gradient, from one backward pass of the float model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.choose.range_method import Samples
from fewbit.core.device import CPU, on, wide, widest
from fewbit.core.graph import Graph, Op
from fewbit.core.inputs import Batch, Input, count, fed
from fewbit.execute.executor import Executor
from fewbit.task import task_of

VALUES = 1 << 15  # of each site, over all images


@dataclass(frozen=True)
class Importance:
    """Rows weighed by position: a share `even` of the weight is the same everywhere, the rest goes by the squared gradient of
    the answers with logits over `temperature`. Only with a share are there enough rows where all but one token lead nowhere.
    """

    even: float = 0.5
    temperature: float = 1.0


def weighted_samples(
    graph: Graph, sites: Sequence[str], batches: Iterable[Batch], images: int, seed: int = 0
) -> dict[str, Samples]:
    """Values of activation sites, each counted by its importance; `images` are in all batches together.

    Importance is the diagonal of the Fisher information of the model's own answers: with y drawn from softmax(logits) and
    g = ∂ log p(y) / ∂x, E[g²] is the second derivative of the KL divergence from the float model (its first is zero there),
    so an error e costs E[g² e²] / 2 (Yuan et al. 2022, PTQ4ViT, whose weights are such squares). One draw for an image
    is noisy: g² is approximated by a factor for each row times one for each channel of the batch. Outputs that are not
    logits (b, classes) are projected on noise in place of log p, each by its spread. The extremes are those of the values.
    """
    names = {site: graph.site(site).tensor for site in sites}
    values: dict[str, list[Tensor]] = {site: [] for site in sites}
    counts: dict[str, list[Tensor]] = {site: [] for site in sites}
    generator = torch.Generator().manual_seed(seed)
    each = max(1, VALUES // max(images, 1))
    executor = Executor(_open(graph))
    for batch in batches:
        gradients = _backward(executor, list(dict.fromkeys(names.values())), _leaves(graph.inputs, batch), generator)
        for site, name in names.items():
            x, g = gradients[name]
            weight = torch.ones_like(x) if g is None else _rank_one(g.square())
            indices = torch.randint(x.numel(), (each * count(batch),), generator=generator)
            values[site].append(x.flatten()[indices])
            counts[site].append(weight.flatten()[indices])
    samples = {}
    for site in sites:
        x, weight = torch.cat(values[site]), wide(torch.cat(counts[site]))
        weight = weight / weight.mean().clamp_min(1e-300)
        samples[site] = Samples(x[None], weight.float(), x.min()[None], x.max()[None])
    return samples


def _open(graph: Graph) -> Graph:
    """The graph with constants as what comes with each image, so that there is a gradient of what they alone decide."""
    return replace(graph, inputs=tuple(replace(one, each=not one.is_image) for one in graph.inputs))


def _leaves(inputs: Sequence[Input], batch: Batch) -> Batch:
    """A batch with the values of all inputs, as new tensors that have a gradient."""
    pairs = sorted(zip(inputs, fed(inputs, batch), strict=True), key=lambda pair: not pair[0].is_image)
    return tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for _, x in pairs)


def _backward(
    executor: Executor, tensors: Sequence[str], batch: Batch, generator: torch.Generator, temperature: float = 1.0
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The value of each node for a batch, and its gradient; None where the answers do not depend on it."""
    values: dict[str, Tensor] = {}
    taps = {name: partial(values.__setitem__, name) for name in tensors}
    with torch.enable_grad():
        loss = _sampled_log_prob(executor.graph, executor(batch, taps), generator, temperature)
        differ = [name for name in tensors if values[name].requires_grad]  # what integers alone decide has no gradient
        gradients = torch.autograd.grad(loss, [values[name] for name in differ], allow_unused=True)
    found = dict(zip(differ, gradients, strict=True))
    return {name: (values[name].detach(), found.get(name)) for name in tensors}


def _sampled_log_prob(graph: Graph, outputs: Sequence[Tensor], generator: torch.Generator, temperature: float) -> Tensor:
    """log p of an answer drawn from the model's own, summed over a batch; of tensors a projection of each on noise."""
    index = task_of(graph).logits
    if index is None:
        reals = [y for y in outputs if y.is_floating_point()]
        spreads = [y.detach().std().clamp_min(1e-30) if len(reals) > 1 else 1.0 for y in reals]
        noise = (torch.randn(y.shape, generator=generator).to(y.device) for y in reals)
        return cast(Tensor, sum((y * n).sum() / s for y, n, s in zip(reals, noise, spreads, strict=True)))
    output = outputs[index] / temperature
    classes = torch.multinomial(on(output.detach().softmax(1), CPU), 1, generator=generator)
    return output.log_softmax(1).gather(1, on(classes, output.device)).sum()


def _rank_one(squares: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The product of means over channels and over rows that is nearest to squares; channels are last, or second in a map."""
    channel, others = _axes(squares)
    rows, columns = squares.mean(channel, keepdim=True), squares.mean(others, keepdim=True)
    return rows * columns / squares.mean().clamp_min(1e-38)


def output_weights(
    graph: Graph, outputs: Sequence[str], batches: Iterable[Batch], seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """How much an error of each element of some nodes' values matters, by node: a factor for each row of all images, and one
    for each channel. Their product is 1 in the mean.

    The squares of `weighted_samples`, one backward pass.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in outputs}
    columns: dict[str, list[Tensor]] = {name: [] for name in outputs}
    generator = torch.Generator().manual_seed(seed)
    executor = Executor(_open(graph))
    for batch in batches:
        for name, (x, g) in _backward(executor, outputs, _leaves(graph.inputs, batch), generator).items():
            squares = torch.ones_like(x) if g is None else g.square()
            channel, others = _axes(squares)
            rows[name].append(squares.mean(channel, keepdim=True))
            columns[name].append(squares.mean(others, keepdim=True))
    weights = {}
    for name in outputs:
        row, column = torch.cat(rows[name]), torch.stack(columns[name]).mean(0)
        weights[name] = row / row.mean().clamp_min(1e-38), column / column.mean().clamp_min(1e-38)
    return weights


def position_weights(
    graph: Graph, ops: Sequence[Op], batches: Iterable[Batch], importance: Importance, seed: int = 0
) -> dict[str, Float[Tensor, "positions"]]:
    """How much an error at each position of the output of ops matters, by op: tokens, or places of a map; 1 in the mean.

    The mean over channels and images of the squares of `weighted_samples`.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    executor = Executor(_open(graph))
    for batch in batches:
        found = _backward(executor, [op.node for op in ops], _leaves(graph.inputs, batch), generator, importance.temperature)
        for op in ops:
            x, g = found[op.node]
            squares = torch.ones_like(x) if g is None else g.square()
            here = squares.mean(_axes(x)[0]).reshape(count(batch), -1).sum(0, dtype=widest(x.device))
            sums[op.name] = here if op.name not in sums else sums[op.name] + here
    even = importance.even
    return {name: (even + (1 - even) * s / s.mean().clamp_min(1e-38)).float() for name, s in sums.items()}


def _axes(x: Tensor) -> tuple[int, list[int]]:
    """The axis of channels, last or second in a map, and all others."""
    channel = 1 if x.ndim == 4 and x.shape[1] > 1 and x.shape[2] == x.shape[3] else x.ndim - 1
    return channel, [d for d in range(x.ndim) if d != channel]
