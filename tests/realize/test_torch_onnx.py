"""How torch.onnx is called. Oracles: torch.onnx as it is, PyTorch, onnxruntime."""

from __future__ import annotations

from contextlib import nullcontext

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import Fault
from fewbit.realize import qdq, rendered, rendered_float, torch_onnx
from fewbit.realize.program import program_of
from fewbit.realize.torch_onnx import DECOMPOSE
from fewbit.target import load_target


class Bits(nn.Module):
    """An `and`, which torch.onnx has to decompose, behind a layer that it need not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.stem(x)
        return torch.where((y > 0) & (y < 0.5), y, -y).mean((2, 3))


def spied(monkeypatch, function=DECOMPOSE):
    """How often the decomposition runs, with `function` in its place."""
    calls = []
    monkeypatch.setattr(torch_onnx, "DECOMPOSE", lambda *args: (calls.append(1), function(*args))[1])
    return calls


def shape_of(model: ir.Model) -> list[tuple[str, int, int]]:
    return [(node.op_type, len(node.inputs), len(node.outputs)) for node in model.graph]


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_without_decompositions_the_file_is_the_same(name, request, monkeypatch):
    graph = request.getfixturevalue(name).graph
    calls = spied(monkeypatch)
    quick = rendered_float(graph, opset=21)
    assert not calls
    monkeypatch.setattr(torch_onnx, "_decomposed", DECOMPOSE)
    whole = rendered_float(graph, opset=21)
    assert shape_of(quick) == shape_of(whole)
    x = torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(0)).numpy()
    ours, theirs = (
        ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {graph.input_name: x})[0]
        for model in (quick, whole)
    )
    assert (ours == theirs).all()


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_site_without_a_quantizer_in_the_file_is_named(conv_net, monkeypatch, place):
    plan = conv_net.plan("ort-x86-vnni")
    _, order = qdq.qdq_module(conv_net.graph, plan)

    def lacking(*args):
        model = torch_onnx.to_onnx(*args)
        node = [node for node in model.graph if node.op_type == "QuantizeLinear"][place]
        (user,) = {id(user): user for user in node.outputs[0].consumers()}.values()
        ir.convenience.replace_all_uses_with(user.outputs[0], node.inputs[0])
        model.graph.remove([user, node])
        return model

    monkeypatch.setattr(qdq, "to_onnx", lacking)
    n, site = len(order), order[place]
    with pytest.raises(Fault) as found:
        rendered(conv_net.graph, plan, opset=21)
    said = f"torch.onnx wrote {n - 1} QuantizeLinear nodes for {n} activation sites. There is none for {site}. This is a fault"
    assert str(found.value).startswith(said)
    assert f"Try --keep-float '{site}', or another recipe" in str(found.value)


def test_what_torch_onnx_cannot_write_is_decomposed(capture_net, monkeypatch):
    net = capture_net(Bits())
    calls = spied(monkeypatch)
    model = rendered_float(net.graph, opset=21)
    assert calls
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {net.graph.input_name: net.images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net.module(net.images), rtol=1e-4, atol=1e-5)


class Typed(nn.Module):
    """A change of type, which torch.onnx takes apart but has in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.stem(x).mean((2, 3)).argmax(1, keepdim=True).to(torch.int32)


def test_what_is_in_no_table_is_tried_again(capture_net):
    net = capture_net(Typed())
    session = ort.InferenceSession(ir.to_proto(rendered_float(net.graph, opset=21)).SerializeToString())
    (found,) = session.run(None, {net.graph.input_name: net.images.numpy()})
    with torch.no_grad():
        assert (found == net.module(net.images).numpy()).all()


class Promoted(nn.Module):
    """A whole number and places in whole numbers beside real ones, which torch.onnx has to cast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.stem(x) * 3
        return (y + torch.arange(y.shape[-1])).mean((2, 3))


class Sized(nn.Module):
    """The size of what a convolution gives, read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        y = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([y.new_zeros(1, 1, 4).expand(y.shape[0], -1, -1), y], 1)).mean(1)


@pytest.mark.parametrize("name", ["conv_net", "vit", "mixed_net", Promoted, Sized])
def test_without_another_trace_the_files_are_those_of_torch_onnx(name, request, capture_net, monkeypatch):
    net = request.getfixturevalue(name) if isinstance(name, str) else capture_net(name())
    plan = net.plan("ort-x86-vnni")

    def files() -> list[ir.Model]:
        return [rendered_float(net.graph, opset=21), rendered(net.graph, plan, opset=21)]

    monkeypatch.setattr(torch.export, "export", only_ports := counted(torch.export.export))
    quick = files()
    assert [len(list(module.graph.nodes)) for module in only_ports.given] == [3, 3]  # input, copy, output
    assert all(node.inputs[0].is_graph_input() for model in quick for node in model.graph if node.op_type == "Shape")
    monkeypatch.setattr(torch_onnx, "program_of", lambda *args: None)
    monkeypatch.setattr(torch_onnx, "quick", nullcontext)
    x = net.images.numpy()
    for ours, theirs in zip(quick, files(), strict=True):
        assert sorted(shape_of(ours)) == sorted(shape_of(theirs))
        assert constants_of(ours) == constants_of(theirs)
        assert [str(port.shape) for port in ours.graph.inputs] == [str(port.shape) for port in theirs.graph.inputs]
        found, expected = (
            ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {net.graph.input_name: x})[0]
            for model in (ours, theirs)
        )
        assert (found == expected).all()


def counted(function):
    """A function that keeps its first arguments."""

    def kept(first, *args, **options):
        kept.given.append(first)
        return function(first, *args, **options)

    kept.given = []
    return kept


def constants_of(model: ir.Model) -> list[tuple[str, bytes]]:
    return sorted((str(value.dtype), value.const_value.numpy().tobytes()) for value in model.graph.initializers.values())


def test_where_the_quick_way_fails_torch_onnx_goes_its_own(conv_net, monkeypatch):
    quick = rendered_float(conv_net.graph, opset=21)

    def fail(*args: object) -> None:
        raise RuntimeError("no program")

    monkeypatch.setattr(torch_onnx, "program_of", fail)
    own = rendered_float(conv_net.graph, opset=21)
    assert shape_of(own) == shape_of(quick)
    found, expected = (
        ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"images": conv_net.images.numpy()})[0]
        for model in (own, quick)
    )
    assert (found == expected).all()


def test_what_torch_export_has_to_trace_has_no_program():
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4)))  # a call of a module
    assert program_of(module, (torch.zeros(2, 3),), None) is None


def test_a_size_that_the_graph_fixes_has_no_program():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.view.default, (x, [2, 3])))
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert program_of(module, (torch.zeros(2, 3, 1),), ({0: "batch"},)) is None
    assert program_of(module, (torch.zeros(2, 3, 1),), None) is not None


class Asked(nn.Module):
    """What learned queries see of an image; torch.onnx computes the queries while it writes the file."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.conv = nn.Parameter(torch.randn(1, 4, 8)), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        asked = F.scaled_dot_product_attention(self.queries, self.queries, self.queries)
        return asked @ self.conv(x).flatten(2)


class Detached(nn.Module):
    """What two layers read, one of them a copy of it."""

    def __init__(self, copy) -> None:
        super().__init__()
        self.copy, self.norm, self.one, self.other = copy, nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(1, 2))
        return torch.cat((self.one(y), self.other(self.copy(y))), 1).mean(1)


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(lambda y: y + 0, id="0 added"),
        pytest.param(lambda y: y.transpose(1, 2).transpose(2, 1), id="transposed twice"),
        pytest.param(lambda y: y.mT.swapaxes(1, 2), id="transposed twice by other names"),
        pytest.param(lambda y: y.movedim(1, 2).permute(2, 1, 0).permute(2, 0, 1), id="turned round"),
        pytest.param(lambda y: torch.atleast_3d(y).view_as(y).real, id="its own shape"),
        pytest.param(lambda y: torch.cat([+y]), id="a concatenation of one"),
        pytest.param(lambda y: y.clamp(-99, 99), id="clamped where no number is"),
    ],
)
def test_a_tensor_and_its_copy_have_a_quantizer_for_each_site_in_the_file(copy, capture_net):
    """torch.onnx writes one for two that are alike."""
    net = capture_net(Detached(copy))
    plan = net.plan("ort-x86-vnni")
    written = [node for node in rendered(net.graph, plan, opset=21).graph if node.op_type == "QuantizeLinear"]
    assert len(written) == sum(choice.codes is None for choice in plan.choices.values())


@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
def test_the_codes_of_what_is_computed_from_constants_have_the_name_of_their_site(capture_net, target):
    net = capture_net(Asked())
    plan = net.plan(target)
    model = rendered(net.graph, plan, **load_target(target).file_format)
    written = {node.outputs[0].name for node in model.graph if node.op_type == "QuantizeLinear"}
    assert {f"{name}.codes" for name, choice in plan.choices.items() if choice.codes is None} == written


class Computed(nn.Module):
    """A function of the whole numbers, of both signs, that a layer makes."""

    def __init__(self, function) -> None:
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, 4, 3), function
        self.register_buffer("places", torch.arange(4).view(4, 1, 1))
        for numbers in self.stem.parameters():  # whole, so that no sum is rounded
            numbers.data.mul_(4).round_()

    def forward(self, x):
        whole = self.stem((x * 2).round()).to(torch.int64)
        return self.function(whole, self.places).float().mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda y, n: y << n, id="left"),
        pytest.param(lambda y, n: y >> n, id="right"),
        pytest.param(lambda y, n: y << 2, id="left by a number"),
        pytest.param(lambda y, n: y >> 2, id="right by a number"),
        pytest.param(lambda y, n: (y * 0.05).cumprod(1), id="cumulated product"),
    ],
)
def test_shifts_and_products_are_those_of_torch(function, capture_net):
    net = capture_net(Computed(function))
    session = ort.InferenceSession(ir.to_proto(rendered_float(net.graph, opset=21)).SerializeToString())
    (found,) = session.run(None, {net.graph.input_name: net.images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net.module(net.images), rtol=1e-4, atol=1e-4)
