"""Oracles: the Fisher information of a linear model in closed form, the values themselves."""

from __future__ import annotations

import torch

from fewbit.choose import Recipe, choose, parse_bits
from fewbit.choose.fisher import Importance, position_weights, weighted_samples
from fewbit.choose.ranges import MseRange, Ranges


class Linear(torch.nn.Module):
    """An image's mean by channel, then two layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 5), torch.nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.mean((2, 3))))


def test_importance_is_the_fisher_information_by_channel(capture_net):
    torch.manual_seed(0)
    net = capture_net(Linear())
    with torch.no_grad():
        net.module.b.weight.mul_(3)
    images = torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = weighted_samples(net.graph, ["b:input"], images.split(2000), len(images))["b:input"]
    with torch.no_grad():
        hidden = net.module.a(images.mean((2, 3)))
        p = net.module.b(hidden).softmax(1)
        w = net.module.b.weight
        expected = ((p @ w.square()) - (p @ w).square()).mean(0)  # E over answers of (w_y - mean w)²
    channels = [(hidden == v).nonzero()[0, 1].item() for v in found.values[0, :3000]]
    measured = [torch.stack([c for c, at in zip(found.counts, channels, strict=False) if at == k]).mean() for k in range(5)]
    ratio = torch.stack(measured) / expected
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(5), rtol=0.15, atol=0)
    assert torch.isclose(found.counts.mean(), torch.tensor(1.0), atol=1e-4)


class FirstToken(torch.nn.Module):
    """A layer on each of 4 places of an image, of which the answers see the first twice and the second once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 5), torch.nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2))
        return self.b(2 * y[:, 0] + y[:, 1])


def test_a_position_matters_by_the_square_of_what_the_answers_see_of_it(capture_net):
    torch.manual_seed(0)
    net = capture_net(FirstToken())
    op = net.graph.op("a")
    for even in (0.0, 0.5):
        found = position_weights(net.graph, [op], net.images.split(8), Importance(even))["a"]
        torch.testing.assert_close(found, even + (1 - even) * torch.tensor([3.2, 0.8, 0.0, 0.0]))


def test_a_recipe_with_gradients_has_ranges_of_its_own_and_gradients_stay_out_of_the_graph(vit):
    context = vit.context("ort-x86-vnni", bits=parse_bits(4), everything=False)
    plans = [choose(context, Recipe("", (Ranges(MseRange(), gradients=g),))) for g in (False, True)]
    scales = [[float(c.qparams.scale) for c in plan.choices.values() if c.role == "input"] for plan in plans]
    assert scales[0] != scales[1]
    assert all(p.grad is None for p in vit.graph.module.parameters())
