"""Rotations. Oracles: matrices' own identities, the function itself on random images, an outlier that was planted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewbit.capture.residual import residual
from fewbit.core.fx import constant
from fewbit.equalize import Equalize, replaced
from fewbit.equalize.replaced import same_function
from fewbit.equalize.rotate import can_rotate, fixing_ones, orthogonal, rotated, rotated_heads
from fewbit.observe.outliers import outliers
from fewbit.target import load_target
from fewbit.target.allowed import allowed


@pytest.fixture(scope="module")
def net(capture_net, vit):
    """Norms and biases as uneven as those of trained transformers, and one channel that all blocks write large."""
    module = copy.deepcopy(vit.module)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.copy_(torch.rand(part.weight.shape, generator=generator) * 4 + 0.1)
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator) * 2)
        module.patch.weight[3].mul_(50)
    return capture_net(module)


@pytest.mark.parametrize("n", [2, 3, 16, 65])
def test_matrices_are_orthogonal_and_leave_ones_alone(n):
    generator = torch.Generator().manual_seed(n)
    eye, ones = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    for q in (orthogonal(n, generator), fixing_ones(n, generator)):
        torch.testing.assert_close(q.T @ q, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(q @ ones, ones, atol=1e-12, rtol=0)
    torch.testing.assert_close(ones @ q, ones, atol=1e-12, rtol=0)
    if n > 2:
        assert float((q - eye).abs().max()) > 0.1


def test_a_stock_layer_norm_commutes_with_them():
    q = fixing_ones(24, torch.Generator().manual_seed(0))
    x = torch.randn(10, 24, dtype=torch.float64) * 3 + 1
    norm = nn.functional.layer_norm
    torch.testing.assert_close(norm(x @ q, (24,)), norm(x, (24,)) @ q, atol=1e-12, rtol=0)
    other = orthogonal(24, torch.Generator().manual_seed(0))  # without the condition it does not
    assert float((norm(x @ other, (24,)) - norm(x, (24,)) @ other).abs().max()) > 0.1


def test_the_stream_of_a_transformer_is_found_and_none_in_a_convolutional_net(net, conv_net):
    found = residual(net.graph)
    assert found is not None
    assert found.width == 16
    assert {op.name for op in found.writers} == {"patch", "blocks.0.proj", "blocks.0.fc2"}
    assert [[op.name for op in norm.layers][-1] for norm in found.norms][-1] == "head"
    assert len(found.norms) == 3
    assert residual(conv_net.graph) is None


def test_the_function_is_the_same_and_every_tensor_is_another(net):
    found = residual(net.graph)
    assert can_rotate(net.graph, found)
    new = rotated(net.graph, found)
    turned = replaced(net.graph, new)
    assert same_function(net.graph, turned, seed=3) < 1e-5
    for name, value in new.items():
        assert (
            value.shape == constant(net.graph.module, next(n for n in net.graph.module.graph.nodes if n.target == name)).shape
        )
    for norm in found.norms:
        assert bool((constant(turned.module, turned_node(turned, norm.node.args[2])) == 1).all())


def turned_node(graph, node):
    return next(n for n in graph.module.graph.nodes if n.name == node.name)


def test_heads_are_rotated_one_by_one_and_the_function_is_the_same(net):
    found = {op.name: changes for op, changes in rotated_heads(net.graph)}
    assert set(found) == {"blocks.0.qkv.3", "blocks.0.qkv.1"}
    for changes in found.values():
        assert same_function(net.graph, replaced(net.graph, changes), seed=3) < 1e-5
    weight = net.graph.site(net.graph.op("blocks.0.qkv.1").operands["weight"])
    before = constant(net.graph.module, turned_node(net.graph, next(
        n for n in net.graph.module.graph.nodes if n.name == weight.tensor
    )))  # fmt: skip
    after = found["blocks.0.qkv.1"][next(name for name, v in found["blocks.0.qkv.1"].items() if v.shape == before.shape)]
    for head in (slice(0, 8), slice(8, 16)):  # a rotation keeps what a head has, and only moves it within the head
        torch.testing.assert_close(after[head].square().sum(0), before[head].square().sum(0), atol=1e-4, rtol=1e-4)


def test_an_outlier_channel_is_spread(net):
    found = residual(net.graph)
    turned = replaced(net.graph, rotated(net.graph, found))
    before, after = ({row.site: row.channel_ratio for row in outliers(graph, [net.images])} for graph in (net.graph, turned))
    site = next(s for s in before if s.startswith("blocks.0.add") and s.endswith("left"))
    assert before[site] > 20
    assert after[site] < before[site] / 3


def test_equalize_rotates_first_and_says_so(net, conv_net):
    def grids(given):
        return allowed(given.graph, load_target("ort-x86-vnni"), weight_bits=4, activation_bits=4, everything=True).grids

    found = Equalize(rotate=True, rotate_heads=True)(net.graph, net.images.split(8), grids(net))
    assert [(row["op"], row["moved"]) for row in found.record if row["kind"] == "rotation"] == [
        ("residual stream", True), ("blocks.0.qkv.3", True), ("blocks.0.qkv.1", True),
    ]  # fmt: skip
    assert {row["kind"] for row in found.record} >= {"norm", "value", "rotation"}
    assert same_function(net.graph, found.graph, seed=9) < 1e-4
    assert same_function(found.graph, replaced(net.graph, found.constants)) == 0
    plain = Equalize(rotate=True)(conv_net.graph, conv_net.images.split(8), grids(conv_net))
    assert [row["moved"] for row in plain.record if row["kind"] == "rotation"] == [False]
