"""The models that come with fewbit. Oracles: the labels of the images that come with it, the published number of parameters."""

from __future__ import annotations

import io
import logging
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bench.train_demo import MODELS, Cycle, normalized, pixels
from PIL import Image
from torch import nn
from torchvision.ops import box_convert, box_iou

from fewbit import quantize
from fewbit.capture import capture
from fewbit.demo import DEMOS, cnn, detr, model
from fewbit.errors import BadModel
from fewbit.load import load_model


@pytest.mark.parametrize(("build", "least"), [(model.model, 80), (cnn.resnet20, 86), (cnn.mobilenet, 82)])
def test_a_model_knows_the_images_that_come_with_it(build, least):
    images, labels = pixels(pq.read_table(model.TEST))
    with torch.no_grad():
        found = torch.cat([build()(x).argmax(1) for x in normalized(images).split(250)])
    assert 100 * (found == labels).double().mean().item() > least


def test_the_detr_finds_the_objects_of_the_scenes_that_come_with_it():
    table, found = pq.read_table(DEMOS["demo:detr"].test), []
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    with torch.no_grad():
        outputs = detr.detr()(normalized(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
    scores, classes = outputs.logits.softmax(-1)[..., :-1].max(-1)
    corners = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * detr.INPUT_SIZE[1]
    for objects, boxes, score, label in zip(table["objects"].to_pylist(), corners, scores, classes, strict=True):
        given = box_convert(torch.tensor(objects["bbox"]), "xywh", "xyxy")
        same = label[:, None] == torch.tensor(objects["category"])
        found += ((box_iou(boxes, given) > 0.5) & same & (score > 0.3)[:, None]).any(0).tolist()
    assert 100 * np.mean(found) > 72


def test_no_advice_to_the_writers_of_a_library_stands_in_front_of_the_detr(monkeypatch):
    """torch logs it where transformers imports a torchao of other years; other lines of that log stay."""
    log, lines = logging.getLogger("torch.utils._pytree"), []
    advice = "%s is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated"

    class Transformers:
        def __getattr__(self, name):
            log.warning(advice, name)
            log.warning("something else")
            raise AttributeError(name)

    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    monkeypatch.setitem(sys.modules, "transformers", Transformers())
    try:
        with pytest.raises(BadModel, match="needs the transformers package"):
            load_model("demo:detr")
        log.warning(advice, "later")
    finally:
        log.removeHandler(handler)
    assert set(lines[:-1]) == {"something else"}
    assert lines[-1].startswith("later is an Enum subclass")


def test_a_detr_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadModel, match=r"pip install 'fewbit\[hf\]'"):
        load_model("demo:detr")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
def test_the_detr_is_right_in_integers(target, tmp_path):
    report = quantize("demo:detr", target=target, calibration=32, scored=32, out=tmp_path / "run").report
    assert report["verify"]["codes_wrong"] == 0


def test_a_demo_is_small():
    size = sum(path.stat().st_size for path in (detr.WEIGHTS, DEMOS["demo:detr"].calibration, DEMOS["demo:detr"].test))
    assert size <= 4e6


def test_a_resnet20_has_the_paper_s_depth_and_parameters():
    net = cnn.ResNet20()
    weighted = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name]
    assert len(weighted) == 20
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.27e6, rel=0.02)


@pytest.mark.parametrize("name", cnn.NETS)
def test_a_net_is_captured_whole(name):
    torch.manual_seed(0)
    net = cnn.NETS[name]().eval()
    x = torch.randn(2, *cnn.INPUT_SIZE)
    graph = capture(load_model(net, overrides={"input_size": cnn.INPUT_SIZE}))
    with torch.no_grad():
        assert torch.allclose(graph.module(x), net(x), atol=1e-4)
    kinds = {op.kind for op in graph.ops}
    assert {"conv", "linear", "add", "avgpool"} <= kinds
    assert ("depthwise" in kinds) == (name == "mobilenet")


def test_weights_decay_and_norms_do_not():
    net = cnn.ResNet20()
    groups = MODELS["resnet20"].optimizer(net, Cycle(1, 0.1, 0.5)).param_groups
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {decays[id(p)] for p in net.parameters() if p.ndim > 1} == {0.5}
    assert {decays[id(p)] for p in net.parameters() if p.ndim <= 1} == {0.0}
    assert len(decays) == len(list(net.parameters()))


def test_pixels_are_those_of_the_images():
    table = pq.read_table(model.CALIBRATION).slice(0, 3)
    images, labels = pixels(table)
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == table["label"].to_pylist()
    mean, std = (np.array(v)[:, None, None] for v in (model.MEAN, model.STD))
    assert np.allclose(normalized(images)[1].numpy() * std + mean, images[1].numpy() / 255, atol=1e-6)
