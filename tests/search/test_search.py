"""A search from model to folder. Oracle: the run that a point's own command makes."""

from __future__ import annotations

import importlib
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.core.record import MADE
from fewbit.errors import FewbitError
from fewbit.files import read_json
from fewbit.onnx_file import load_proto
from fewbit.runtimes import runtime_names
from fewbit.search import search
from fewbit.search.judge import Judge
from fewbit.verify.bench import paired

MODEL = """
import torch
from torch import nn
INPUT_SIZE, MEAN, STD = (3, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 4)
    def forward(self, x):
        a = self.pool(torch.relu(self.a(x)))
        b = a + torch.relu(self.b(a))
        return self.head(torch.cat([a, b], 1).mean((2, 3)))

def model():
    torch.manual_seed(0)
    return Net().eval()
"""
needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    (root / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / "images" / "abcd"[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("1bit", "; the smallest that one keeps is --budget 4bit: give"),
        ("0.4KB", ": the weights alone at their narrowest are 0.6KB"),
    ],
)
def test_a_budget_that_no_weights_keep_is_refused_before_any_range(place, tmp_path, monkeypatch, budget, says):
    module = importlib.import_module("fewbit.search.search")
    monkeypatch.setattr(module, "Model", lambda *_: pytest.fail("ranges are chosen"))
    model, images = f"{place / 'net.py'}:model", place / "images"
    with pytest.raises(FewbitError, match=rf"keeps the budget {budget}{says}"):
        search(model, images, out=tmp_path / "out", budget=(budget,), target="ort-x86-vnni", evaluations=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-x86-vnni", pytest.param("openvino-x86", marks=needs_openvino)])
def test_the_command_of_a_point_makes_the_file_that_was_judged(place, tmp_path, monkeypatch, target):
    for module in ("verify.latency", "verify.times", "verify.bench"):
        monkeypatch.setattr(importlib.import_module(f"fewbit.{module}"), "paired", lambda calls, *_: paired(calls, 0.001, 2))
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    asked = ["search", f"{place / 'net.py'}:model", "--images", str(place / "images"), "--target", target]
    asked += ["--budget", "5bit", "--evaluations", "6", "--points", "1"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row = next(row for row in read_json(Path("search/report.json"))["points"] if row["searched"])
    assert row["weight_bits"] <= 5
    again = shlex.split(row["command"])[1:]
    assert CliRunner().invoke(app, again, catch_exceptions=False).exit_code == 0
    report = read_json(Path("run-01/report.json"))
    model = load_proto(tmp_path / "run-01" / "model.onnx")
    entry = next(one for one in model.metadata_props if one.key == MADE)  # which a point of a search does not have
    model.metadata_props.remove(entry)
    assert model.ByteSize() == row["bytes"]
    assert {k: report["accuracy"][k] for k in ("float", "quantized", "agreement")} == {
        k: row[k] for k in ("float", "quantized", "agreement")
    }


@pytest.mark.slow
def test_the_time_limit_counts_what_was_before_the_search_and_the_points_behind_it(place, tmp_path, monkeypatch):
    module, began = importlib.import_module("fewbit.search.search"), time.monotonic()
    monkeypatch.setattr(Judge, "uniform", lambda self: time.sleep(0.5))
    found = {}

    def climb(*_, seconds, journal, **options):
        found.update(seconds=seconds, spent=journal.seconds, since=time.monotonic() - began)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "climb", climb)
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        search(f"{place / 'net.py'}:model", place / "images", out=tmp_path / "out", time="100s", points=4)
    assert found["seconds"] == pytest.approx(100 - 4 * 0.5, abs=0.4)
    assert found["since"] - 1 < found["spent"] <= found["since"]
