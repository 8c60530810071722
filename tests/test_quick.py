"""`--quick`. Oracle: the run without it, which has the same files and the same proof."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewbit import Run, quantize
from fewbit.cli import app
from fewbit.errors import FewbitError
from fewbit.files import read_json
from fewbit.report.page import joined
from fewbit.request import Request

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
