"""A file that normalizes inside computes the input, the codes and the outputs of the one that takes floats.

Oracles: the arithmetic in numpy's float32, Preprocess, and the file without.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fewbit.core.record import Record, pixels_of
from fewbit.data.images import open_images
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadFile, BadImages
from fewbit.realize import with_metadata
from fewbit.runtimes import OnnxRuntime, open_session, runtime_names
from fewbit.verify import compare
from fewbit.verify.bench import bench, loads

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.skipif("openvino" not in runtime_names(), reason="none"))]


def inside(path: Path, out: Path, mean=MEAN, std=STD) -> Path:
    """The same file, normalizing inside."""
    said = Record(Preprocess((3, 8, 8), mean, std, whole=True).to_json())
    assert said.inside
    ir.save(with_metadata(ir.load(path), said.entries(said.inside)), out)
    return out


def doubled(path: Path, high: int, wide: int, kind: int = TensorProto.FLOAT) -> Path:
    """images (b, 3, h, w) of a type, times 1 in float32."""
    ports = {"images": kind, "output": TensorProto.FLOAT}
    values = ([helper.make_tensor_value_info(name, one, ["batch", 3, high, wide])] for name, one in ports.items())
    nodes = [
        helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "one"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "net", *values, [numpy_helper.from_array(np.float32([1]), "one")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)


def normalized(pixels: np.ndarray) -> np.ndarray:
    return np.stack([Preprocess((3, 8, 8), MEAN, STD)(Image.fromarray(one)).numpy() for one in pixels])


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3)])
def test_every_pixel_is_normalized_as_preprocess_does(tmp_path, runtime, mean, std):
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3) ^ np.uint8([0, 85, 170])
    path = inside(doubled(tmp_path / "net.onnx", 16, 16), tmp_path / "inside.onnx", mean, std)
    (port,) = onnxruntime.InferenceSession(path).get_inputs()
    assert (port.name, port.type, port.shape) == ("images", "tensor(uint8)", ["batch", 16, 16, 3])
    want = (every.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
    made = Preprocess((3, 16, 16), mean, std)(Image.fromarray(every[0])).numpy()
    np.testing.assert_array_equal(made, want[0].transpose(2, 0, 1))
    session = open_session(runtime, path)
    np.testing.assert_array_equal(session.feed(made[None])[0], every)
    found = session.run(made[None])["output"][0]
    if runtime == "onnxruntime":
        np.testing.assert_array_equal(found, made)
    else:  # divides by multiplying
        np.testing.assert_allclose(found, made, rtol=3e-7, atol=3e-7 * np.abs(made).max())


def test_a_file_that_took_float16_computes_with_the_same_numbers(tmp_path):
    plain = doubled(tmp_path / "net.onnx", 8, 8, TensorProto.FLOAT16)
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    x = normalized(images)
    want = OnnxRuntime(plain).run(x)["output"]
    assert (want != x).any()
    np.testing.assert_array_equal(OnnxRuntime(inside(plain, tmp_path / "inside.onnx")).run(x)["output"], want)


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((-10.0,) * 3, (10.0,) * 3), ((10.0,) * 3, (0.0001,) * 3)])
def test_pixels_come_back_from_what_was_made_of_them(pixels, mean, std):
    images = np.stack([Preprocess((3, 8, 8), mean, std)(Image.fromarray(one)).numpy() for one in pixels])
    np.testing.assert_array_equal(pixels_of(images, list(mean), list(std)), pixels)


def test_the_codes_inside_are_those_of_the_file_without(realized_conv_net, pixels, tmp_path):
    path, images = inside(realized_conv_net.path, tmp_path / "model.onnx"), normalized(pixels)
    sites = [f"{site}.codes" for site, choice in realized_conv_net.plan.choices.items() if choice.codes is None]
    for optimise in (False, True):
        plain, ours = (
            OnnxRuntime(file, optimise=optimise, outputs=sites).run(images) for file in (realized_conv_net.path, path)
        )
        assert {*sites} < {*plain} == {*ours}
        for name in plain:
            np.testing.assert_array_equal(plain[name], ours[name], name)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_file_that_ships_is_what_is_verified(
    realized, realized_conv_net, conv_net, openvino_target, pixels, tmp_path, runtime
):
    made = realized_conv_net if runtime == "onnxruntime" else realized(conv_net, openvino_target, everything=True)
    path, images = inside(made.path, tmp_path / "model.onnx"), [torch.from_numpy(normalized(pixels))]
    checks = compare(conv_net.graph, made.plan, path, images, runtime=runtime)
    assert not checks.wrong
    assert not checks.wrong_outputs
    model = onnx.load(path)
    mean = next(tensor for tensor in model.graph.initializer if tensor.name == "images.mean")
    mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) + np.float32(0.1), mean.name))
    onnx.save(model, path)
    assert compare(conv_net.graph, made.plan, path, images, runtime=runtime).off[0].wrong


def test_pixels_are_whole_where_the_file_normalizes(pixels):
    options = {"size": (3, 8, 8), "mean": MEAN, "std": STD, "antialias": False}
    picture = Image.fromarray(pixels[0]).resize((11, 13))
    plain, whole = Preprocess(**options)(picture), Preprocess(**options, whole=True)(picture)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    want = (255 * (plain.double() * std + mean)).round().clamp(0, 255)
    assert (want != 255 * (plain.double() * std + mean)).any()
    torch.testing.assert_close(255 * (whole.double() * std + mean), want, rtol=0, atol=1e-4)


def test_floats_that_nobody_knows_the_pixels_of_are_refused(pixels):
    images, preprocess = normalized(pixels), Preprocess((3, 8, 8), MEAN, STD, whole=True)
    with pytest.raises(BadImages, match=r"array:0 is of floats, .* takes pixels: .* leave out --normalize-inside"):
        open_images(images, preprocess)
    assert len(open_images(pixels, preprocess)) == 16


def test_a_file_of_pixels_that_says_nothing_is_refused(realized_conv_net, tmp_path):
    path = inside(realized_conv_net.path, tmp_path / "model.onnx")
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    session = open_session("onnxruntime", path)
    with pytest.raises(BadFile, match=r"model\.onnx takes uint8 and does not say how it normalizes"):
        session.run(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.fresh_processes
def test_it_is_timed_on_pixels(realized_conv_net, tmp_path):
    path = inside(realized_conv_net.path, tmp_path / "model.onnx")
    files = realized_conv_net.float_path, path, realized_conv_net.net.graph.inputs
    (row,) = bench(*files, runtimes=["onnxruntime"], batches=[2], seconds=0.001)
    assert (row.runtime, row.batch) == ("onnxruntime", 2)
    assert row.runs >= 5
    (row,) = loads(*files, runtimes=["onnxruntime"], runs=1)
    assert row.baseline_bytes < row.quantized_bytes
