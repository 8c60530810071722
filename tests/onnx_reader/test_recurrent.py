"""LSTM, GRU and RNN in ONNX files: each as onnxruntime runs it, and a recogniser of text with one between its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bench.ablations import ABLATIONS
from onnx import TensorProto, helper, numpy_helper

from fewbit.capture import capture
from fewbit.choose import Context, choose
from fewbit.core.graph import Turned
from fewbit.errors import BadModel
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.onnx_reader import read_onnx
from fewbit.realize import float_onnx, realize
from fewbit.run import Run, quantize
from fewbit.said import said
from fewbit.stages.compare_onnx import as_it_runs
from fewbit.stages.tail import fitted
from fewbit.target import allowed, load_target
from fewbit.verify import compare, tail_checks
from onnx_reader.cases import module_of, run
from onnx_reader.test_microsoft import drawn, of_runtime
from onnx_reader.test_tail import outputs_of, ports_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TIME, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
WAYS = [(op, {}) for op in GATES] + [("GRU", {"linear_before_reset": 1}), ("RNN", {"activations": ["Relu"]})]


def alone(op: str, given: dict[str, Any], *, optional: bool = True) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """A model of one node that gives all that it can, and what it reads: the rest are constants."""
    ways = 2 if given.get("direction") == "bidirectional" else 1
    if ways == 2 and "activations" in given:
        given = {**given, "activations": 2 * given["activations"]}
    rows = GATES[op] * HIDDEN
    stored = {"w": drawn(ways, rows, INPUTS), "r": drawn(ways, rows, HIDDEN)}
    if optional:
        stored |= {"b": drawn(ways, 2 * rows), "h": drawn(ways, BATCH, HIDDEN)}
        stored |= {"c": drawn(ways, BATCH, HIDDEN)} if op == "LSTM" else {}
    names = ["x", "w", "r", *(["b", "steps", "h", "c"] if optional else [])][: 7 if op == "LSTM" else 6]
    out = ["y", "y_h", "y_c"][: 3 if op == "LSTM" else 2]
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    tensors += [numpy_helper.from_array(np.full(BATCH, TIME, dtype=np.int32), "steps")] if optional else []
    graph = helper.make_graph(
        [helper.make_node(op, names, out, "/cell", hidden_size=HIDDEN, **given)], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TIME, BATCH, INPUTS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in out], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), [drawn(TIME, BATCH, INPUTS)]


@pytest.mark.parametrize("optional", [True, False], ids=["all inputs", "few inputs"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "given"), WAYS, ids=str)
def test_a_recurrent_node_computes_what_onnxruntime_does(
    op: str, given: dict[str, Any], direction: str, optional: bool
) -> None:  # fmt: skip
    model, inputs = alone(op, {**given, "direction": direction}, optional=optional)
    for got, want in zip(run(model, inputs)[2], of_runtime(model, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def with_peepholes(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.append("p")
    model.graph.initializer.append(numpy_helper.from_array(drawn(1, 3 * HIDDEN), "p"))


def with_fewer_steps(model: onnx.ModelProto) -> None:
    steps = next(one for one in model.graph.initializer if one.name == "steps")
    steps.CopyFrom(numpy_helper.from_array(np.array([TIME, TIME - 1], dtype=np.int32), "steps"))


def with_attribute(name: str, value: object) -> Any:
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute(name, value))


OTHERS = {
    "clip": ("LSTM", with_attribute("clip", 2.0), "with clip 2"),
    "activations": ("GRU", with_attribute("activations", ["HardSigmoid", "Tanh"]), "with activations HardSigmoid, Tanh"),
    "gates": ("LSTM", with_attribute("input_forget", 1), "with input_forget"),
    "peepholes": ("LSTM", with_peepholes, "peepholes"),
    "steps": ("LSTM", with_fewer_steps, r"sequence_lens are \[5, 4\], and only all 5 steps"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_recurrent_node_that_torch_has_not_is_refused(name: str) -> None:
    op, edit, message = OTHERS[name]
    model, inputs = alone(op, {})
    edit(model)
    with pytest.raises(BadModel, match=rf"node {op} '/cell' .* cannot be run: .*{message}"):
        module_of(model, {})(*map(torch.from_numpy, inputs))


@pytest.mark.parametrize("op", GATES)
def test_a_layout_that_onnxruntime_has_not_is_said_in_words(op: str, tmp_path: Path) -> None:
    model, inputs = alone(op, {"layout": 1}, optional=False)
    with pytest.raises(Exception, match="Batchwise") as raised:
        of_runtime(model, inputs)
    assert said(raised.value) == "it has no LSTM, GRU or RNN with layout 1 (the batch in front of the time); layout 0 it has"
    other = RuntimeError(
        "Exception during initialization: /src/core/rnn.h:53 ns::Base::Base(const Info&) n_ == 0 was false. No n."
    )
    assert said(other) == "No n."


def recogniser(op: str, batch: object, folder: Path, *, end: str = "batch first", columns: int = 8, **given: Any) -> Path:
    """Two convolutions, their mean over the height, a recurrent layer over the 8 columns, time first, and a linear layer, which
    gives (batch, 8, 7), (8, batch, 7), or (8, 7) of one image; `columns` may be others than 8.
    """
    rows = GATES[op] * 5
    weights = {
        "v": 0.5 * drawn(6, 1, 3, 3), "u": 0.3 * drawn(6, 6, 3, 3), "w": 0.4 * drawn(2, rows, 6), "r": 0.4 * drawn(2, rows, 5),
        "head": drawn(10, 7),
    }  # fmt: skip
    start = [batch] if isinstance(batch, int) else []
    weights |= {"h": np.zeros((2, batch, 5), np.float32)} if start else {}
    nodes = [
        helper.make_node("Conv", ["image", "v"], ["a"], "/stem", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "/relu"),
        helper.make_node("Conv", ["b", "u"], ["c"], "/second", pads=[1] * 4),
        helper.make_node("ReduceMean", ["c"], ["d"], "/mean", axes=[2], keepdims=0),
        helper.make_node("Transpose", ["d"], ["e"], "/columns", perm=[2, 0, 1]),
        helper.make_node(
            op, ["e", "w", "r", *(["", "", "h"] if start else [])], ["f"], "/cell", direction="bidirectional", hidden_size=5,
            **given,
        ),
        helper.make_node("Transpose", ["f"], ["g"], "/ways", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["g", "joined"], ["i"], "/joined"),
    ]  # fmt: skip
    if end == "time first, by rows":  # as a linear layer of PyTorch is exported behind a view
        weights |= {"bias": drawn(7)}
        nodes += [
            helper.make_node("Shape", ["i"], ["whole"], "/whole"),
            helper.make_node("Slice", ["whole", "zero", "two"], ["front"], "/front"),
            helper.make_node("Concat", ["front", "minus"], ["letters of"], "/letters_of", axis=0),
            helper.make_node("Reshape", ["i", "flat"], ["rows"], "/flat"),
            helper.make_node("Gemm", ["rows", "head", "bias"], ["scores"], "/head"),
            helper.make_node("Reshape", ["scores", "letters of"], ["letters"], "/letters"),
        ]
    else:
        turned, last = end == "batch first", end == "one image"
        nodes += [helper.make_node("Transpose", ["i"], ["j"], "/rows", perm=[1, 0, 2])] if turned else []
        nodes += [helper.make_node("MatMul", ["j" if turned else "i", "head"], ["all" if last else "letters"], "/head")]
        nodes += [helper.make_node("Squeeze", ["all", "one"], ["letters"], "/one")] if last else []
    shape = {"batch first": [batch, columns, 7], "time first": [columns, batch, 7], "one image": [columns, 7]}.get(
        end, ["a", "b", "c"]
    )
    whole = {"joined": [0, 0, -1], "one": [1], "zero": [0], "two": [2], "minus": [-1], "flat": [-1, 10]}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, 8, 2 * columns])],
        [helper.make_tensor_value_info("letters", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()]
        + [numpy_helper.from_array(np.array(value), name) for name, value in whole.items()],
    )  # fmt: skip
    path = folder / "given.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def work(op: str) -> int:
    """Products of the recurrent layer for one image: both ways, 8 steps."""
    return 2 * 8 * GATES[op] * 5 * (6 + 5)


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize(("op", "given"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1})], ids=["LSTM", "GRU"])
def test_a_recogniser_is_quantized_about_its_recurrent_layer(
    op: str, given: dict[str, Any], batch: object, tmp_path: Path, ort_target: str
) -> None:  # fmt: skip
    path, out = recogniser(op, batch, tmp_path, **given), tmp_path / "out.onnx"
    loaded, images = load_model(str(path)), torch.from_numpy(drawn(4, 1, 8, 16))
    assert loaded.batch is None if batch == "N" else loaded.tail is None
    graph, target = capture(loaded), load_target(ort_target)
    (product,) = graph.float_products
    assert (product.function, product.macs) == (op.lower(), work(op))
    assert graph.macs == work(op) + sum(one.macs for one in graph.ops)
    (fallback,) = (one for one in allowed(graph, target).fallbacks if op.lower() in one.why)
    assert fallback.macs_share == work(op) / graph.macs
    float_onnx(graph, tmp_path / "float.onnx", opset=20)
    assert ports_of(tmp_path / "float.onnx") == ports_of(path)
    for image in images.split(1):
        for a, b in zip(
            outputs_of(path, image=image.numpy()), outputs_of(tmp_path / "float.onnx", image=image.numpy()), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    plan = choose(Context(graph, observe(graph, images.split(1)), target, images=images.split(1)), ABLATIONS["minmax"])
    realize(graph, plan, out, **target.file_format)
    assert ports_of(out) == ports_of(path)
    assert op in {node.op_type for node in onnx.load(out).graph.node}
    checks = compare(graph, plan, out, images.split(1), runtime="onnxruntime")
    assert (len(plan.integer_ops), list(checks.wrong), [one for one in checks.outputs if one.wrong]) == (3, [], [])


@pytest.mark.parametrize("batch", [1, 3])
def test_states_that_no_image_gives_are_no_sites(batch: int, tmp_path: Path, ort_target: str) -> None:
    """Both directions of a GRU of single steps begin with zeros, whose products torch.onnx computes."""
    path, out = recogniser("GRU", batch, tmp_path, columns=2), tmp_path / "out.onnx"
    graph, target = capture(load_model(str(path))), load_target(ort_target)
    images = torch.from_numpy(drawn(2 * batch, 1, 8, 4)).split(batch)
    plan = choose(Context(graph, observe(graph, images), target, images=images), ABLATIONS["minmax"])
    realize(graph, plan, out, **target.file_format)
    assert ports_of(out) == ports_of(path)
    checks = compare(graph, plan, out, images, runtime="onnxruntime")
    assert (list(checks.wrong), [one for one in checks.outputs if one.wrong]) == ([], [])


def test_a_recurrent_layer_of_another_kind_is_carried_or_named(tmp_path: Path) -> None:
    """Behind the layers it stays as it is; between them it is refused, with what it has that torch has not."""
    path = recogniser("LSTM", "N", tmp_path, clip=3.0)
    with pytest.raises(BadModel, match=r"between its layers: LSTM '/cell' \(opset 17\) with clip 3\. "):
        read_onnx(path)
    model = onnx.load(path)
    del model.graph.node[-1]
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = "j", 10
    onnx.save(model, path)
    tail = read_onnx(path).tail
    assert tail is not None
    assert {"/columns", "/cell"} <= {row["node"] for row in tail.nodes}


@pytest.mark.parametrize(("nonlinearity", "bias"), [("tanh", True), ("relu", False)])
def test_an_rnn_is_written_as_one_node_for_each_layer(nonlinearity: str, bias: bool, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.RNN(
                6, 4, 2, nonlinearity=nonlinearity, bias=bias, batch_first=bias, bidirectional=not bias
            )  # fmt: skip
            self.head = torch.nn.Linear(4 if bias else 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2)
            found, last = self.rnn(rows if bias else rows.transpose(0, 1))
            return self.head((found if bias else found.transpose(0, 1)) + last[-1:, :, :1].transpose(0, 1))

    net, out, image = Net().eval(), tmp_path / "float.onnx", drawn(3, 5, 2, 3)
    float_onnx(capture(load_model(net, overrides={"input_size": (5, 2, 3)})), out, opset=20)
    assert [node.op_type for node in onnx.load(out).graph.node].count("RNN") == 2
    with torch.no_grad():
        want = net(torch.from_numpy(image))
    np.testing.assert_allclose(outputs_of(out, images=image)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["y_c"])
def test_a_recurrent_layer_whose_last_state_alone_is_read_keeps_the_shapes_of_its_outputs(last: str, tmp_path: Path) -> None:
    model, twin = onnx.load(recogniser("LSTM", "N", tmp_path)), tmp_path / "float.onnx"
    nodes = list(model.graph.node)
    cell = next(i for i, node in enumerate(nodes) if node.op_type == "LSTM")
    nodes[cell].output.extend(["y_h", "y_c"])
    del model.graph.node[:]
    model.graph.node.extend(nodes[: cell + 1])
    model.graph.node.append(helper.make_node("Transpose", [last], ["s"], "/state", perm=[1, 0, 2]))
    model.graph.node.append(helper.make_node("Reshape", ["s", "flat"], ["t"], "/flat"))
    model.graph.node.append(helper.make_node("MatMul", ["t", "head"], ["letters"], "/head"))
    del model.graph.output[0].type.tensor_type.shape.dim[2]
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    path, image = tmp_path / "state.onnx", drawn(3, 1, 8, 16)
    onnx.save(model, path)
    float_onnx(capture(load_model(str(path))), twin, opset=20)
    onnx.checker.check_model(str(twin), full_check=True)
    np.testing.assert_allclose(outputs_of(twin, image=image)[0], outputs_of(path, image=image)[0], rtol=1e-4, atol=1e-5)


TURNED = {  # how the file ends, its batch, and the dimensions of its output that are those of the network's
    "a free batch": ("time first", "N", (1, 0, 2)),
    "a batch without a name": ("time first", None, (1, 0, 2)),
    "sizes that follow from a number alone": ("time first, by rows", "N", (1, 0, 2)),
    "a batch of one": ("time first", 1, (1, 0, 2)),
    "a batch of three": ("time first", 3, (1, 0, 2)),
    "a batch of as many as there are steps": ("time first", 8, (1, 0, 2)),
    "no batch": ("one image", 1, ()),
}


def named(path: Path) -> list[tuple[str, str, int]]:
    """Names, types and ranks: sizes that a file leaves open may be known now."""
    return [(name, kind, len(sizes)) for name, kind, sizes in ports_of(path)]


@pytest.mark.parametrize("name", TURNED)
def test_an_output_without_the_batch_in_front_is_taken_and_given_as_it_was(name: str, tmp_path: Path, ort_target: str) -> None:
    """The network gives it with the batch in front; both files give what the file gave."""
    end, batch, order = TURNED[name]
    path, out, twin = recogniser("LSTM", batch, tmp_path, end=end), tmp_path / "out.onnx", tmp_path / "float.onnx"
    loaded = fitted(load_model(str(path)), 20, "onnxruntime")
    assert as_it_runs(loaded, path) == ()
    assert "output letters has the batch elsewhere than in front" in loaded.notes[-1]
    graph, target = capture(loaded), load_target(ort_target)
    count = batch if isinstance(batch, int) else 1
    images = torch.from_numpy(drawn(max(6, count), 1, 8, 16)).split(count)
    (rows,) = (output.name for output in graph.outputs)
    assert graph.turned == {rows: Turned("letters", order)}
    float_onnx(graph, twin, opset=20)
    assert named(twin) == named(path)
    for image in images:
        want, got = outputs_of(path, image=image.numpy()), outputs_of(twin, image=image.numpy())
        np.testing.assert_allclose(want[0], got[0], rtol=1e-4, atol=1e-5)
        assert graph.turned[rows].by_rows(torch.from_numpy(want[0])).shape == (count, 8, 7)
    plan = choose(Context(graph, observe(graph, images), target, images=images), ABLATIONS["minmax"])
    realize(graph, plan, out, **target.file_format)
    assert named(out) == named(path)
    checks = compare(graph, plan, out, images, runtime="onnxruntime")
    behind = tail_checks(graph, out, "onnxruntime", images)
    assert (list(checks.wrong), [one for one in (*checks.outputs, *behind) if one.wrong]) == ([], [])


def test_a_batch_that_sizes_do_not_tell_from_the_time(tmp_path: Path) -> None:
    """In front it stays; where shapes do not follow from the batch, the refusal says what else may be."""
    assert load_model(str(recogniser("LSTM", 8, tmp_path))).tail is None
    path = recogniser("LSTM", 8, tmp_path, end="time first")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 8, 10]), "written"))
    next(node for node in model.graph.node if node.name == "/joined").input[1] = "written"
    onnx.save(model, path)
    with pytest.raises(
        BadModel, match=r"an output is \(8, 8, 7\), where 8 stands more than once. Export it with another batch"
    ):
        load_model(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
@pytest.mark.parametrize("op", GATES)
def test_a_run_of_a_recogniser_with_time_first_is_right_and_rated_by_its_letters(tmp_path: Path, op: str, target: str) -> None:
    given = recogniser(op, "N", tmp_path, end="time first")
    images = np.random.default_rng(0).normal(size=(12, 1, 8, 16)).astype(np.float32)
    result = quantize(str(given), images, target=target, recipe="minmax", seconds=0.2, out=tmp_path / "run")
    assert result.report["verify"]["problems"] == []
    (row,) = result.report["accuracy"]["outputs"]
    assert (row["output"], row["measure"]) == ("letters", "correlation")
    checks = Run.open(tmp_path / "run").verify()
    assert (checks.file, checks.wrong, checks.wrong_outputs) == ((), (), ())
