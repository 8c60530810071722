"""Files in older opsets. Oracles: onnx's checker, and the outputs of the file in the target's opset, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fewbit.errors import BadModel, FewbitError
from fewbit.realize import rendered, save
from fewbit.realize.older import in_opset
from fewbit.request import Request
from fewbit.run import Run
from fewbit.stages import STAGES
from fewbit.target import load_target
from fewbit.target.versions import usual_ir


def outputs(path: Path, x: np.ndarray[Any, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {session.get_inputs()[0].name: x})


@pytest.mark.parametrize("opset", [13, 15, 17, 19])
def test_an_older_file_is_a_valid_one_with_the_same_numbers(conv_net: Any, ort_target: str, tmp_path: Path, opset: int) -> None:
    plan, form = conv_net.plan(ort_target), load_target(ort_target).file_format
    save(rendered(conv_net.graph, plan, **form), tmp_path / "new.onnx")
    older = load_target(ort_target).written(opset, None)
    save(rendered(conv_net.graph, plan, **older.file_format), tmp_path / "old.onnx")
    file = onnx.load(tmp_path / "old.onnx")
    assert {one.domain: one.version for one in file.opset_import}[""] == opset
    assert file.ir_version == helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    onnx.checker.check_model(file, full_check=True)
    x = conv_net.images.numpy()[:2]
    for wanted, found in zip(outputs(tmp_path / "new.onnx", x), outputs(tmp_path / "old.onnx", x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def model(*nodes: onnx.NodeProto, opset: int = 20, **stored: Any) -> ir.Model:
    """x (1, 4, 4) to y through nodes."""
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4]), helper.make_empty_tensor_value_info("y")]
    initializers = [numpy_helper.from_array(np.array(value), name) for name, value in stored.items()]
    graph = helper.make_graph(list(nodes), "g", ports[:1], ports[1:], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


def test_axes_become_an_attribute_and_their_constant_goes() -> None:
    made = in_opset(model(helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0), axes=[1]), 13, 8)
    (node,) = made.graph
    assert list(node.attributes["axes"].value) == [1]
    assert len(node.inputs) == 1
    assert not made.graph.initializers


def test_what_an_older_opset_cannot_say_is_refused_by_name() -> None:
    norm = helper.make_node("LayerNormalization", ["x", "w"], ["y"], name="norm")
    with pytest.raises(BadModel, match=r"LayerNormalization \(norm\), which is in opset 17 and later; give --opset 17"):
        in_opset(model(norm, w=np.ones(4, np.float32)), 16, 8)
    zero = helper.make_node("Reshape", ["x", "shape"], ["y"], name="flat", allowzero=1)
    with pytest.raises(BadModel, match=r"Reshape \(flat\) with attribute allowzero, which is in opset 14 and later"):
        in_opset(model(zero, shape=[0, 16]), 13, 8)
    both = helper.make_node("LayerNormalization", ["y", "w"], ["z"], name="norm")
    with pytest.raises(BadModel, match="give --opset 17"):  # the least that all of them are in, not that of the first
        in_opset(model(zero, both, shape=[0, 16], w=np.ones(4, np.float32)), 13, 8)
    assert "allowzero" not in in_opset(model(zero, shape=[1, 16]), 13, 8).graph[0].attributes
    split = helper.make_node("Split", ["x"], ["y", "z"], name="halves", axis=1, num_outputs=2)
    with pytest.raises(BadModel, match="num_outputs"):
        in_opset(model(split), 17, 8)


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = torch.nn.Conv2d(3, 8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x).flatten(1)))


def test_an_operator_that_the_opset_lacks_is_known_before_anything_is_calibrated(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    options: dict[str, Any] = {"images": images, "target": "ort-x86-vnni", "input_size": (3, 8, 8), "out": tmp_path / "run"}
    for opset in (16, 17):
        request = Request(model=Normed().eval(), opset=opset, **options)
        refused = pytest.raises(BadModel, match=r"needs LayerNormalization .*; give --opset 17 or more, or leave it out\.")
        with refused if opset < 17 else nullcontext(), Run.start(request, STAGES) as run:
            run.do("capture")
    assert not (tmp_path / "run").exists()


def test_the_options_make_the_form_of_the_files_and_are_refused_where_they_cannot_be() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    form = Request(model="resnet18", images=images, target="ort-x86-vnni", opset=17).hardware.file_format
    assert (form["opset"], form["ir_version"]) == (17, 8)
    assert usual_ir(20) == usual_ir(21) == 10
    for given, says in (
        ({"opset": 12}, "--opset 12 is not allowed"),
        ({"opset": 20, "ir_version": 8}, "--ir-version 8: opset 20 is in files of IR version 9 and later, not 8"),
        ({"target": "ort-x86-w4", "opset": 18}, "--opset 18: type 'w4': int4 codes are in files of opset 21 and later"),
    ):
        with pytest.raises(FewbitError) as error:
            Request(**{"model": "resnet18", "images": images, "target": "ort-x86-vnni", **given})
        assert says in str(error.value), str(error.value)
