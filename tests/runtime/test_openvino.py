"""openvino multiplies two activations in integers only if neither has a zero point; its own graph says what it did."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fewbit.capture import capture
from fewbit.choose import Bits, choose
from fewbit.choose.builder import PlanBuilder
from fewbit.core.checks import Checks
from fewbit.core.plan import Plan
from fewbit.errors import BadFile, BadModel, FewbitFailed
from fewbit.execute.simulate import simulate
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.realize import realize
from fewbit.realize.qdq import CODES
from fewbit.recipes import recipe_named
from fewbit.request import Request
from fewbit.run import Run
from fewbit.runtimes import OpenVino
from fewbit.stages import STAGES
from fewbit.target import load_target
from fewbit.verify.compare import compare
from planning import context_for, plan_for

pytest.importorskip("openvino")


class Attention(nn.Module):
    """Queries and keys that are not symmetric, four heads of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 192), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 64, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q + 0.3, k + 0.3, v + 0.3)
        return self.proj(y.transpose(1, 2).reshape(-1, 64, 64)).mean(1)


@pytest.mark.parametrize(
    ("target", "integers"), [("openvino-x86", True), pytest.param("ort-x86-vnni", False, marks=pytest.mark.slow)]
)
def test_products_of_two_activations_run_in_integers_where_the_target_says_so(
    tmp_path: Path, target: str, integers: bool
) -> None:
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text() and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no VNNI, openvino may choose otherwise")
    torch.manual_seed(0)
    graph = capture(load_model(Attention().eval(), overrides={"input_size": (3, 32, 32)}))
    stats = observe(graph, [torch.randn(8, 3, 32, 32)])
    plan = plan_for(graph, stats, load_target(target), recipe_named("minmax"), everything=True)
    zeros = {role: int(c.qparams.zero) for c in plan.choices.values() if (role := c.role) in ("query", "key", "value")}
    assert (set(zeros.values()) == {0}) == integers
    realize(graph, plan, tmp_path / "model.onnx", opset=20)
    nodes = OpenVino(tmp_path / "model.onnx", threads=1).precisions()
    products = {name: count for name, count in nodes.items() if name.split()[0] in ("Subgraph", "MatMul")}
    assert any(name.endswith(("i8", "u8")) for name in products) == integers, nodes


class ClassToken(nn.Module):
    """Two convolutions, and a token for every image: the graph reads the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 32)), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x))).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).mean(1))


@pytest.mark.parametrize("keep_float", [(), ("a",)])
def test_every_channel_has_its_own_bias(tmp_path: Path, openvino_target: str, keep_float: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    net = ClassToken().eval()
    with torch.no_grad():
        net.a.bias.normal_()
    graph, images = capture(load_model(net, overrides={"input_size": (3, 32, 32)})), torch.randn(8, 3, 32, 32)
    target = load_target(openvino_target)
    plan = plan_for(graph, observe(graph, [images]), target, recipe_named("minmax"), keep_float=keep_float)
    realize(graph, plan, tmp_path / "model.onnx", opset=target.opset)
    with torch.no_grad():
        expected = simulate(graph, plan)(images)
    found = torch.from_numpy(OpenVino(tmp_path / "model.onnx", threads=1).run(images.numpy())["logits"])
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_every_channel_has_its_own_bias_where_it_was_corrected(tmp_path: Path, openvino_target: str) -> None:
    torch.manual_seed(0)
    net = ClassToken().eval()
    with torch.no_grad():
        net.a.bias.normal_()
    graph, images = capture(load_model(net, overrides={"input_size": (3, 32, 32)})), torch.randn(8, 3, 32, 32)
    target, stats = load_target(openvino_target), observe(graph, [images])
    context = context_for(graph, stats, target)
    builder = PlanBuilder(choose(context, recipe_named("minmax")), context)
    builder.correct("a", net.a.bias.detach() + 0.01)
    plan = builder.plan()
    realize(graph, plan, tmp_path / "model.onnx", **target.file_format)
    checks = compare(graph, plan, tmp_path / "model.onnx", [images], runtime="openvino")
    assert (checks.wrong, checks.wrong_outputs) == ((), ())


class Shared(nn.Module):
    """A convolution without a bias that a convolution and an addition read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.relu(x)) + x


def test_a_product_without_a_bias_that_two_nodes_read_is_scaled_once(tmp_path: Path, openvino_target: str) -> None:
    torch.manual_seed(0)
    _, checks = _checked(Shared(), tmp_path, openvino_target, size=16)
    assert [check.compared for check in checks.on if check.site == "b:input"] == [8 * 16 * 16 * 16]
    assert not checks.wrong
    assert not any(check.wrong for check in checks.outputs)


class Grouped(nn.Module):
    """A padded convolution in groups of 24 channels behind a GELU, on 7 by 7 places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 72, 1), nn.Conv2d(72, 72, 3, padding=1, groups=3), nn.Conv2d(72, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(nn.functional.gelu(self.a(x))))


def test_groups_of_17_to_31_channels_read_codes_without_a_zero_point(tmp_path: Path, openvino_target: str) -> None:
    torch.manual_seed(0)
    plan, checks = _checked(Grouped(), tmp_path, openvino_target, size=7)
    assert "b" in plan.integer_ops
    assert not checks.wrong


class Joined(nn.Module):
    """Maps of two convolutions, joined and read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([nn.functional.silu(self.a(x)), nn.functional.silu(self.b(x))], 1))


@pytest.mark.parametrize("bits", [8, 5])
def test_the_codes_of_joined_maps_that_are_shown_are_those_that_are_used(
    tmp_path: Path, openvino_target: str, bits: int
) -> None:
    torch.manual_seed(0)
    plan, checks = _checked(Joined(), tmp_path, openvino_target, Bits(bits, bits))
    shown = [name + CODES for name, choice in plan.choices.items() if choice.codes is None]
    nodes = OpenVino(tmp_path / "model.onnx", threads=1, outputs=shown).precisions()
    assert {name for name in nodes if name.startswith("Concatenation")} == {"Concatenation u8"}
    assert not checks.wrong


class Normalized(nn.Module):
    """Small numbers, products of codes or a sum with codes, whose variance a norm's epsilon changes by a third."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 16, 1)
        self.groups, self.layer, self.c = nn.GroupNorm(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.other = nn.LayerNorm(16, eps=1e-6)
        self.a.weight.data *= 0.008

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "products":
            return self.b(self.groups(torch.relu(x)))
        if self.kind == "twice":
            x = torch.relu(x).flatten(2).transpose(1, 2)
            return self.c(self.layer(x)) + self.other(x)
        x = x + 0.003 * torch.sigmoid(self.b(x))
        return self.c(self.layer(x.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("kind", ["products", "twice", "codes"])
def test_a_norm_reads_real_numbers_and_not_codes(tmp_path: Path, openvino_target: str, kind: str) -> None:
    torch.manual_seed(0)
    assert not _checked(Normalized(kind), tmp_path, openvino_target)[1].wrong


class Pooled(nn.Module):
    """A mean over tokens or over a flattened map, with a batch norm behind or before it, in front of a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 48, 1), nn.Linear(48, 8)
        self.norm = nn.BatchNorm1d(48) if kind == "tokens" else nn.BatchNorm2d(48)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "tokens":
            return self.b(self.norm(x.flatten(2).transpose(1, 2).mean(1)))
        return self.b(self.norm(nn.functional.gelu(x)).flatten(2).mean(-1))


@pytest.mark.parametrize("kind", ["tokens", "map"])
def test_scales_by_channel_behind_a_mean_are_those_of_their_channels(tmp_path: Path, openvino_target: str, kind: str) -> None:
    torch.manual_seed(0)
    assert not _checked(Pooled(kind), tmp_path, openvino_target)[1].wrong


class Heads(nn.Module):
    """Attention whose queries, keys and values are parts of the channels of a convolution without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 192, 1, bias=False), nn.Conv2d(64, 8, 1)
        self.qkv.weight.data *= 0.1 + 3 * torch.rand(192, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.reshape(-1, 16, 64) for part in self.qkv(self.stem(x).relu()).split(64, 1))
        y = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
        return self.out(y.transpose(1, 2).reshape(-1, 64, 8, 8))


def test_parts_of_the_channels_of_a_product_without_a_bias_have_their_own_scales(tmp_path: Path, openvino_target: str) -> None:
    torch.manual_seed(0)
    _, checks = _checked(Heads(), tmp_path, openvino_target)
    assert not checks.wrong
    assert not any(check.wrong for check in checks.outputs)


class Near(nn.Module):
    """A map that a convolution reads, and that is joined with one whose numbers reach `more` times as far."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(32, 8, 1)
        self.b.weight.data, self.b.bias.data = more * self.a.weight.data, more * self.a.bias.data

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        return self.c(a) + self.d(torch.cat([a, self.b(x).relu()], 1))


@pytest.mark.parametrize(("more", "near"), [(1.003, True), (1.01, False)])
def test_a_part_whose_step_is_almost_that_of_the_whole_has_it(
    tmp_path: Path, openvino_target: str, more: float, near: bool
) -> None:
    torch.manual_seed(0)
    plan, checks = _checked(Near(more), tmp_path, openvino_target)
    assert not checks.wrong
    part, whole = (plan.choices[name].qparams for name in ("a:output", "concat:output"))
    assert (part == whole) is near


def _checked(net: nn.Module, folder: Path, name: str, bits: Bits | None = None, size: int = 8) -> tuple[Plan, Checks]:
    """The plan of a net for openvino, on images of `size`, and what verify says of its file."""
    graph = capture(load_model(net.eval(), overrides={"input_size": (3, size, size)}))
    images, target = torch.randn(8, 3, size, size), load_target(name)
    plan = plan_for(graph, observe(graph, [images]), target, recipe_named("minmax"), bits=bits or Bits())
    realize(graph, plan, folder / "model.onnx", **target.file_format)
    return plan, compare(graph, plan, folder / "model.onnx", [images], runtime="openvino")


def _two_nodes(folder: Path, first: NodeProto, constants: Mapping[str, np.ndarray], *shapes: tuple[int, ...]) -> Path:
    """A file of a node that reads inputs x, grid, ... of these shapes, and a convolution behind it."""
    size = (1,) * len(shapes[0])
    nodes = [first, helper.make_node("Conv", ["inside", "w"], ["y"], "/conv")]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(("x", "grid"), shapes, strict=False)]
    stored = [numpy_helper.from_array(np.ones((2, 4, *size[2:]), np.float32), "w")]
    stored += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", ports, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "net.onnx")
    return folder / "net.onnx"


MAP, CROP = (1, 4, 8, 8), {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
TWICE, PART = np.float32([1, 1, 2, 2]), np.float32([0, 0, 0.1, 0.1, 1, 1, 0.9, 0.9])
NOT_TAKEN = {
    "wrap": (
        helper.make_node("Pad", ["x", "pads"], ["inside"], "/pad", mode="wrap"), {"pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1])},
        (MAP,), r"it does not take Pad '/pad': Unsupported padding mode: \[wrap\]\.",
    ),
    "no name": (
        helper.make_node("Pad", ["x", "pads"], ["inside"], mode="wrap"), {"pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}, (MAP,),
        r"it does not take Pad 'inside': ",
    ),
    "volume": (
        helper.make_node("GridSample", ["x", "grid"], ["inside"], "/grid"), {}, ((1, 4, 4, 4, 4), (1, 3, 3, 3, 3)),
        r"it does not take GridSample '/grid': GridSample is only supported for 4D input tensors\. Got rank: 5\.",
    ),
    "crop": (
        helper.make_node("Resize", ["x", "part", "scales"], ["inside"], "/crop", **CROP), {"part": PART, "scales": TWICE},
        (MAP,), r"it does not take Resize '/crop': tf_crop_and_resize - this type of coordinate transformation mode is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_node_that_openvino_does_not_take_is_named_and_not_those_behind_it(tmp_path: Path, name: str) -> None:
    node, constants, shapes, said = NOT_TAKEN[name]
    path = _two_nodes(tmp_path, node, constants, *shapes)
    onnxruntime.InferenceSession(path)  # nothing is wrong with the file
    with pytest.raises(BadFile, match=rf"^openvino cannot load .*net\.onnx: {said}.* Choose a target of another") as found:
        OpenVino(path)
    assert "/conv" not in str(found.value)
    assert "Conv-" not in str(found.value)


class Halved(nn.Module):
    """A map at half the size, with the mean of the pixels around where `antialias` asks for it."""

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.conv, self.antialias = nn.Conv2d(3, 2, 3), antialias

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=self.antialias)
        return self.conv(x).mean((2, 3))


CIRCULAR = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 2))
AROUND = r"^openvino cannot load float\.onnx: it does not take Pad '.*pad.*': .*\[wrap\]\. Choose a target of another runtime"
WRONGLY = r"^openvino computes the float model wrongly \(logits differs by .*; onnxruntime computes it rightly\)"
BEFORE: dict[str, tuple[nn.Module, str, AbstractContextManager[object]]] = {
    "another runtime": (CIRCULAR, "ort-x86-vnni", nullcontext()),
    "not taken": (CIRCULAR, "openvino-x86", pytest.raises(BadModel, match=AROUND)),
    "right": (Halved(antialias=False), "openvino-x86", nullcontext()),
    "wrong": (Halved(antialias=True), "openvino-x86", pytest.raises(FewbitFailed, match=WRONGLY)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_openvino_does_not_compute_is_refused_by_what_comes_before_observe(name: str) -> None:
    net, target, refused = BEFORE[name]
    images = np.random.default_rng(0).random((24, 3, 8, 8), np.float32)
    names = [stage.name for stage in STAGES]
    assert names.index("twin") < names.index("observe")
    with Run.start(Request(model=net.eval(), images=images, input_size=(3, 8, 8), target=target), STAGES) as run, refused:
        run.do("twin")


def test_an_operator_that_openvino_has_not_is_named(tmp_path: Path) -> None:
    node = helper.make_node("DeformConv", ["x", "w", "o"], ["y"])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (1, 1, 4, 4)), ("o", (1, 2, 4, 4)))]
    weight = helper.make_tensor("w", TensorProto.FLOAT, (1, 1, 1, 1), [1.0])
    gives = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 4, 4))]
    graph = helper.make_graph([node], "net", infos, gives, [weight])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    with pytest.raises(
        BadFile, match=r"^openvino cannot load .*net\.onnx: it has no DeformConv \(opset 19\)\. Choose a target of"
    ):
        OpenVino(path)
    path.write_bytes(b"no model")
    with pytest.raises(BadFile) as found:
        OpenVino(path)
    assert ".cpp" not in str(found.value)
    assert len(str(found.value)) > len(f"openvino cannot load {path}: ")
