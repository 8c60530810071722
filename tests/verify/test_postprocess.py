"""Oracles: a net whose tail is known by how it was written, and losses of plans that were made without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fewbit.capture import capture
from fewbit.choose import Bits
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.execute.executor import Executor
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.recipes import RECIPES
from fewbit.target import load_target
from fewbit.task import task_of
from fewbit.verify.postprocess import MOVED, NO_KIND, nodes_behind, postprocessing
from planning import plan_for


class Head(nn.Module):
    """Two layers, then a scaled sigmoid beside a pooled map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return torch.cat([y.sigmoid() * 4, nn.functional.max_pool2d(y, 3, 1, 1)], 1).flatten(2)


class Joined(Head):
    """The same with the map added to the pooled one: an addition that rounds once more."""

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return (nn.functional.max_pool2d(y, 3, 1, 1) + y).flatten(2)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(load_model(Head(), overrides={"input_size": (3, 8, 8)}))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(graph, images) -> Plan:
    return plan_for(graph, observe(graph, [images]), load_target("ort-x86-vnni"), RECIPES["minmax"], bits=Bits(8, 8))


def test_what_no_layer_reads_any_more_is_behind(graph):
    names = [str(node.target).removeprefix("aten.").partition(".")[0] for node in nodes_behind(graph)]
    assert names == ["sigmoid", "mul", "max_pool2d", "cat", "flatten"]
    assert not {"conv2d", "convolution", "relu"} & set(names)


def test_each_node_is_counted_once_with_where_it_runs(graph, plan, images):
    found = postprocessing(graph, plan, images)["behind"]
    assert [(row["function"], row["how"], row["why"], row["nodes"]) for row in found] == [
        ("sigmoid", "float", NO_KIND, 1),
        ("mul", "float", NO_KIND, 1),
        ("max_pool2d", "integers", "", 1),
        ("cat", "float", "the target has no integers for it, or it was left out", 1),
        ("flatten", "float", MOVED, 1),
    ]


def test_the_cost_is_the_loss_without_these_ops(graph, plan, images):
    behind = {node.name for node in nodes_behind(graph)}
    inner = [name for name in plan.integer_ops if graph.op(name).node in behind]
    found = postprocessing(graph, plan, images)["behind_cost"]
    assert len(inner) == found[0]["ops"] == 1  # the pooling, which has the codes of the layer
    task, exact = task_of(graph), Executor(graph)(images)
    fewer = dataclasses.replace(plan, integer_ops=tuple(name for name in plan.integer_ops if name not in inner))
    assert found[0]["without"] == pytest.approx(task.divergence(exact, Executor.of(graph, fewer)(images)) / 4)


def test_ops_behind_the_last_layers_that_round_cost_something(images):
    graph = capture(load_model(Joined(), overrides={"input_size": (3, 8, 8)}))
    target, stats = load_target("ort-x86-vnni"), observe(graph, [images])
    plan = plan_for(graph, stats, target, RECIPES["minmax"], bits=Bits(8, 8), everything=True)
    (found,) = postprocessing(graph, plan, images)["behind_cost"]
    exact = Executor(graph)(images)
    layers = tuple(name for name in plan.integer_ops if graph.op(name).kind == "conv")
    assert found["ops"] == len(plan.integer_ops) - len(layers) == 2
    for key, names in (("loss", plan.integer_ops), ("without", layers)):
        ours = task_of(graph).divergence(exact, Executor.of(graph, dataclasses.replace(plan, integer_ops=names))(images))
        assert found[key] == pytest.approx(float(ours) / 4, rel=1e-6)
    assert found["loss"] > 1.1 * found["without"]
