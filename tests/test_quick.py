"""`--quick`. Oracle: the run without it, which has the same files and the same proof."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fewbit import Run, quantize
from fewbit.cli import app
from fewbit.errors import FewbitError
from fewbit.files import read_json
from fewbit.report.page import joined
from fewbit.request import Request
from fewbit.run import _options
from fewbit.stages import SENSITIVITY, STAGES
from fewbit.task import Segment

OPTIONS = {"calibration": 4, "scored": 8, "threads": 1, "seconds": 0.01}
LEFT_OUT = ("latency", "loads", "sensitivity", "outliers", "attention", "attended", "flips", "images", "pictures")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quick run and a whole one."""
    folders = (tmp_path_factory.mktemp("quick") / "run", tmp_path_factory.mktemp("whole") / "run")
    for folder, quick in zip(folders, (True, False), strict=True):
        quantize("demo:resnet20", out=folder, quick=quick, **OPTIONS)
    return folders


def test_a_quick_run_has_the_same_files_proof_and_score(both: tuple[Path, Path]) -> None:
    quick, whole = both
    for name in ("model.onnx", "float.onnx", "plan.json", "plan.safetensors", "exported.pt2"):
        assert (quick / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (read_json(folder / "report.json") for folder in both)
    for name in ("verify", "accuracy", "images", "size", "fallbacks"):
        assert ours[name] == theirs[name]
    assert theirs["skipped"] == []
    assert theirs["latency"]


def test_what_is_left_out_was_not_done_and_is_said(both: tuple[Path, Path]) -> None:
    quick, whole = both
    report, tables = (read_json(quick / name) for name in ("report.json", "tables.json"))
    assert report["latency"] == {}
    assert report["pays"] is None
    assert not {"bench", "sensitivity"} & report["seconds"].keys()
    assert not any(tables.get(name) for name in LEFT_OUT)
    assert read_json(whole / "tables.json")["images"]
    page = re.sub("<[^>]+>", "", (quick / "report.html").read_text())  # as it is read
    assert "Times were not measured (--quick)" in page
    assert "Left out on request (--quick): times, sensitivity of modules" in page
    assert "--quick" not in (whole / "report.html").read_text()


def test_a_quick_run_is_opened_shown_drawn_again_and_exported(both: tuple[Path, Path], tmp_path: Path) -> None:
    quick, _ = both
    assert Run.open(quick)["plan"].choices
    runner = CliRunner()
    for command in (["show", str(quick)], ["report", str(quick)], ["export", str(quick), "--to", str(tmp_path / "taken")]):
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "Times were not measured (--quick)" in runner.invoke(app, ["show", str(quick)]).output
    assert (tmp_path / "taken" / "model.onnx").exists()
    assert runner.invoke(app, ["serve", str(quick), "--help"]).exit_code == 0


def test_a_stage_leaves_no_value_of_a_run_at_its_default() -> None:
    """`Stage.takes` passes parameters with a default only where they are given by name."""
    request = Request(model="demo", quick=True)
    for stages in (STAGES, SENSITIVITY):
        values = {*_options(request), *(name for stage in stages for name in stage.gives)}
        for function in (one for stage in stages for one in (stage.run, stage.load) if one is not None):
            parameters = inspect.signature(function).parameters.values()
            assert not {one.name for one in parameters if one.default is not one.empty} & values, function


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_draws_no_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    drawn = []
    monkeypatch.setattr(Segment, "drawn", lambda self, picture, outputs: drawn.append(picture))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    options = {"task": "segment", "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    quantize(net, pixels, out=tmp_path / "run", quick=quick, **OPTIONS, **options)
    assert len(drawn) == (0 if quick else 16)
    run = Run.open(tmp_path / "run")
    drawn.clear()
    run.do("evaluate", scored=run.images(pixels), threads=1)
    assert not drawn


@pytest.mark.parametrize("option", ["must_pay", "only_what_pays"])
def test_a_verdict_about_time_is_refused(option: str) -> None:
    with pytest.raises(FewbitError, match="needs times, and --quick measures none"):
        Request(model="demo", quick=True, **{option: True})


def test_every_site_has_the_loss_of_its_module(both: tuple[Path, Path]) -> None:
    """Each site belongs to one module, and the shares of all modules are the whole."""
    report, tables = (read_json(both[1] / name) for name in ("report.json", "tables.json"))
    sites = joined(report, tables)["sites"]
    of = {row["module"]: row["module_share"] for row in sites}  # a KeyError where a site has none
    assert len(of) == len(tables["sensitivity"]) > 10
    assert math.isclose(sum(of.values()), 1)
    for name, graph_module in ((row["site"], row["module"]) for row in sites):
        assert name.startswith(graph_module), (name, graph_module)
