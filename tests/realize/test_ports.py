"""The file that comes out takes the place of the file that went in: names, order, types and dimensions of its ports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bench.ablations import ABLATIONS
from onnx import TensorProto, helper, numpy_helper

from fewbit.capture import capture
from fewbit.choose import Context, choose
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.data.images import Preprocess, open_images
from fewbit.errors import BadFile
from fewbit.folder import EXPORTED
from fewbit.load import Loaded, load_model
from fewbit.observe import observe
from fewbit.progress import Progress
from fewbit.realize import float_onnx, realize
from fewbit.stages.bench import bench
from fewbit.stages.capture import reopened
from fewbit.stages.twin import sample_of
from fewbit.target import load_target
from fewbit.task import task_of
from fewbit.verify import compare, twin_checks
from fewbit.verify.evaluate import evaluate
from onnx_reader.test_microsoft import drawn

SIZE = (3, 8, 8)
HALF, REAL, DOUBLE, INT32 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32
TYPES = {HALF: np.float16, REAL: np.float32, DOUBLE: np.float64}


def written(folder: Path, image: int, scores: int, batch: object) -> Path:
    """A convolution and a head with two outputs, the classes first and in int32; computed in float32 between casts."""
    nodes = [
        helper.make_node("Cast", ["picture"], ["x"], to=REAL),
        helper.make_node("Conv", ["x", "w"], ["maps"], "/stem/Conv", strides=[2, 2]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("ReduceMean", ["positive"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "head"], ["y"], "/head/MatMul"),
        helper.make_node("Cast", ["y"], ["scores"], to=scores),
        helper.make_node("ArgMax", ["y"], ["place"], axis=1, keepdims=0),
        helper.make_node("Cast", ["place"], ["classes"], to=INT32),
    ]
    weights = {"w": drawn(8, 3, 2, 2), "head": drawn(8, 5)}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("picture", image, [batch, *SIZE])],
        [helper.make_tensor_value_info("classes", INT32, [batch]), helper.make_tensor_value_info("scores", scores, [batch, 5])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "given.onnx")
    return folder / "given.onnx"


def ports(path: Path) -> list[tuple[str, str, list[object]]]:
    session = onnxruntime.InferenceSession(path)
    return [(port.name, port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())]


CASES = {
    "float16": (HALF, HALF, "N"),
    "double": (DOUBLE, REAL, 2),
    "float": (REAL, DOUBLE, 1),
    "unnamed": (REAL, REAL, None),
}


@dataclass(frozen=True)
class Made:
    """A file that was read, its plan, and beside it `model.onnx` and `float.onnx`."""

    name: str
    folder: Path
    loaded: Loaded
    graph: Graph
    plan: Plan


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ort_target: str) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    loaded = load_model(str(written(folder, *CASES[request.param])))
    graph, target = capture(loaded), load_target(ort_target)
    batches = torch.from_numpy(drawn(8, *SIZE)).split(graph.at_a_time(8))
    context = Context(graph, observe(graph, batches), target, images=batches, everything=True)
    plan = choose(context, ABLATIONS["minmax"])
    realize(graph, plan, folder / "model.onnx", **target.file_format)
    float_onnx(graph, folder / "float.onnx", opset=target.opset)
    return Made(request.param, folder, loaded, graph, plan)


def test_names_order_types_and_dimensions_are_those_of_the_file_that_went_in(made: Made) -> None:
    folder = made.folder
    assert ports(folder / "model.onnx") == ports(folder / "float.onnx") == ports(folder / "given.onnx")


def test_what_fed_the_file_that_went_in_feeds_the_file_that_comes_out(made: Made) -> None:
    name, folder, graph = made.name, made.folder, made.graph
    images = {"picture": drawn(graph.at_a_time(3), *SIZE).astype(TYPES[CASES[name][0]])}
    given, twin = (onnxruntime.InferenceSession(folder / f"{n}.onnx").run(None, images) for n in ("given", "float"))
    np.testing.assert_array_equal(twin[0], given[0])
    np.testing.assert_allclose(twin[1], given[1], rtol=2e-3 if CASES[name][1] == HALF else 1e-5, atol=1e-5)


def test_codes_and_outputs_are_compared_through_the_casts(made: Made) -> None:
    name, folder, loaded, graph = made.name, made.folder, made.loaded, made.graph
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    images = open_images(pictures, Preprocess.from_timm({"input_size": SIZE}), labels=False)
    sample = sample_of(graph, images)
    assert (CASES[name][0] == HALF) == bool((sample != torch.cat(list(images.batches(8)))).any())
    batches = sample.split(graph.at_a_time(4))
    assert not [c for c in twin_checks(loaded.program, loaded.inputs, folder / "float.onnx", "onnxruntime", batches) if c.wrong]
    checks = compare(graph, made.plan, folder / "model.onnx", batches)
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    score = evaluate(
        folder / "float.onnx", folder / "model.onnx", images, graph.outputs, task_of(graph),
        batch=graph.at_a_time(8),
    )  # fmt: skip
    assert score.images == 8
    for runtime in ("onnxruntime", "openvino"):
        timings, _ = bench(graph, folder / "float.onnx", folder / "float.onnx", 1, 0.01, Progress(), runtimes=[runtime])
        assert [row.batch for row in timings] == ([graph.batch] if graph.batch else [1, 8])


def test_a_cast_of_another_output_is_wrong(made: Made) -> None:
    """Fewer digits in the file are allowed for; a wrong number is not."""
    folder, loaded, graph = made.folder, made.loaded, made.graph
    model = onnx.load(folder / "float.onnx")
    for one in model.graph.initializer:
        array = numpy_helper.to_array(one)
        if array.dtype == np.float32 and array.ndim > 1:
            one.CopyFrom(numpy_helper.from_array(array * np.float32(1.01), one.name))
    onnx.save(model, folder / "off.onnx")
    batches = torch.from_numpy(drawn(4, *SIZE)).half().float().split(graph.at_a_time(4))
    wrong = [
        c.output for c in twin_checks(loaded.program, loaded.inputs, folder / "off.onnx", "onnxruntime", batches) if c.wrong
    ]
    assert wrong == ["scores"]


def test_a_finished_run_has_the_ports_in_its_record(made: Made, tmp_path: Path) -> None:
    loaded, graph = made.loaded, made.graph
    torch.export.save(loaded.program, tmp_path / EXPORTED)
    ports = [[port.name, port.type, list(port.dims)] for port in loaded.ports]
    record = {"inputs": [], "batch": loaded.batch, "ports": ports, "task": "tensors", "classes": None}
    record["preprocess"] = {"size": list(loaded.input_shape)}
    again, _ = reopened(tmp_path, record)
    assert (again.batch, again.ports) == (graph.batch, graph.ports)
    with pytest.raises(BadFile, match=r"run\.json: its ports cannot be read"):
        reopened(tmp_path, {"batch": None, "ports": [["picture"]]})
