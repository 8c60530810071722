"""The graphs of single ops that are timed. Oracles: the shapes of the model, torch's own ops, the names of fused kernels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from fewbit.runtimes import OnnxRuntime
from fewbit.target import load_target
from fewbit.verify.latency import Work, measured, one_op, work_of


@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
@pytest.mark.parametrize("integer", [False, True])
def test_every_kind_of_op_can_be_timed(mixed_net, tmp_path, target, integer):
    graph = mixed_net.graph
    nodes = {node.name: node for node in graph.module.graph.nodes}
    assert {"maxpool", "concat", "avgpool", "add", "depthwise"} <= {op.kind for op in graph.ops}
    for op in graph.ops:
        work = work_of(graph, load_target(target), op, nodes)
        model = one_op(work, integer=integer)
        onnx.save(model, tmp_path / "op.onnx")
        taken = np.uint8 if integer and not work.inside else np.float32
        inputs = {v.name: np.ones(s, taken) for v, s in zip(model.graph.input, work.shapes, strict=False)}
        (found,) = OnnxRuntime(tmp_path / "op.onnx")._session.run(None, inputs)
        assert found.shape == tuple(nodes[op.node].meta["tensor_meta"].shape), op.name
        assert (found.dtype == np.uint8) == (integer and work.codes)


@pytest.mark.parametrize("up", [0, 1])
def test_a_pooling_has_its_kernel_and_its_steps(tmp_path, up):
    work = Work("maxpool", ((1, 2, 9, 8),), ((3, 2), (2, 1), (1, 0), (1, 2), (up,)))
    onnx.save(one_op(work, integer=False), tmp_path / "op.onnx")
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 8)).astype(np.float32)
    (found,) = OnnxRuntime(tmp_path / "op.onnx")._session.run(None, {"a": x})
    wanted = F.max_pool2d(torch.from_numpy(x), (3, 2), (2, 1), (1, 0), (1, 2), bool(up))
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize(("kind", "kernel"), [("concat", "QLinearConcat"), ("maxpool", "MaxPool")])
def test_codes_are_joined_and_pooled_as_codes(mixed_net, tmp_path, kind, kernel):
    graph = mixed_net.graph
    nodes = {node.name: node for node in graph.module.graph.nodes}
    op = next(op for op in graph.ops if op.kind == kind)
    onnx.save(one_op(work_of(graph, load_target("ort-x86-vnni"), op, nodes), integer=True), tmp_path / "op.onnx")
    OnnxRuntime(tmp_path / "op.onnx", save_optimised=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds == [kernel]


def test_a_time_is_measured(monkeypatch):
    monkeypatch.setattr("fewbit.verify.latency.SECONDS", 0.01)
    assert all(ms >= 0 for ms in measured(Work("concat", ((1, 2, 4, 4),) * 2, (), True), "onnxruntime", 1))
