"""Images of any size: the files keep height and width free where the model does, and other sizes are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from bench.ablations import ABLATIONS
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from fewbit.capture import capture
from fewbit.choose import Context, choose
from fewbit.core.checks import Checks
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.errors import BadModel
from fewbit.folder import EXPORTED
from fewbit.load import Loaded, load_model
from fewbit.load.program import graph_module
from fewbit.load.sizes import Sizes
from fewbit.observe import observe
from fewbit.onnx_reader import read_onnx
from fewbit.realize import float_onnx, realize
from fewbit.request import Request
from fewbit.stages.capture import reopened
from fewbit.stages.load import Inputs, described, load
from fewbit.stages.twin import at_other_sizes
from fewbit.target import load_target
from fewbit.verify import compare, twin_checks
from onnx_reader.test_microsoft import drawn

WAYS = ("as written", "onnxruntime, codes shown", "onnxruntime, as it ships")
SIZE = (3, 16, 24)
OTHERS = ((3, 20, 20), (3, 24, 48), (3, 32, 16), (3, 48, 88))  # 17 x 27 is no size that the net takes, nor 14 x 26


def segmenter(folder: Path) -> Path:
    """Two convolutions, the second resized to the size of the first and joined, the result to the size of the image."""
    nodes = [
        helper.make_node("Conv", ["picture", "w"], ["a"], "/stem/Conv", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], "/down/Conv", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Resize", ["d", "", "twice"], ["e"], mode="nearest", coordinate_transformation_mode="asymmetric",
                         nearest_mode="floor"),
        helper.make_node("Concat", ["b", "e"], ["f"], axis=1),
        helper.make_node("Conv", ["f", "u"], ["g"], "/head/Conv"),
        helper.make_node("Shape", ["picture"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["sides"]),
        helper.make_node("Concat", ["two_maps", "sides"], ["target"], axis=0),
        helper.make_node("Resize", ["g", "", "", "target"], ["mask"], mode="linear"),
        helper.make_node("Reshape", ["g", "rows"], ["tokens"]),
    ]  # fmt: skip
    reals = {"w": drawn(4, 3, 3, 3), "v": drawn(4, 4, 3, 3), "u": drawn(2, 8, 1, 1), "twice": np.float32([1, 1, 2, 2])}
    whole = {"two": [2], "four": [4], "two_maps": [1, 2], "rows": [1, 2, -1]}
    stored = [numpy_helper.from_array(a, n) for n, a in reals.items()]
    stored += [numpy_helper.from_array(np.int64(a), n) for n, a in whole.items()]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, "H", "W"])],
        [helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 2, "H", "W"]),
         helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, 2, "places"])], stored,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "given.onnx")
    return folder / "given.onnx"


def planned(graph: Graph, target: str) -> Plan:
    batches = torch.from_numpy(drawn(4, *graph.input_shape)).split(graph.at_a_time(4))
    context = Context(graph, observe(graph, batches), load_target(target), images=batches, everything=True)
    return choose(context, ABLATIONS["minmax"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load_model(str(segmenter(folder)), overrides={"input_size": SIZE})


@pytest.fixture(scope="module")
def graph(loaded: Loaded, folder: Path) -> Graph:
    graph = capture(loaded)
    float_onnx(graph, folder / "float.onnx", opset=20)
    return graph


@pytest.fixture(scope="module")
def plan(graph: Graph, folder: Path, ort_target: str) -> Plan:
    plan = planned(graph, ort_target)
    realize(graph, plan, folder / "model.onnx", **load_target(ort_target).file_format)
    return plan


def compared(graph: Graph, plan: Plan, path: Path) -> Checks:
    sample = torch.from_numpy(drawn(2, *SIZE))
    return compare(graph, plan, path, sample.split(1), others=at_other_sizes(graph, sample))


def ports(path: Path) -> list[tuple[str, str, list[object]]]:
    session = onnxruntime.InferenceSession(path)
    return [(port.name, port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())]


def test_the_files_have_the_free_sizes_of_the_file_that_went_in_under_their_names(plan: Plan, folder: Path) -> None:
    assert ports(folder / "model.onnx") == ports(folder / "float.onnx") == ports(folder / "given.onnx")


@pytest.mark.parametrize("sides", [(16, 24), (32, 16), (64, 40)])
def test_the_float_file_gives_what_the_file_that_went_in_gives_at_any_size(
    graph: Graph, folder: Path, sides: tuple[int, int]
) -> None:
    images = {"picture": drawn(1, 3, *sides)}
    given, twin = (onnxruntime.InferenceSession(folder / f"{n}.onnx").run(None, images) for n in ("given", "float"))
    for a, b in zip(given, twin, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_codes_and_outputs_are_compared_at_other_sizes(loaded: Loaded, graph: Graph, plan: Plan, folder: Path) -> None:
    (image,) = graph.inputs
    assert (image.others, image.free) == (OTHERS, (1, 2))
    checks = compared(graph, plan, folder / "model.onnx")
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    places = [check.place for check in checks.outputs]
    assert [places.count(f"as written, {high} x {wide}") for _, high, wide in OTHERS] == [2] * 4
    stem = next(check for check in checks.off if check.site == "stem:input")
    assert stem.compared == 2 * 3 * 16 * 24 + sum(math.prod(other) for other in OTHERS)
    *_, (where, batches) = at_other_sizes(graph, torch.from_numpy(drawn(2, *SIZE))).items()
    outputs = twin_checks(loaded.program, graph.inputs, folder / "float.onnx", "onnxruntime", batches, where)
    assert [(check.place, check.wrong) for check in outputs] == [("float.onnx in onnxruntime, 48 x 88", False)] * 2


def test_a_file_that_is_wrong_at_another_size_alone_is_found(graph: Graph, plan: Plan, folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "Resize" and node.output[0] == "mask":  # by a factor that is right at one size alone
            model.graph.initializer.append(numpy_helper.from_array(np.int64([1, 2, 16, 24]), "fixed"))
            node.input[-1] = "fixed"
    onnx.save(model, folder / "fixed.onnx")
    wrong = {(check.place, check.output) for check in compared(graph, plan, folder / "fixed.onnx").wrong_outputs}
    assert wrong == {(f"{way}, {high} x {wide}", "mask") for way in WAYS for _, high, wide in OTHERS}


def test_a_run_is_opened_with_its_sizes(loaded: Loaded, tmp_path: Path) -> None:
    torch.export.save(loaded.program, tmp_path / EXPORTED)
    record = {
        "inputs": [described(one) for one in loaded.inputs], "batch": 1, "preprocess": {"size": list(SIZE)},
        "task": "tensors", "classes": None,
        "ports": [[port.name, port.type, list(port.dims)] for port in loaded.ports],
    }  # fmt: skip
    graph, _ = reopened(tmp_path, record)
    assert [(one.shape, one.others) for one in graph.inputs] == [(SIZE, OTHERS)]


class Wide(nn.Module):
    """A row of embeddings for each row of the map: any width, one height."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.rows = nn.Parameter(torch.randn(4, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.rows


class Remainder(nn.Module):
    """What is added depends on the remainder of the width, which the sizes that are tried show."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y if x.shape[3] % 4 == 0 else y + 1


class Beyond(nn.Module):
    """What is given is doubled where the sizes are large."""

    def __init__(self, large: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.stem, self.large = nn.Conv2d(3, 4, 3, 1, 1), large

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y * 2 if self.large(*x.shape[2:]) else y


@pytest.mark.parametrize(
    ("large", "limit"),
    [(lambda high, wide: high > 200, "height <= 200"), (lambda high, wide: high * wide > 65536, "height*width <= 65536")],
)
def test_sizes_at_which_a_model_is_another_one_are_said(large: Callable[[int, int], bool], limit: str, tmp_path: Path) -> None:
    net = Beyond(large).eval()
    loaded = load_model(net, overrides={"input_size": SIZE}, sizes=Sizes.ANY)
    (said,) = loaded.inputs[0].limits
    assert said.replace(" * ", "*").replace("width*height", "height*width") == limit
    assert f"Beyond {said} the model is another one" in loaded.notes[0]
    assert described(loaded.inputs[0])["limits"] == [said]
    path = tmp_path / "model.pt2"
    torch.export.save(loaded.program, path)
    run = graph_module(loaded.program)
    for size in ((200, 327), (201, 20), (256, 256), (257, 256), (8, 9000)):  # the limit is where the program leaves the model
        images = torch.rand(1, 3, *size)
        with torch.no_grad():
            is_same = torch.allclose(net(images), run(images))
        assert is_same == (not large(*size))
    assert load_model(str(path), overrides={"input_size": SIZE}).inputs[0].limits == (said,)


def test_a_module_has_any_size_where_it_is_asked_for(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    loaded = load_model(net, overrides={"input_size": SIZE}, sizes=Sizes.ANY)
    assert loaded.notes[0].endswith(
        "; the files that come out leave height and width free as well, and are compared at 16 x 24, 17 x 27, 14 x 26, "
        "20 x 20, 24 x 48, 32 x 16, 48 x 88. Other sizes are not looked at."
    )
    float_onnx(capture(loaded), tmp_path / "float.onnx", opset=20)
    assert ports(tmp_path / "float.onnx")[0][2] == ["batch", 3, "height", "width"]
    images = drawn(2, 3, 31, 9)
    (got,) = onnxruntime.InferenceSession(tmp_path / "float.onnx").run(None, {"images": images})
    np.testing.assert_allclose(got, net(torch.from_numpy(images)).detach(), rtol=1e-4, atol=1e-5)


def test_a_module_has_those_sizes_free_that_it_can() -> None:
    (image,) = load_model(Wide().eval(), overrides={"input_size": SIZE}, sizes=Sizes.ANY).inputs
    assert (image.free, image.others[:2]) == ((2,), ((3, 16, 27), (3, 16, 26)))


def test_a_size_that_is_written_in_the_model_is_refused() -> None:
    with pytest.raises(BadModel, match=r"^Remainder takes images of 16 x 24 alone: others .* Leave --dynamic-size out\.$"):
        load_model(Remainder().eval(), overrides={"input_size": SIZE}, sizes=Sizes.ANY)


class Pooled(nn.Module):
    """A pooling behind a stride of 2: adaptive to 3 x 3, or with sizes rounded up, whose numbers torch.onnx writes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.kind = nn.Conv2d(3, 4, 3, 2, 1), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return F.adaptive_avg_pool2d(y, 3) if self.kind == "adaptive" else F.avg_pool2d(y, 2, ceil_mode=True)


def asked(model: Any, size: int, **options: Any) -> Inputs:
    return load(Request(model=model, images=list(torch.rand(4, 3, size, size)), input_size=(3, size, size), **options))


@pytest.mark.parametrize(("kind", "size"), [("adaptive", 18), ("adaptive", 24), ("rounded up", 24)])
def test_sizes_are_refused_where_torch_onnx_writes_the_windows_of_one(kind: str, size: int) -> None:
    with pytest.raises(
        BadModel, match=rf"^Pooled takes images of {size} x {size} alone: others .* Leave --dynamic-size out\.$"
    ):
        asked(Pooled(kind).eval(), size, dynamic_size=True)


def with_windows(folder: Path, op: str, **options: Any) -> Path:
    """An ONNX file for any size: a convolution with a stride of 2, and behind it one or a pooling with these options."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "stem", strides=[2, 2], pads=[1] * 4),
        helper.make_node(op, ["a", *{"Conv": ["v"], "Pad": ["ends"]}.get(op, [])], ["y"], "window", **options),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, f"{n}h", f"{n}w"]) for n, c in (("x", 3), ("y", 4))]
    stored = [numpy_helper.from_array(drawn(*shape), name) for name, shape in (("w", (4, 3, 3, 3)), ("v", (4, 4, 3, 3)))]
    stored += [numpy_helper.from_array(np.int64([0, 0, 1, 2, 0, 0, 2, -1]), "ends")]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "windows.onnx")
    return folder / "windows.onnx"


@pytest.mark.parametrize("size", [26, 29])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("MaxPool", {"auto_pad": "SAME_UPPER", "kernel_shape": [3, 3], "strides": [2, 2]}),
        ("AveragePool", {"ceil_mode": 1, "kernel_shape": [3, 3], "strides": [2, 2]}),
    ],
)  # fmt: skip
def test_a_file_of_any_size_is_right_at_the_sizes_that_are_left_free_or_keeps_the_one(
    tmp_path: Path, op: str, options: dict[str, Any], size: int
) -> None:
    given = with_windows(tmp_path, op, **options)
    loaded = asked(str(given), size).loaded
    float_onnx(capture(loaded), tmp_path / "float.onnx", opset=20)
    sizes = [(size, size)]
    if loaded.inputs[0].free:
        sizes += [(40, 56), (36, 37), (23, 28)]
    else:
        assert f"the files that come out take {size} x {size} alone" in loaded.notes[-1]
        assert ports(tmp_path / "float.onnx")[0][2] == ["N", 3, size, size]
    for high, wide in sizes:
        images = {"x": drawn(2, 3, high, wide)}
        want, got = (onnxruntime.InferenceSession(path).run(None, images)[0] for path in (given, tmp_path / "float.onnx"))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_a_file_that_pads_with_the_image_takes_any_batch_and_size(tmp_path: Path, mode: str) -> None:
    given = with_windows(tmp_path, "Pad", mode=mode)
    loaded = asked(str(given), 16).loaded
    assert (loaded.batch, loaded.inputs[0].free, len(loaded.notes)) == (None, (1, 2), 1)
    float_onnx(capture(loaded), tmp_path / "float.onnx", opset=20)
    for shape in ((1, 3, 16, 16), (5, 3, 31, 18)):
        images = {"x": drawn(*shape)}
        want, got = (onnxruntime.InferenceSession(path).run(None, images)[0] for path in (given, tmp_path / "float.onnx"))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_program_whose_sizes_were_not_looked_at_is_opened_with_the_one_that_it_was_made_for() -> None:
    free = {0: Dim("batch"), 2: Dim("h", min=8), 3: Dim("w", min=8)}
    program = torch.export.export(Pooled("adaptive").eval(), (torch.zeros(2, 3, 18, 18),), dynamic_shapes=(free,))
    loaded = asked(program, 24).loaded
    assert (loaded.inputs[0].shape, loaded.inputs[0].others) == ((3, 24, 24), ())
    assert loaded.notes[-1].endswith(
        "the files that come out take 24 x 24 alone: others cannot be exported, or give other numbers."
    )


def test_a_program_of_any_size_is_told_one() -> None:
    net, free = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), {0: Dim("batch"), 2: Dim("h", min=8), 3: Dim("w", min=8)}
    program = torch.export.export(net, (torch.zeros(2, *SIZE),), dynamic_shapes=(free,))
    with pytest.raises(BadModel, match=r"was exported for any height and width\. Say one size: --input-size"):
        load_model(program)
    (image,) = load_model(program, overrides={"input_size": (3, 12, 12)}).inputs
    assert (image.shape, image.others[:2]) == ((3, 12, 12), ((3, 13, 15), (3, 10, 14)))


def resizing(mode: str, where: str, rounding: str, given: str) -> onnx.ModelProto:
    """One Resize, two and three times as large, by constant scales or by sizes that are computed."""
    options = {"mode": mode, "coordinate_transformation_mode": where, "nearest_mode": rounding}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "times"], ["sizes"]),
        helper.make_node("Resize", ["x", "", *([given] if given == "scales" else ["", given])], ["y"], **options),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, f"{n}h", f"{n}w"]) for n in "xy"]
    times = {"scales": np.float32([1, 1, 2, 3]), "times": np.int64([1, 1, 2, 3])}
    stored = [numpy_helper.from_array(array, name) for name, array in times.items()]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


RULES = [  # mode, where pixels lie, rounding, the sizes, and whether torch has the rule for every size
    ("nearest", "asymmetric", "floor", "scales", True), ("nearest", "asymmetric", "floor", "sizes", True),
    ("nearest", "half_pixel", "round_prefer_floor", "scales", True), ("nearest", "half_pixel", "floor", "scales", False),
    ("nearest", "half_pixel", "round_prefer_floor", "sizes", False), ("linear", "half_pixel", "floor", "scales", True),
    ("linear", "pytorch_half_pixel", "floor", "sizes", True), ("linear", "align_corners", "floor", "sizes", True),
    ("linear", "asymmetric", "floor", "scales", False), ("cubic", "half_pixel", "floor", "scales", True),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule[:4]))
def test_maps_of_any_size_are_resized_as_onnxruntime_resizes_them_or_not_at_all(
    tmp_path: Path, rule: tuple[str, str, str, str, bool]
) -> None:
    *options, same = rule
    onnx.save(resizing(*options), tmp_path / "resize.onnx")
    module, free = read_onnx(tmp_path / "resize.onnx").module, {2: Dim.AUTO, 3: Dim.AUTO}
    if not same:
        with pytest.raises(BadModel, match=f"torch does not resize maps of any size by {rule[0]}, {rule[1]}"):
            torch.export.export(module, (torch.zeros(1, 3, 8, 8),), dynamic_shapes=((free,),))
        return
    program, images = torch.export.export(module, (torch.zeros(1, 3, 8, 8),), dynamic_shapes=((free,),)), drawn(1, 3, 5, 7)
    (want,) = onnxruntime.InferenceSession(tmp_path / "resize.onnx").run(None, {"x": images})
    got = program.module(check_guards=False)(torch.from_numpy(images))["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
