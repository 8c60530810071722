"""The executor and the stream. Oracles: torch.fx's interpreter on graphs edited by hand; bit for bit."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fewbit.capture.sites import readers, tensor_of
from fewbit.choose.finetune import TunedModel
from fewbit.choose.soft_codes import Straight
from fewbit.core.graph import Graph
from fewbit.core.grid import fake, values
from fewbit.core.plan import Choice, Plan
from fewbit.equalize.replaced import replaced
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.execute.watch import watch

TARGETS = ("ort-x86-vnni", "openvino-x86", "npu-int16")


class Recorder(Interpreter):
    """Every value of a run."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


class Fake(nn.Module):
    def __init__(self, choice: Choice, straight: bool) -> None:
        super().__init__()
        self.choice, self.straight = choice, straight

    def forward(self, x: Tensor) -> Tensor:
        call = Straight.apply if self.straight else fake
        return call(x, self.choice.qparams, self.choice.grid)


def edited(graph: Graph, plan: Plan, straight: bool = False) -> GraphModule:
    """The plan as a graph module: a submodule behind every quantized activation, buffers for codes and corrected biases."""
    module = GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    nodes = {node.name: node for node in module.graph.nodes}

    def constant(name: str, value: Tensor, reader: Node, position: int) -> None:
        module.register_buffer(name, value)
        with module.graph.inserting_before(reader):
            read = module.graph.get_attr(name)
        reader.args = (*reader.args[:position], read, *reader.args[position + 1 :])

    for i, (name, bias) in enumerate(plan.biases.items()):
        constant(f"corrected_{i}", bias.values, nodes[graph.op(name).node], 2)
    for i, choice in enumerate(plan.choices.values()):
        site = graph.site(choice.site)
        if choice.codes is not None:
            real = values(choice.codes.to(torch.int32), choice.qparams, choice.grid)
            for op, _ in site.readers:
                constant(f"codes_{i}", real, nodes[graph.op(op).node], 1)
            continue
        tensor = nodes[site.tensor]
        users = readers(graph, choice, plan.integer_ops, tensor)
        module.add_submodule(f"fake_{i}", Fake(choice, straight))
        with module.graph.inserting_after(tensor):
            quantized = module.graph.call_module(f"fake_{i}", (tensor,))
        for user in users:
            user.replace_input_with(tensor, quantized)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@pytest.fixture(params=["conv_net", "vit", "mixed_net"])
def net(request):
    return request.getfixturevalue(request.param)


def test_taps_get_every_value_of_the_float_graph_in_its_order(net):
    oracle, seen = Recorder(net.graph.module), {}
    names = [n.name for n in net.graph.module.graph.nodes if n.op != "output"]
    with torch.no_grad():
        expected = oracle.run(net.images)
        output = Executor(net.graph)(
            net.images, {name: lambda v, name=name: seen.update({name: v}) for name in reversed(names)}
        )[0]
    assert torch.equal(output, expected)
    assert list(seen) == names
    for name, value in seen.items():
        pairs = zip(value, oracle.seen[name], strict=True) if isinstance(value, tuple | list) else [(value, oracle.seen[name])]
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["mse", "liu2021-bias"])
def test_a_plan_gives_the_bits_of_an_edited_graph(net, target, recipe):
    plan = net.plan(target, recipe)
    seen: dict[str, Tensor] = {}
    tapped = [site.tensor for site in net.graph.sites if site.axis is None]
    with torch.no_grad():
        oracle = Recorder(edited(net.graph, plan))
        expected = oracle.run(net.images)
        output = Executor.of(net.graph, plan)(net.images, {n: lambda v, n=n: seen.update({n: v}) for n in tapped})[0]
    assert torch.equal(output, expected)
    assert set(seen) == set(tapped)
    assert all(torch.equal(seen[name], oracle.seen[name]) for name in tapped)


def test_an_answer_whose_codes_all_readers_read_is_quantized(conv_net):
    plan = next(p for p in (conv_net.plan(t, "mse") for t in ("arm-int7", *TARGETS)) if p.choices)
    graph, answer = conv_net.graph, conv_net.graph.module.graph.output_node().args[0]
    site = next(s for s in graph.sites if s.axis is None)
    choice = plan.choices[site.name]
    executor = Executor(graph)
    executor.instead[executor.order[-1]] = {answer: choice}
    with torch.no_grad():
        expected = fake(graph.module(conv_net.images), choice.qparams, choice.grid)
        assert torch.equal(executor(conv_net.images)[0], expected)


def test_a_quantized_tensor_is_computed_once_for_all_its_readers(vit):
    plan, read = vit.plan("ort-x86-vnni", "mse"), []
    executor = Executor.of(vit.graph, plan, read=lambda x, c: (read.append(c.site), fake(x, c.qparams, c.grid))[1])
    with torch.no_grad():
        executor(vit.images)
        first = list(read)
        executor(vit.images)
    assert len(first) == len(set(first)) == sum(choice.codes is None for choice in plan.choices.values())
    assert read == first * 2
    assert any(len(vit.graph.site(name).readers) > 1 for name in first)  # queries, keys and values


def test_gradients_are_those_of_the_interpreter(net):
    names = [site.tensor for site in net.graph.sites if site.axis is None]
    x, y = (net.images.clone().requires_grad_() for _ in range(2))
    seen: dict[str, Tensor] = {}
    oracle = Recorder(net.graph.module)
    expected = torch.autograd.grad(oracle.run(x).log_softmax(1)[:, 0].sum(), [oracle.seen[n] for n in names], allow_unused=True)
    (output,) = Executor(net.graph)(y, {name: lambda v, name=name: seen.update({name: v}) for name in names})
    found = torch.autograd.grad(output.log_softmax(1)[:, 0].sum(), [seen[n] for n in names], allow_unused=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(a is not None for a in found) > 3


@pytest.mark.parametrize("recipe", ["mse", "liu2021-bias"])
def test_a_students_gradients_are_those_of_an_edited_graph(net, recipe):
    plan = net.plan("ort-x86-vnni", recipe)
    student, graph = TunedModel(net.graph, plan), net.graph
    oracle = edited(graph, plan, straight=True)
    inputs: dict[str, Tensor] = {}  # the oracle's leaves, by the buffer that a node reads
    leaves: dict[str, Tensor] = {}
    for i, choice in enumerate(plan.choices.values()):
        if choice.role == "weight":
            leaves[choice.site] = student.tuned_weights()[choice.site].clone().requires_grad_()
            inputs[f"codes_{i}"] = Straight.apply(leaves[choice.site], choice.qparams, choice.grid)
    by_op: dict[str, Tensor] = {}
    nodes = {node.name: node for node in oracle.graph.nodes}
    for name, value in student.tuned_biases().items():
        by_op[name] = value.clone().requires_grad_()
        inputs[nodes[graph.op(name).node].args[2].target] = by_op[name]

    class Fed(Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return inputs[target] if target in inputs else super().get_attr(target, args, kwargs)

    (y,), expected = student(net.images), Fed(oracle).run(net.images)
    assert torch.equal(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), [*leaves.values(), *by_op.values()])
    found = torch.autograd.grad(y.square().sum(), [*student.weights.values(), *student.biases.values()])
    assert len(found) == len(wanted) > 4
    assert all(map(torch.equal, found, wanted))


def test_values_are_freed_after_their_last_use(net):
    alive: dict[str, weakref.ref[Tensor]] = {}
    order = [n for n in net.graph.module.graph.nodes if n.op == "call_function"]
    place = {node.name: i for i, node in enumerate(order)}
    last = {n.name: max((place.get(u.name, len(order)) for u in n.users), default=len(order)) for n in order}

    def see(name: str, value: Any) -> None:
        for other, ref in alive.items():
            if last[other] < place[name]:
                assert ref() is None, (other, name)
        if isinstance(value, Tensor) and value._base is None:
            alive[name] = weakref.ref(value)

    gc.collect()
    with torch.no_grad():
        Executor(net.graph)(net.images, {n.name: lambda v, name=n.name: see(name, v) for n in order})
    assert len(alive) > 5


def test_a_tensor_that_only_codes_are_read_of_is_freed_when_it_has_them(conv_net):
    plan, alive, checked = conv_net.plan("openvino-x86", "mse"), {}, []
    executor = Executor.of(conv_net.graph, plan)
    for name, choice in plan.choices.items():
        tensor = executor.nodes[conv_net.graph.site(name).tensor]
        if choice.codes is not None or tensor.op != "call_function":
            continue
        if all(executor.instead.get(user, {}).get(tensor) is choice for user in tensor.users):
            checked.append((tensor.name, next(n.name for n in executor.order if n in tensor.users)))

    def call(reader: str) -> Any:
        target = executor.nodes[reader].target

        def run(*args: Any, **kwargs: Any) -> Any:
            assert all(alive[tensor]() is None for tensor, other in checked if other == reader)
            return target(*args, **kwargs)

        return run

    taps = {tensor: lambda v, tensor=tensor: alive.update({tensor: weakref.ref(v)}) for tensor, _ in checked}
    with torch.no_grad():
        executor(conv_net.images, taps, calls={reader: call(reader) for _, reader in checked})
    assert len(checked) > 2


def test_watching_hands_out_the_numbers_of_the_images(conv_net):
    seen: list[range] = []
    source = conv_net.graph.module.graph.find_nodes(op="placeholder")[0].name
    assert watch(conv_net.graph, conv_net.images.split(6), {source: lambda v, images: seen.append(images)}) == 16
    assert seen == [range(6), range(6, 12), range(12, 16)]


def test_a_bare_module_runs_and_has_no_sites(conv_net):
    executor = Executor(conv_net.graph.module)
    with torch.no_grad():
        assert torch.equal(executor(conv_net.images)[0], conv_net.graph.module(conv_net.images))
    with pytest.raises(ValueError, match="bare module"):
        executor.set_bias("stem", None)


def test_a_stream_answers_from_any_place_as_the_interpreter_and_under_its_limit(net, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fewbit.execute.stream"), "KEPT_BYTES", 20_000)
    plan = net.plan("ort-x86-vnni", "mse")
    stream = Stream(Executor.of(net.graph, plan), net.images.split(5))
    with torch.no_grad():
        expected = [edited(net.graph, plan)(batch) for batch in net.images.split(5)]
    places = set()
    for place in range(0, len(stream.order), 3):
        stream.to(place)
        places.add(stream.place)
        assert stream.place <= place
        kept = [v for node, values in stream._values.items() if node.op != "placeholder" for v in values]
        held = [v for v in kept if isinstance(v, Tensor)]
        assert sum(4 * v.numel() for v in held) <= 20_000
        assert all(torch.equal(output, answer) for (output,), answer in zip(stream.outputs(), expected, strict=True))
    assert len(places) > 2
    stream.back()
    assert stream.place == 0
    assert all(torch.equal(output, answer) for (output,), answer in zip(stream.outputs(), expected, strict=True))


def test_large_weights_are_made_of_their_codes_in_each_run_and_kept_by_nobody(vit, ort_target, monkeypatch):
    plan = vit.plan(ort_target)
    kept = Executor.of(vit.graph, plan)
    monkeypatch.setattr("fewbit.execute.executor.LARGE", 1)
    made = Executor.of(vit.graph, plan)
    weights = [choice.site for choice in plan.choices.values() if choice.role == "weight"]
    held = [value for reads in made.instead.values() for value in reads.values() if isinstance(value, torch.Tensor)]
    assert weights
    assert not [one for one in held if one.numel() > 1]
    for _ in range(2):
        assert torch.equal(made(vit.images)[0], kept(vit.images)[0])


def test_nodes_read_other_values_of_constants_before_and_after_the_first_run(vit):
    op = next(op for op in vit.graph.ops if op.kind == "linear")
    site = vit.graph.site(op.operands["weight"])
    name = next(node.target for node in vit.graph.module.graph.nodes if node.name == site.tensor)
    changed = {name: 2 * tensor_of(vit.graph, site)}
    expected = Executor(replaced(vit.graph, changed))(vit.images)
    early, late = Executor(vit.graph), Executor(vit.graph)
    before = late(vit.images)
    early.replace(changed), late.replace(changed)
    assert not torch.equal(before[0], expected[0])
    assert torch.equal(early(vit.images)[0], expected[0])
    assert torch.equal(late(vit.images)[0], expected[0])
    assert torch.equal(Executor(vit.graph)(vit.images)[0], before[0])
