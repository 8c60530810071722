"""Oracles: the function itself on images, the largest number of each row, rows whose best fixed step is found by trying all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fewbit.capture.structure import heads, modules
from fewbit.core.grid import Grid, QParams, fake
from fewbit.equalize import Equalize, replaced
from fewbit.equalize.attention_rows import flat_rows
from fewbit.equalize.replaced import same_function
from fewbit.execute.executor import Executor
from fewbit.target import load_target
from fewbit.target.allowed import allowed

OFF = partial(Equalize, channels=False, norms=False, values=False, keys=False, convolutions=False)


def grids(net, bits: int) -> dict[str, Grid]:
    return allowed(net.graph, load_target("ort-x86-vnni"), weight_bits=bits, activation_bits=bits, everything=True).grids


def divided(net, bits: int = 4):
    return OFF()(net.graph, net.images.split(8), grids(net, bits))


def values_of(graph, images, names):
    seen = {}
    Executor(graph)(images, {name: partial(seen.__setitem__, name) for name in names})
    return [seen[name] for name in names]


def probs_of(graph):
    (site,) = [site for site in graph.sites if site.role == "probs"]
    return site


def test_the_function_is_the_same_and_the_largest_of_each_row_is_one(vit):
    found = divided(vit)
    assert [(row["kind"], row["moved"]) for row in found.record] == [("probabilities", True)]
    assert same_function(vit.graph, found.graph, seed=3) < 1e-6
    assert same_function(found.graph, replaced(vit.graph, found.constants)) == 0
    (before,), (after,) = (values_of(graph, vit.images, [probs_of(graph).tensor]) for graph in (vit.graph, found.graph))
    assert bool((after.amax(-1) == 1).all())
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before)


def test_the_structure_of_attention_is_still_seen(vit):
    found = divided(vit)
    named = [[op and op.name for op in vars(one).values()] for one in heads(vit.graph)]
    assert None not in named[0]
    assert [[op and op.name for op in vars(one).values()] for one in heads(found.graph)] == named
    assert [(one.name, one.kind, one.ops) for one in modules(found.graph)] == [
        (one.name, one.kind, one.ops) for one in modules(vit.graph)
    ]


def test_flat_and_sharp_rows_are_both_served_by_one_step(vit):
    """At 4 bits, against every fixed step of the probabilities themselves: 400 of them."""
    rows = (
        torch.cat([torch.full((32, 32), 1 / 32), torch.eye(32)])
        + torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) / 80
    )
    rows, values = rows / rows.sum(1, keepdim=True), torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    grid, largest = Grid(4, signed=False, symmetric=False), rows.amax(1, keepdim=True)

    def error(x, scale, factor=1.0):
        quantized = fake(x, QParams(torch.tensor(scale), torch.tensor(0, dtype=torch.int32)), grid)
        return float(((quantized @ values) * factor - rows @ values).square().sum())

    assert error(rows / largest, 1 / 15, largest) < min(error(rows, k / 6000) for k in range(1, 401)) / 4


@pytest.mark.parametrize(("bits", "found"), [(4, 1), (6, 1), (7, 1), (8, 0)])
def test_eight_bits_are_left_alone(vit, bits, found):
    assert len(list(flat_rows(vit.graph, grids(vit, bits)))) == found
    assert not list(flat_rows(vit.graph, {}))


class Part(nn.Module):
    """Attention whose probabilities are a part of each row of a softmax: a row of them may be all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)[:, :, :48].reshape(-1, 12, 12)
        probs = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)[..., :11]
        return self.out(probs @ self.v(x)[:, :11]).mean(1)


def test_a_part_of_a_row_is_left_alone(capture_net):
    net = capture_net(Part())
    assert [site.role for site in net.graph.sites if site.role == "probs"] == ["probs"]
    assert not list(flat_rows(net.graph, grids(net, 4)))
