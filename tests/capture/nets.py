"""What the tests of capture share: random nets, their graphs, and what must hold between a net and its graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.capture import capture
from fewbit.core.graph import Graph
from fewbit.load import export, load_model
from fewbit.load.inputs import image
from fewbit.load.ports import named_tensors
from fewbit.load.program import graph_module


def randomize(net: nn.Module, size: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """Every parameter drawn, so that nothing is neutral and an image is seen in the output.

    Batch norm's statistics are drawn near those of a few images: a wrong fold shows, and activations do not saturate.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.requires_grad_(False)
        if sum(n > 1 for n in p.shape) < 2:
            low = 0.5 if name.endswith(("weight", "gamma", "lambda1")) or "scale" in name else -0.25
            p.copy_(low + torch.rand(p.shape, generator=g) * 0.5)
        else:
            p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)

    def draw_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        var = x.var(1)
        var = var + 0.1 * var.mean()
        norm.running_mean.copy_(x.mean(1) + 0.3 * var.sqrt() * torch.randn(var.shape, generator=g))
        norm.running_var.copy_(var * (0.5 + torch.rand(var.shape, generator=g)))

    norms = [m for m in net.eval().modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    hooks = [norm.register_forward_pre_hook(draw_statistics) for norm in norms]
    if hooks:
        net(images(size, 4))
    for hook in hooks:
        hook.remove()
    return net


def images(size: tuple[int, int, int], batch: int, seed: int = 1) -> Tensor:
    """Noise of another colour and strength in each image, so that they differ after pooling too."""
    g = torch.Generator().manual_seed(seed)
    colour, strength = torch.randn(batch, size[0], 1, 1, generator=g), torch.rand(batch, 1, 1, 1, generator=g)
    return colour + (strength + 0.5) * torch.randn(batch, *size, generator=g)


def assert_same_function(net: nn.Module, module: nn.Module, size: tuple[int, int, int]) -> None:
    """1e-4 of the largest output: folding is done in float64, the sums of float32 differ by their order only."""
    for batch in (1, 3):
        x = images(size, batch)
        with torch.no_grad():
            wanted, returned = list(named_tensors(net(x)).values()), module(x)
        results = returned if isinstance(returned, tuple) else (returned,)
        for expected, found in zip(wanted, results, strict=True):
            assert found.shape == expected.shape
            if batch > 1:
                assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max(), "every image gives the same"
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def graph_of(net: nn.Module, size: tuple[int, int, int] = (3, 8, 8)) -> Graph:
    """The graph of a net, after it was compared with the net."""
    graph = capture(load_model(net.eval(), overrides={"input_size": size}))
    assert_same_function(net, graph.module, size)
    return graph


def opened(net: nn.Module, size: tuple[int, int, int] = (3, 8, 8)) -> GraphModule:
    """What torch.export makes of a net, before any rewrite."""
    return graph_module(export(net.eval(), [image(size)]))


def count(module: GraphModule) -> Counter[str]:
    """How often each op is called, by its short name: linear, batch_norm, relu_."""
    return Counter(short(node.target) for node in module.graph.nodes if node.op == "call_function")


def short(target: Any) -> str:
    return str(getattr(target, "__name__", target)).split(".")[0]


def kinds(graph: Graph) -> dict[str, int]:
    return dict(Counter(op.kind for op in graph.ops))


def roles(graph: Graph) -> dict[str, int]:
    return dict(Counter(site.role for site in graph.sites))
