"""Oracles for loading: a file of known size, and the size of the process that measures."""

from __future__ import annotations

import importlib
import json
import math
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fewbit.errors import BadFile, UnknownName
from fewbit.load.inputs import image
from fewbit.runtimes import Runtime, runtime_names, runtimes_for
from fewbit.verify.bench import around_median, bench, loads

MB = 2**20
IMAGE = (image((3, 8, 8)),)


def model(path, megabytes: int):
    """images (b, 3, 8, 8) times a float32 matrix of so many MB."""
    weight = np.random.default_rng(0).standard_normal((192, megabytes * MB // 4 // 192)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["logits"])]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "net", [images], [logits], [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.fresh_processes
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_larger_file_takes_its_memory_and_the_process_that_measures_does_not_count(tmp_path, runtime):
    if runtime not in runtime_names():
        pytest.skip(f"{runtime} is not installed")
    large, small = model(tmp_path / "large.onnx", 96), model(tmp_path / "small.onnx", 1)
    ours = np.ones(500 * MB, np.uint8)  # in this process, and so in no number
    (row,) = loads(large, small, IMAGE, runtimes=[runtime], threads=1, runs=1)
    assert ours[-1] == 1
    assert (row.runtime, row.threads, row.runs) == (runtime, 1, 1)
    assert 10 * MB < row.baseline_bytes < row.quantized_bytes < row.float_bytes
    assert row.quantized_bytes < 400 * MB
    assert row.float_bytes - row.quantized_bytes > 80 * MB
    assert 0 < row.quantized_seconds < row.float_seconds < 60
    assert json.loads(json.dumps(row.to_json()))["float_bytes"] == row.float_bytes


def test_the_columns_are_medians_and_each_belongs_to_its_file(tmp_path, monkeypatch):
    times = {"float.onnx": [1.0, 9.0, 2.0], "model.onnx": [0.5, 0.25, 7.0], None: [0.0, 0.0, 0.0]}
    peaks = {"float.onnx": [300, 100, 200], "model.onnx": [60, 80, 70], None: [30, 10, 20]}

    def load(runtime, path, shape, dtype, threads):
        name = path and path.name
        return times[name].pop(0), peaks[name].pop(0)

    monkeypatch.setattr(importlib.import_module("fewbit.verify.bench"), "_load", load)
    (row,) = loads(tmp_path / "float.onnx", tmp_path / "model.onnx", IMAGE, runtimes=["onnxruntime"])
    assert (row.float_seconds, row.quantized_seconds) == (2.0, 0.5)
    assert (row.float_bytes, row.quantized_bytes, row.baseline_bytes) == (200, 70, 20)


@pytest.mark.fresh_processes
def test_an_unknown_runtime_and_a_broken_file_are_said(tmp_path):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(UnknownName, match="unknown runtime 'onnxruntim'"):
        loads(broken, broken, IMAGE, runtimes=["onnxruntim"])
    with pytest.raises(BadFile, match=r"onnxruntime cannot load .*model\.onnx: \S"):
        loads(broken, broken, IMAGE, runtimes=["onnxruntime"], runs=1)


def test_a_runtime_that_cannot_load_a_file_is_not_timed(tmp_path):
    """An operator of classical models, which onnxruntime has and openvino has not."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    node = helper.make_node("ArrayFeatureExtractor", ["images", "places"], ["logits"], domain="ai.onnx.ml")
    graph = helper.make_graph([node], "net", [images], [logits], [numpy_helper.from_array(np.array([2, 0]), "places")])
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "a.onnx")
    assert runtimes_for(tmp_path / "a.onnx") == ("onnxruntime",)
    assert runtimes_for(model(tmp_path / "b.onnx", 1)) == runtime_names()


def test_a_row_has_medians_the_middle_half_and_the_load_of_the_machine(tmp_path, monkeypatch):
    module = importlib.import_module("fewbit.verify.bench")
    rounds = [(0.001 * (1 + i), 0.0005 * (9 - i)) for i in range(9)]
    monkeypatch.setattr(module, "paired", lambda calls, seconds: rounds)
    monkeypatch.setattr(
        module, "open_session", lambda name, path, threads: types.SimpleNamespace(call=print, feed=lambda *x: x)
    )
    monkeypatch.setattr(module.os, "getloadavg", lambda: (1.25, 9.0, 9.0))
    (row,) = bench(tmp_path, tmp_path, IMAGE, runtimes=["onnxruntime"], batches=[1])
    assert (row.float_ms, row.float_spread) == (5.0, (3.0, 7.0))
    assert (row.quantized_ms, row.quantized_spread) == (2.5, (1.5, 3.5))
    assert (row.runs, row.load, row.ratio) == (9, 1.25, 2.0)


@pytest.mark.parametrize("count", [*range(1, 60), 100, 385, 1000])
def test_the_interval_of_a_median_covers_it_in_95_of_100(count):
    """Two sorted values hold the median between them unless fewer than so many of all lie on one side, as a coin falls."""
    values = list(range(count))
    low, median, high = around_median(values[::-1])
    assert (low, median, high) == (count - 1 - high, (count - 1) / 2, high)
    outside = 2 * sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
    assert outside <= 0.05 or low == 0
    narrower = 2 * sum(math.comb(count, k) for k in range(int(low) + 3)) / 2**count
    assert narrower > 0.05  # and no interval that is narrower by two does, which rounds generously


def test_precisions_of_a_runtime_share_their_rounds_and_are_beside_its_fastest_float_model(monkeypatch):
    """Seconds by hand: in bf16 the float model takes 2, the file 4, 5, 3; in f32 6 and 3, 2, 4. Rounds are paired."""
    seconds = {
        ("a", "float.onnx"): [6.0, 6.0, 6.0], ("a", "model.onnx"): [3.0, 2.0, 4.0],
        ("a-bf16", "float.onnx"): [2.0, 2.0, 2.0], ("a-bf16", "model.onnx"): [4.0, 5.0, 3.0],
        ("b", "float.onnx"): [1.0, 1.0, 1.0], ("b", "model.onnx"): [8.0, 8.0, 8.0],
    }  # fmt: skip
    here, asked = importlib.import_module("fewbit.verify.bench"), []

    def opened(name, path, **options):
        session = types.SimpleNamespace(feed=lambda *arrays: [], call=None)
        session.call = lambda arrays: (name, path)
        return session

    def paired(calls, seconds_each):
        asked.append(seconds_each)
        return list(zip(*(seconds[call()] for call in calls), strict=True))

    monkeypatch.setattr(here, "open_session", opened)
    monkeypatch.setattr(here, "paired", paired)
    monkeypatch.setattr(here, "RUNTIMES", {name: Runtime(name, precisions=("bf16",)) for name in "ab"})
    rows = bench("float.onnx", "model.onnx", IMAGE, runtimes=["a", "b", "a-bf16"], batches=[1], seconds=0.5)
    assert asked == [1.0, 0.5]
    assert [(row.runtime, row.float_ms, row.quantized_ms, row.ratio) for row in rows] == [
        ("a", 6000, 3000, 2), ("a-bf16", 2000, 4000, 0.5), ("b", 1000, 8000, 0.125),
    ]  # fmt: skip
    assert [(row.best, row.over_best) for row in rows] == [
        ("a-bf16", (2 / 4, 2 / 3, 2 / 2)), ("a-bf16", (2 / 5, 2 / 4, 2 / 3)), ("b", (1 / 8, 1 / 8, 1 / 8)),
    ]  # fmt: skip
