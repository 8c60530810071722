"""Preprocessing that nobody recorded is said; what the model or the request gives is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewbit.load import Loaded, load_model
from fewbit.report.answers import good
from fewbit.stages.preprocessing import assumed, assumptions, preprocess_of

SIZE = {"input_size": (3, 8, 8)}
ALL = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize": "squash", "crop_pct": 1.0}


def said(record: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    return sentence(Loaded("net", None, {**SIZE, **record}), overrides or {})


def sentence(loaded: Loaded, overrides: dict[str, Any]) -> str:
    return " ".join(assumptions(loaded, preprocess_of(loaded, overrides), assumed(loaded, overrides)))


def test_what_a_model_leaves_out_is_named_with_its_value_and_its_option():
    assert said({}) == (
        "net does not say how its images were made; assumed is --mean 0.485,0.456,0.406, --std 0.229,0.224,0.225, "
        "--interpolation bicubic, --resize center, --crop-pct 0.875. Set what was different in training."
    )


@pytest.mark.parametrize("name", ALL)
def test_a_field_that_the_record_or_the_request_gives_is_not_named(name):
    flag = f"--{name.replace('_', '-')} "
    for text in (said({name: ALL[name]}), said({}, {name: ALL[name]})):
        assert flag not in text
        assert text.count("--") == 4


def test_nothing_is_said_where_everything_is_known():
    assert said(ALL) == said({}, ALL) == said({"processor": "{}", "mean": (0,) * 3, "std": (1,) * 3}) == ""
    assert said({**ALL, "crop_mode": "center"}) == ""


@pytest.mark.parametrize("resize", ["letterbox", "corner"])
def test_a_letterbox_holds_the_whole_picture_unless_a_crop_is_asked_for(resize):
    loaded = Loaded("net", None, SIZE)
    assert preprocess_of(loaded, {"resize": resize}).placement(8, 4).scale == (1.0, 1.0)
    assert preprocess_of(loaded, {"resize": resize, "crop_pct": 0.5}).placement(8, 4).scale == (2.0, 2.0)
    assert "--crop-pct" not in said({}, {"resize": resize})


def test_a_python_file_is_told_what_it_left_out(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("from torch import nn\nINPUT_SIZE, MEAN = (3, 8, 8), (0, 0, 0)\ndef net(): return nn.Conv2d(3, 4, 3)\n")
    loaded = load_model(f"{path}:net")
    text = sentence(loaded, {})
    assert "--std 0.229,0.224,0.225, --interpolation bicubic, --resize squash, --crop-pct 1.0." in text
    assert "--mean" not in text
    path.write_text(path.read_text() + "STD, INTERPOLATION, RESIZE, CROP_PCT = (1, 1, 1), 'bilinear', 'center', 0.9\n")
    loaded = load_model(f"{path}:net")
    assert sentence(loaded, {}) == ""
    assert preprocess_of(loaded, {}).to_json() | {"resize": "center", "interpolation": "bilinear", "crop_pct": 0.9} == (
        preprocess_of(loaded, {}).to_json()
    )


@pytest.mark.parametrize("ref", ["demo", "demo:resnet20", "demo:detr"])
def test_the_demos_leave_nothing_out(ref):
    loaded = load_model(ref)
    assert sentence(loaded, {}) == ""


def test_a_module_without_a_record_is_told():
    loaded = load_model(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), overrides={"input_size": (3, 8, 8)})
    assert torch.equal(
        preprocess_of(loaded, {}).ends()[0].flatten(),
        -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]),
    )
    assert sentence(loaded, {"input_size": (3, 8, 8)})


def test_the_first_page_says_it():
    accuracy = {
        "float": None,
        "quantized": None,
        "agreement": 100.0,
        "agreement_measure": "agreement",
        "why": "",
        "runtime": "x",
        "interval": None,
    }
    assert good({"accuracy": accuracy, "notes": ["assumed <mean>"]}).loud == ["assumed <mean>"]
