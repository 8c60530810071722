"""What an ONNX file says of its images. The oracle is what was asked for, and what stood in the file that went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from fewbit.capture import capture
from fewbit.core.plan import Plan
from fewbit.core.record import ENTRY, Record, read_entry
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadModel
from fewbit.load import load_model
from fewbit.progress import Progress
from fewbit.report.page import render
from fewbit.request import Request
from fewbit.stages.load import load
from fewbit.stages.preprocessing import assumed, preprocess_of
from fewbit.stages.realize import realize
from fewbit.stages.twin import float_model
from onnx_reader.test_files import net, written

SAID = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0), "interpolation": "bilinear", "crop_pct": 0.75}
OWN = {"stride": "32", "names": '{"0": "cat"}'}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """model.onnx and float.onnx of a file with metadata of its own, and of a plan without choices."""
    folder, model = tmp_path_factory.mktemp("net"), net()
    onnx.helper.set_model_props(model, OWN)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    request = Request(model=str(written(model, folder)), images=images, target="ort-x86-vnni", **SAID)
    inputs, out = load(request), tmp_path_factory.mktemp("run")
    graph, plan = capture(inputs.loaded), Plan("ort-x86-vnni", "mse", "w8a8", {}, ())
    return realize(graph, plan, inputs, request, out, Progress()), float_model(graph, inputs.scored, inputs, request, out)[0]


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_both_files_say_how_their_images_are_made_and_what_the_file_that_went_in_said(made):
    for path in made:
        entries = metadata(path)
        assert json.loads(entries.pop(ENTRY)) == {
            "size": [3, 8, 8], "layout": "NCHW", "dtype": "float32", "channel_order": "RGB", "normalize": "outside",
            "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0], "interpolation": "bilinear", "resize": "center",
            "crop_pct": 0.75, "antialias": True, "assumed": ["resize"],
        }  # fmt: skip
        assert entries == OWN


def test_a_float_file_of_fewbit_has_its_preprocessing_with_it(made):
    loaded = load_model(str(made[1]))
    assert preprocess_of(loaded, {}) == Preprocess((3, 8, 8), **SAID, resize="center")
    assert assumed(loaded, {}) == ("resize",)
    assert loaded.metadata == metadata(made[1])
    assert preprocess_of(loaded, {"crop_pct": 1.0}).crop_pct == 1.0
    again = Record(preprocess_of(loaded, {}).to_json(), assumed(loaded, {}), loaded.metadata)
    assert again.entries() == metadata(made[1])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "is not a record of preprocessing"),
        ("[1]", "is not a record of preprocessing (it is a list)"),
        ('{"mean": "0.5"}', "mean is '0.5'"),
        ('{"mean": [0.5, 0.5, 99]}', f"metadata entry {ENTRY}: mean [0.5, 0.5, 99] is not allowed"),
        ('{"mean": [0.5, 0.5]}', f"metadata entry {ENTRY}: mean has 2 numbers and the model 3 channels"),
        (
            '{"std": [1, 1]}',
            "std has 2 numbers and the model 3 channels; give 3 or one for all, as in --std 0.5. The input size",
        ),
        ('{"crop_pct": 1e9}', "crop_pct 1000000000.0 is not allowed"),
    ],
)
def test_a_broken_entry_is_refused_by_its_name(tmp_path, entry, said):
    model = net()
    onnx.helper.set_model_props(model, {ENTRY: entry})
    with pytest.raises(BadModel) as error:
        load_model(str(written(model, tmp_path)))
    assert said in str(error.value)
    assert str(tmp_path / "model.onnx") in str(error.value)


def test_a_record_is_that_of_its_json_and_an_entry_that_of_its_text():
    record = Record(Preprocess((3, 4, 5)).to_json(), ("mean",), OWN)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert read_entry({}) == {}
    kept = {name: value for name, value in record.preprocess.items() if name not in ("processor", "whole")}
    assert read_entry(record.entries()) == {**kept, "assumed": ["mean"]}


def test_a_processor_that_flips_channels_is_said():
    flips = Preprocess((3, 4, 5), processor=json.dumps({"do_flip_channel_order": True}))
    assert Record(flips.to_json()).images(inside=False)["channel_order"] == "BGR"


def test_the_page_shows_it():
    page = render({}, {"input": [Record(Preprocess((3, 4, 5)).to_json(), ("mean",)).images(inside=True)]})
    assert "What the file takes" in page
    assert "<dt>channel_order</dt><dd>RGB</dd>" in page
