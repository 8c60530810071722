"""Nets as exporters write them: the numbers are onnxruntime's, the ops and sites those of the module itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from conftest import ConvNet, Mixed, Vit
from fewbit.capture import capture
from fewbit.core.graph import Graph
from fewbit.load import load_model
from fewbit.load.contexts import quiet

Export = Callable[[nn.Module, Path, tuple[int, ...]], None]


def scripted(opset: int, *, fixed: bool = False) -> Export:
    """torch.onnx's older exporter, which writes a graph of many small nodes."""

    def write(net: nn.Module, path: Path, size: tuple[int, ...]) -> None:
        axes = {} if fixed else {"image": {0: "batch"}}
        names = {"input_names": ["image"], "output_names": ["scores"]}
        with quiet():
            image = torch.zeros(1 if fixed else 2, *size)
            torch.onnx.export(net, (image,), str(path), dynamo=False, opset_version=opset, dynamic_axes=axes, **names)

    return write


def exported(opset: int, *, fixed: bool = False) -> Export:
    def write(net: nn.Module, path: Path, size: tuple[int, ...]) -> None:
        shapes = None if fixed else ({0: torch.export.Dim("batch")},)
        with quiet():
            image = torch.zeros(1 if fixed else 2, *size)
            torch.onnx.export(net, (image,), path, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False)

    return write


def kinds(graph: Graph) -> Counter[tuple[str, int]]:
    return Counter((op.kind, op.macs) for op in graph.ops)


def as_exported(net: nn.Module, write: Export, path: Path, size: tuple[int, ...]) -> tuple[Graph, Graph]:
    """The graph of a net and of its file, after the file's numbers were compared with onnxruntime's."""
    torch.manual_seed(0)
    write(net.eval(), path, size)
    ours, file = capture(load_model(net, overrides={"input_size": size})), capture(load_model(str(path)))
    images = torch.randn(3, *size)
    session = onnxruntime.InferenceSession(path)
    port = session.get_inputs()[0]
    parts = images.split(port.shape[0] if isinstance(port.shape[0], int) else 3)
    want = np.concatenate([session.run(None, {port.name: part.numpy()})[0] for part in parts])
    with torch.no_grad():
        got = file.module(images)
    got = got if isinstance(got, Tensor) else got[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))
    return ours, file


@pytest.mark.parametrize("net", [ConvNet, Vit, Mixed])
@pytest.mark.parametrize("write", [scripted(14), scripted(17, fixed=True)], ids=["free batch", "fixed batch"])
def test_a_file_has_the_ops_of_its_module(tmp_path: Path, net: type[nn.Module], write: Export) -> None:
    torch.manual_seed(0)
    ours, file = as_exported(net(), write, tmp_path / "net.onnx", (3, 8, 8))
    assert kinds(file) == kinds(ours)
    assert {op.name for op in file.ops if op.kind == "linear"} == {op.name for op in ours.ops if op.kind == "linear"}


LARGER: dict[str, tuple[str, dict[str, object], Export, int]] = {
    "resnet": ("resnet18", {}, scripted(17, fixed=True), 64),
    "vit fixed": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, scripted(14, fixed=True), 64),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, exported(20), 64),
    "vit 18": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, exported(18, fixed=True), 64),
    "convnext": ("convnext_atto", {}, scripted(14), 64),
    "mobilenet": ("mobilenetv2_050", {}, scripted(9), 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_a_net_of_timm_has_the_ops_of_its_module(tmp_path: Path, name: str) -> None:
    import timm

    model, options, write, side = LARGER[name]
    net = timm.create_model(model, pretrained=False, num_classes=10, **options)
    ours, file = as_exported(net, write, tmp_path / "net.onnx", (3, side, side))
    assert kinds(file) == kinds(ours)


YOLOX = Path(__file__).parents[3] / "shared" / "models" / "yolox_nano.onnx"


@pytest.mark.slow
@pytest.mark.skipif(not YOLOX.is_file(), reason="needs ../shared/models/yolox_nano.onnx")
def test_a_detector_of_a_fixed_batch_on_real_images() -> None:
    from PIL import Image

    from fewbit.onnx_reader import read_onnx

    file = read_onnx(YOLOX)
    file.look(file.inputs)
    session = onnxruntime.InferenceSession(YOLOX)
    pictures = sorted((YOLOX.parents[1] / "data" / "coco128").rglob("*.jpg"))[:4]
    assert pictures
    for picture in pictures:
        pixels = np.asarray(Image.open(picture).convert("RGB").resize((416, 416)), np.float32)[:, :, ::-1]
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        (want,) = session.run(None, {"images": image})
        with torch.no_grad():
            got = file.module(torch.from_numpy(image))["output"].numpy()
        assert float(np.abs(got - want).max() / np.abs(want).max()) < 1e-4
