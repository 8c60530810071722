"""Files that end in what torch cannot express: the layers are quantized, the tail stays as it is behind them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bench.ablations import ABLATIONS
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fewbit.capture import capture
from fewbit.choose import Context, choose
from fewbit.core.checks import SiteCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import ALONE
from fewbit.core.plan import Plan
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.errors import BadModel, CannotRun, FewbitFailed
from fewbit.load import Loaded, load_model
from fewbit.load.inputs import Given
from fewbit.observe import observe
from fewbit.onnx_reader import read_onnx
from fewbit.realize import float_onnx, realize
from fewbit.run import Run, quantize
from fewbit.runtimes import OpenVino
from fewbit.stages import twin as twins
from fewbit.stages.tail import fitted, read_tail, write_tail
from fewbit.target import load_target
from fewbit.verify import compare, deviations, tail_checks, twin_checks
from fewbit.verify import tail as tails
from fewbit.verify.evaluate import _Files, _run
from fewbit.verify.tail import shared
from onnx_reader.test_microsoft import drawn

SIZE = (3, 16, 16)
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Ports = Sequence[tuple[str, int, Sequence[object] | None]]
node, port = helper.make_node, helper.make_tensor_value_info

BODY = [  # one map of 4 x 4 for boxes and one for scores, (batch, 16, 4) and (batch, 2, 16)
    node("Conv", ["image", "w"], ["a"], "/stem/Conv", strides=[2, 2], pads=[1] * 4),
    node("Relu", ["a"], ["b"]),
    node("Conv", ["b", "v"], ["c"], "/box/Conv", strides=[2, 2], pads=[1] * 4),
    node("Conv", ["b", "u"], ["d"], "/score/Conv", strides=[2, 2], pads=[1] * 4),
    node("Reshape", ["c", "four"], ["e"]),
    node("Transpose", ["e"], ["f"], perm=[0, 2, 1]),
    node("Add", ["f", "anchors"], ["boxes"], "/boxes"),
    node("Reshape", ["d", "two"], ["scores"], "/scores"),
]
NMS = [
    node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["chosen"], "/nms"),
    node("Gather", ["chosen", "last"], ["places"], "/places", axis=1),
    node("Gather", ["boxes", "first"], ["of one"], "/of_one", axis=0),
    node("Gather", ["of one", "places"], ["picked"], "/picked", axis=0),
]
OF_NMS: Ports = [("picked", FLOAT, ["n", 4]), ("scores", FLOAT, ["batch", 2, 16]), ("chosen", INT64, ["n", 3])]


def file(
    folder: Path, nodes: Sequence[NodeProto], outputs: Ports, *, batch: object = 1, opset: int = 17, inputs: Ports = (),
    domains: Sequence[str] = (), half: bool = False,
) -> Path:  # fmt: skip
    corners = np.random.default_rng(2).random((1, 16, 2), dtype=np.float32) * 4
    reals = {
        "w": 0.5 * drawn(4, 3, 3, 3), "v": 0.2 * drawn(4, 4, 3, 3), "u": 0.5 * drawn(2, 4, 3, 3), "iou": [0.5], "least": [0.0],
        "anchors": np.concatenate([corners, corners + 2], -1),
    }  # fmt: skip
    whole = {"four": [0, 4, -1], "two": [0, 2, -1], "most": [5], "last": 2, "first": 0, "three": [3]}
    stored = [numpy_helper.from_array(np.float32(a), n) for n, a in reals.items()]
    stored += [numpy_helper.from_array(np.int64(a), n) for n, a in whole.items()]
    graph = helper.make_graph(
        [*BODY, *nodes], "net", [port("image", FLOAT, [batch, *SIZE]), *(port(*one) for one in inputs)],
        [port(n, kind, [batch if d == "batch" else d for d in dims or ()]) for n, kind, dims in outputs], stored,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(in_halves(model) if half else model, folder / "given.onnx")
    return folder / "given.onnx"


def in_halves(model: ModelProto) -> ModelProto:
    """The same in float16, but for the two numbers that NonMaxSuppression takes in float32 alone, with Casts in front of it."""
    for one in [t for t in model.graph.initializer if t.data_type == FLOAT and t.name not in ("iou", "least")]:
        one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one).astype(np.float16), one.name))
    for info in [p for p in (*model.graph.input, *model.graph.output) if p.type.tensor_type.elem_type == FLOAT]:
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    place = next(i for i, one in enumerate(model.graph.node) if one.op_type == "NonMaxSuppression")
    for name in ("boxes", "scores"):
        model.graph.node.insert(place, node("Cast", [name], [f"{name} real"], f"/{name}/Cast", to=FLOAT))
    model.graph.node[place + 2].input[:2] = ["boxes real", "scores real"]
    return model


def loaded_of(path: Path, given: Given | None = None) -> Loaded:
    return fitted(load_model(str(path), given=given or Given()), 20, "onnxruntime")


def outputs_of(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    types = {"tensor(float16)": np.float16}
    given = {p.name: inputs[p.name].astype(types.get(p.type, inputs[p.name].dtype)) for p in session.get_inputs()}
    return session.run(None, given)  # type: ignore[no-any-return]


def ports_of(path: Path) -> list[tuple[str, str, list[object]]]:
    session = onnxruntime.InferenceSession(path)
    return [(one.name, one.type, one.shape) for one in (*session.get_inputs(), *session.get_outputs())]


def branch(name: str, nodes: Sequence[NodeProto], *, gives: Ports, takes: Ports = ()) -> GraphProto:
    return helper.make_graph(nodes, name, [port(*one) for one in takes], [port(*one) for one in gives])


LOOP = [  # adds the boxes three times to themselves: a value of the layers, read inside
    node("Loop", ["three", "", "boxes"], ["sum"], "/loop", body=branch(
        "body", [node("Identity", ["go"], ["on"]), node("Add", ["so far", "boxes"], ["more"])],
        takes=[("i", INT64, []), ("go", BOOL, []), ("so far", FLOAT, None)], gives=[("on", BOOL, []), ("more", FLOAT, None)],
    )),
]  # fmt: skip
IF = [  # by the largest score, as an If of the image
    node("ReduceMax", ["scores"], ["top"], "/top", keepdims=0),
    node("Greater", ["top", "bound"], ["is"], "/is"),
    node("If", ["is"], ["answer"], "/if", then_branch=branch("y", [node("Neg", ["boxes"], ["y"])], gives=[("y", FLOAT, None)]),
         else_branch=branch("no", [node("Abs", ["boxes"], ["z"])], gives=[("z", FLOAT, None)])),
]  # fmt: skip
BOUND = [node("Constant", [], ["bound"], value=numpy_helper.from_array(np.float32(1.5)))]
TOPK = [  # chooses for the tail alone: with rounding it chooses otherwise
    node("ReduceMax", ["scores"], ["best"], "/best", axes=[1], keepdims=0),
    node("TopK", ["best", "three"], ["tops", "where"], "/topk", axis=1),
    node("Gather", ["where", "first"], ["kept"], "/kept", axis=0),
    node("Gather", ["boxes", "kept"], ["some"], "/some", axis=1),
    node("Gather", ["scores", "kept"], ["their"], "/their", axis=2),
    node("NonMaxSuppression", ["some", "their", "most", "iou", "least"], ["chosen"], "/nms"),
]  # fmt: skip
OF_LOOP: Ports = [("sum", FLOAT, ["batch", 16, 4])]
OF_IF: Ports = [("answer", FLOAT, ["batch", 16, 4]), ("boxes", FLOAT, ["batch", 16, 4])]
ALL = {"/nms", "/places", "/of_one", "/picked"}
CASES: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "nms": (lambda f: file(f, NMS, OF_NMS), ALL),
    "any batch": (lambda f: file(f, NMS, OF_NMS, batch="N", opset=11), ALL),
    "unnamed batch": (lambda f: file(f, NMS, OF_NMS, batch=None), ALL),
    "float16": (lambda f: file(f, NMS, OF_NMS, half=True), ALL),
    "loop": (lambda f: file(f, LOOP, OF_LOOP), {"/loop"}),
    "if": (lambda f: file(f, [*BOUND, *IF], OF_IF), {"/top", "/is", "/if"}),
    "topk": (
        lambda f: file(f, TOPK, [("chosen", INT64, ["n", 3]), ("tops", FLOAT, ["batch", 3])]),
        {"/topk", "/kept", "/some", "/their", "/nms"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_layers_and_the_tail_give_what_the_file_gives(tmp_path: Path, name: str) -> None:
    made, carried = CASES[name]
    given = made(tmp_path)
    read = read_onnx(given)
    assert read.tail is not None
    assert {row["node"] for row in read.tail.nodes} == carried
    write_tail(read.tail, tmp_path)
    assert read_tail(tmp_path) == read.tail
    for image in drawn(3, 1, *SIZE).astype(np.float16).astype(np.float32):
        values = {k: v.numpy() for k, v in read.module(torch.from_numpy(image).float()).items()}
        want, got = outputs_of(given, image=image), outputs_of(tmp_path / "tail.onnx", image=image, **values)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3 if name == "float16" else 1e-5, atol=5e-3 if name == "float16" else 1e-5)


@pytest.mark.parametrize("name", ["any batch", "float16"])
def test_the_float_file_takes_the_place_of_the_one_that_went_in(tmp_path: Path, name: str) -> None:
    given, twin = CASES[name][0](tmp_path), tmp_path / "float.onnx"
    loaded = loaded_of(given)
    graph = capture(loaded)
    float_onnx(graph, twin, opset=20)
    assert ports_of(twin) == ports_of(given)
    images = drawn(3, 1, *SIZE).astype(np.float16).astype(np.float32)
    for image in images:
        for a, b in zip(outputs_of(given, image=image), outputs_of(twin, image=image), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3 if name == "float16" else 1e-5, atol=5e-3 if name == "float16" else 1e-5)
    checks = twin_checks(loaded.program, graph.inputs, twin, "onnxruntime", list(torch.from_numpy(images)))
    assert not [check for check in checks if check.wrong]
    assert not [check for check in tail_checks(graph, twin, "onnxruntime", list(torch.from_numpy(images))) if check.wrong]


@dataclass(frozen=True)
class Made:
    """A detector, its integer file, and where both lie."""

    graph: Graph
    plan: Plan
    path: Path

    def checks(self, path: Path | None = None) -> tuple[list[SiteCheck], list[tuple[str, str]]]:
        """Codes that are wrong, and the places of wrong outputs."""
        images, path = torch.from_numpy(drawn(2, *SIZE)).split(1), path or self.path
        checks = compare(self.graph, self.plan, path, images, runtime="onnxruntime")
        behind = tail_checks(self.graph, path, "onnxruntime", images)
        return list(checks.wrong), [(check.place, check.output) for check in (*checks.outputs, *behind) if check.wrong]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ort_target: str) -> Made:
    folder = tmp_path_factory.mktemp("tail")
    graph, target = capture(loaded_of(file(folder, NMS, OF_NMS))), load_target(ort_target)
    batches = torch.from_numpy(drawn(4, *SIZE)).split(1)
    plan = choose(Context(graph, observe(graph, batches), target, images=batches, everything=True), ABLATIONS["minmax"])
    realize(graph, plan, folder / "model.onnx", **target.file_format)
    return Made(graph, plan, folder / "model.onnx")


def test_codes_and_outputs_of_the_file_with_its_tail_are_right(made: Made) -> None:
    assert made.graph.behind == ("picked", "chosen")
    assert made.graph.inside == ("boxes",)
    assert len(made.plan.integer_ops) >= 3
    assert made.checks() == ([], [])
    assert ports_of(made.path)[1:] == [
        ("picked", "tensor(float)", ["n", 4]), ("scores", "tensor(float)", [1, 2, 16]), ("chosen", "tensor(int64)", ["n", 3])
    ]  # fmt: skip


def test_a_tail_that_chooses_otherwise_is_found(made: Made, tmp_path: Path) -> None:
    model = onnx.load(made.path)
    next(one for one in model.graph.initializer if one.name == "most").CopyFrom(numpy_helper.from_array(np.int64([2]), "most"))
    onnx.save(model, tmp_path / "other.onnx")
    places = ("as written", "onnxruntime, as it ships")
    assert made.checks(tmp_path / "other.onnx") == ([], [(place, name) for place in places for name in ("picked", "chosen")])


def test_rows_are_shared_in_any_order() -> None:
    boxes = torch.tensor([[0.0, 10, 20, 30], [5, 5, 50, 50], [7, 8, 9, 10]])
    assert shared(boxes, boxes[[2, 0, 1]] + 0.1) == 1.0  # 2 % of 7 is 0.14
    assert shared(boxes, boxes[:2]) == pytest.approx(2 * 2 / 5)  # two of three, two of two
    assert shared(boxes.long(), boxes.long() + 1) == 0.0
    assert (shared(boxes[:0], boxes), shared(boxes[:0], boxes[:0])) == (0.0, 1.0)


def test_an_input_that_the_tail_alone_reads_stays_one(tmp_path: Path) -> None:
    nodes = [*NMS, node("Mul", ["picked", "scale"], ["in pixels"], "/pixels")]
    given = file(tmp_path, nodes, [("in pixels", FLOAT, ["n", 4])], inputs=[("scale", FLOAT, [1, 4])])
    scale = torch.tensor([[2.0, 3, 4, 5]])
    graph = capture(loaded_of(given, Given({"scale": scale})))
    float_onnx(graph, tmp_path / "float.onnx", opset=20)
    both = {"image": drawn(1, *SIZE), "scale": scale.numpy()}
    for a, b in zip(outputs_of(given, **both), outputs_of(tmp_path / "float.onnx", **both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert tail_checks(graph, tmp_path / "float.onnx", None, list(torch.from_numpy(drawn(2, 1, *SIZE))))[0].difference == 0


MAGIC = [node("Magic", ["boxes"], ["late"], "/magic", domain="my.own")]
DISTANCES = [  # of onnxruntime's own domain, and not in the tables
    node("Gather", ["boxes", "first"], ["of one"], "/of_one", axis=0),
    node("CDist", ["of one", "of one"], ["late"], "/distances", domain="com.microsoft", metric="euclidean"),
]  # fmt: skip
BETWEEN = [*NMS[:1], node("MatMul", ["chosen", "anchors"], ["late"], "/head/MatMul")]
LAYER_INSIDE = [*BOUND, *IF[:2], node(
    "If", ["is"], ["late"], "/if", then_branch=branch("y", [node("Conv", ["b", "v"], ["y"])], gives=[("y", FLOAT, None)]),
    else_branch=branch("n", [node("Conv", ["b", "u"], ["z"])], gives=[("z", FLOAT, None)]),
)]  # fmt: skip
NEWER = [*NMS[:1], node("CumProd", ["chosen", "last"], ["late"], "/all")]
REFUSED: dict[str, tuple[list[NodeProto], dict[str, Any], str, str]] = {
    "custom domain": (
        MAGIC, {"domains": ["my.own"]}, "onnxruntime",
        r"has my\.own\.Magic '/magic' \(opset 1\), which torch cannot express and onnxruntime cannot run: .*Choose a target of "
        r"another runtime, or cut .*extract_model\('.*given.onnx', 'front.onnx', \['image'\], \['boxes'\]\)",
    ),
    "another runtime's": (
        DISTANCES, {"domains": ["com.microsoft"]}, "openvino",
        r"has com\.microsoft\.CDist '/distances' .* torch .* openvino cannot run: it has no com\.microsoft\.CDist\. Choose",
    ),
    "newer": (
        NEWER, {"opset": 26}, "onnxruntime",
        r"from NonMaxSuppression '/nms' \(opset 26\) on; .* of opset 20, and onnx cannot convert these: No Previous Version",
    ),
    "between": (
        BETWEEN, {}, "onnxruntime", r"not taken, between its layers: NonMaxSuppression '/nms' \(opset 17\)\. .*extract_model\("
        r"'.*given.onnx', 'front.onnx', \['image'\], \['boxes', 'scores'\]\)",
    ),
    "layers inside": (LAYER_INSIDE, {}, "onnxruntime", r"between its layers: If '/if' \(opset 17\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    nodes, options, runtime, message = REFUSED[name]
    path = file(tmp_path, nodes, [("late", FLOAT, None)], **options)
    with pytest.raises(BadModel, match=message):
        fitted(load_model(str(path)), 20, runtime)


CHOSEN = [  # between the layers, from numbers without a batch, as a proposal network chooses its boxes
    *BOUND, node("Squeeze", ["scores", "front"], ["alone"], "/alone"), node("Greater", ["alone", "bound"], ["is"], "/is"),
    node("NonZero", ["is"], ["kept"], "/kept"), node("Cast", ["kept"], ["places"], "/cast", to=FLOAT),
    node("MatMul", ["places", "anchors"], ["late"], "/head/MatMul"), node("Squeeze", ["boxes", "front"], ["one"], "/one"),
    node("Gather", ["one", "kept"], ["some"], "/some", axis=0),
]  # fmt: skip


def test_the_cut_that_a_refusal_proposes_is_taken(tmp_path: Path) -> None:
    """It ends at values with a batch in front that no numbers choose, of every head."""
    zero = node("Constant", [], ["front"], value=numpy_helper.from_array(np.int64([0])))
    path = file(tmp_path, [zero, *CHOSEN], [("late", FLOAT, None), ("some", FLOAT, None), ("b", FLOAT, ["batch", 4, 8, 8])])
    with pytest.raises(BadModel, match=r"between its layers: NonZero '/kept'") as refused:
        load_model(str(path))
    said = str(refused.value).partition("extract_model(")[2].removesuffix(").")
    _, _, inputs, ends = ast.literal_eval(f"({said})")
    assert ends == ["scores", "boxes", "b"]
    onnx.utils.extract_model(str(path), str(tmp_path / "front.onnx"), inputs, ends)
    assert [one.name for one in load_model(str(tmp_path / "front.onnx")).outputs] == ends


def test_a_file_with_an_operator_of_onnxruntime_is_carried_there(tmp_path: Path) -> None:
    loaded = loaded_of(file(tmp_path, DISTANCES, [("late", FLOAT, None)], domains=["com.microsoft"]))
    assert loaded.tail is not None
    assert [row["why"] for row in loaded.tail.nodes] == ["belongs to such a node", "torch cannot express it"]
    assert "2 nodes stay, com.microsoft.CDist '/distances' (opset 1) and those about it, in float behind" in loaded.notes[-1]


def constant_node(name: str, *shape: int) -> NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(drawn(*shape), name))


@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_products_of_a_tail_count_as_float_work_of_one_image(tmp_path: Path, batch: object) -> None:
    """An LSTM with clip, which torch has not, over 16 places with 2 inputs and 3 hidden numbers, and a product with a matrix
    behind it, in closed form.
    """
    nodes = [
        constant_node("gates", 1, 12, 2), constant_node("own", 1, 12, 3), node("Transpose", ["scores"], ["s"], perm=[2, 0, 1]),
        node("LSTM", ["s", "gates", "own"], ["all", "last of all"], "/lstm", hidden_size=3, clip=9.0),
        node("Transpose", ["all"], ["rows"], perm=[2, 1, 0, 3]), node("Transpose", ["all"], ["columns"], perm=[2, 1, 3, 0]),
        node("MatMul", ["rows", "columns"], ["all rows"], "/rows"),
    ]  # fmt: skip
    given = file(tmp_path, nodes, [("scores", FLOAT, ["batch", 2, 16]), ("all rows", FLOAT, ["batch", 1, 16, 16])], batch=batch)
    graph = capture(loaded_of(given))
    found = {one.function: one.macs for one in graph.float_products}
    assert found == {"LSTM": 16 * (12 * 2 + 12 * 3), "MatMul": 16 * 16 * 3}
    assert graph.macs == sum(found.values()) + sum(op.macs for op in graph.ops)


FLATTENED = [  # what torch.onnx writes for a clip of boxes: onnxruntime cannot do it without any
    *NMS,
    node("Shape", ["picked"], ["size"]),
    node("Slice", ["size", "zero", "one"], ["n"]),
    node("Concat", ["n", "pairs"], ["to pairs"], axis=0),
    node("Concat", ["n", "rest"], ["to rows"], axis=0),
    node("Reshape", ["picked", "to pairs"], ["corners"], "/pairs"),
    node("Reshape", ["corners", "to rows"], ["flat"], "/flatten"),
]


def opened(images: np.ndarray) -> Images:
    return open_images(images, Preprocess(SIZE, mean=(0.5,), std=(0.25,)))


def with_numbers(path: Path, **numbers: np.ndarray) -> Path:
    """The file with initializers, new ones or in the place of others."""
    model = onnx.load(path)
    kept = [one for one in model.graph.initializer if one.name not in numbers]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in numbers.items())])
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("empty", "named"), [((3, 9), "on array:3 and 1 more "), ((9,), r"on array:9 \(of 12 ")])
def test_a_file_that_cannot_be_run_on_some_images_is_refused_before_the_work(
    tmp_path: Path, empty: tuple[int, ...], named: str
) -> None:
    whole = {"zero": [0], "one": [1], "pairs": [2, 2], "rest": [-1]}
    outputs: Ports = [("flat", FLOAT, ["n", "four"]), ("scores", FLOAT, ["batch", 2, 16])]
    path = with_numbers(
        file(tmp_path, FLATTENED, outputs), least=np.float32([0.5]), **{n: np.int64(a) for n, a in whole.items()}
    )
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    images[list(empty)] = 128  # no box
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for i, image in enumerate(images):
        x = (image[None].transpose(0, 3, 1, 2) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
        if i in empty:
            with pytest.raises(Exception, match="/flatten"):
                session.run(None, {"image": x})
        else:
            assert len(session.run(["flat"], {"image": x})[0])
    options = {"target": "ort-x86-vnni", "recipe": "minmax", "mean": [0.5], "std": [0.25], "quick": True}
    with pytest.raises(BadModel, match=named) as refused:
        quantize(str(path), 255 - np.delete(images, empty, 0), score=images, out=tmp_path / "run", **options)
    said = str(refused.value)
    assert said.startswith(f"{path} itself cannot be run by onnxruntime on ")
    assert "node Reshape '/flatten': " in said
    assert "fewbit has changed nothing of it. Leave such images out" in said
    assert not (tmp_path / "run.part").exists()
    with pytest.raises(CannotRun, match=r"node Reshape '/flatten'") as late:  # an image that was not looked at
        list(_run(_Files((path, path), "onnxruntime", 1, ALONE, ("scores",), ()), opened(images), 1, range(12)))
    assert f"cannot be run by onnxruntime on {opened(images).names[empty[0]]}" in str(late.value)


@pytest.mark.parametrize(
    ("opset", "said_to_try"), [(17, "Try --opset 17, that of the file that was given, whose nodes are not converted"), (20, "")]
)
def test_what_the_optimisations_of_onnxruntime_break_is_told_from_what_the_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int, said_to_try: str
) -> None:
    def failing(*_: object) -> None:
        raise CannotRun(f"{tmp_path / 'run.part' / 'float.onnx'} cannot be run by onnxruntime on some of the images: node X.")

    monkeypatch.setattr(twins.proofs, "twin_checks", failing)
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    options = {"target": "ort-x86-vnni", "recipe": "minmax", "mean": [0.5], "std": [0.25], "quick": True}
    with pytest.raises(CannotRun) as found:
        quantize(str(file(tmp_path, NMS, OF_NMS, opset=opset)), images, out=tmp_path / "run", **options)
    said = str(found.value)
    assert said.startswith("float.onnx cannot be run by onnxruntime on some of the first 8 images that are scored: node X. ")
    assert "so its own optimisations are what fails there. " in said
    assert said_to_try in said
    assert ("--opset" in said) == bool(said_to_try)
    assert "Leave such images out" in said


def test_a_runtime_that_gives_other_rows_behind_a_tail_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneRowAtLeast(OpenVino):  # as openvino has it for some detectors without a box
        def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
            found = super().run(*inputs)
            return {n: a if len(a) else np.zeros((1, *a.shape[1:]), a.dtype) for n, a in found.items()}

    monkeypatch.setattr(tails, "open_session", lambda runtime, path, outputs: OneRowAtLeast(path, outputs=outputs))
    path = with_numbers(file(tmp_path, NMS, OF_NMS), least=np.float32([0.5]))
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    scored = images[::-1].copy()
    scored[[2, 5]] = 128  # no box
    options = {"target": "openvino-x86", "recipe": "minmax", "mean": [0.5], "std": [0.25], "quick": True}
    with pytest.raises(FewbitFailed) as found:
        quantize(str(path), images[:6], score=np.concatenate([scored[:6], scored[2:3]]), out=tmp_path / "run", **options)
    said = str(found.value)
    assert said.startswith(
        "openvino runs the nodes that stay behind the layers, as the file has them, otherwise than onnxruntime"
    )
    assert "output picked has 1 row where onnxruntime gives 0 for the same numbers (in 3 of " in said
    assert "--target ort-x86-vnni" in said
    assert not (tmp_path / "run.part" / "plan.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
def test_a_run_of_a_detector_is_right_and_opens_again(tmp_path: Path, target: str) -> None:
    given, out = file(tmp_path, NMS, OF_NMS), tmp_path / "run"
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    options = {"target": target, "recipe": "minmax", "mean": [0.5], "std": [0.25], "seconds": 0.2, "out": out}
    result = quantize(str(given), images, **options)
    assert result.report["verify"]["problems"] == []
    rows = {row["output"]: row["measure"] for row in result.report["accuracy"]["outputs"]}
    assert rows == {
        "scores": "correlation",
        "boxes": "correlation",
        "picked": "rows that both give",
        "chosen": "rows that both give",
    }
    assert {row["node"] for row in json.loads((out / "tables.json").read_text())["carried"]} == ALL
    checks = Run.open(out).verify()
    assert (checks.file, checks.wrong, checks.wrong_outputs) == ((), (), ())
    model = onnx.load(out / "model.onnx")
    next(one for one in model.graph.node if one.op_type == "NonMaxSuppression").attribute.add().CopyFrom(
        helper.make_attribute("center_point_box", 1)
    )
    found = deviations("model.onnx", model, onnx.load(out / "model.onnx"))
    assert [one.name for one in found] == ["the node of chosen (NonMaxSuppression)"]
