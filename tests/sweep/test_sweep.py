"""A sweep of runs that are made up. Oracle: which runs were made; a sweep that was not killed; the numbers of the reports."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewbit import __version__
from fewbit.cli import app
from fewbit.errors import BadFile, BadModel, FewbitError, InUse, Stopped
from fewbit.files import read_json, write_json
from fewbit.folder import checked, seal
from fewbit.report.goals import missed
from fewbit.report.matrix import flat, render
from fewbit.request import Request, SweepRequest
from fewbit.sweep import execute, row
from fewbit.workers import Local
from fewbit.workers.machines import _looked

TEXT = 'models = ["demo", "demo:resnet20"]\ntargets = ["ort-x86-vnni", "ort-x86-w4"]\nbits = [8, 4]\n'


def report(bits: str, problems: list[str]) -> dict[str, Any]:
    """What a report.json has of what a row says."""
    accuracy = {"measure": "top-1 accuracy", "unit": "%", "float": 90.0, "quantized": 89.0, "agreement": 97.0, "why": ""}
    return {
        "bits": bits,
        "accuracy": {**accuracy, "interval": [-2.0, 0.5]},
        "verify": {"problems": problems, "codes_wrong": len(problems), "codes_compared": 1000},
        "size": {"onnx_bytes": 1_500_000, "float_bytes": 6_000_000},
        "pays": {
            "pays": False,
            "ratio": 1.01,
            "interval": [1.0, 1.02],
            "ms": 1.25,
            "runtime": "onnxruntime",
            "float_ms": 1.26,
            "float_runtime": "onnxruntime",
        },
        "latency": {"onnxruntime": {"ratio": 2.0, "quantized_ms": 1.25}, "openvino": {"ratio": 0.5, "quantized_ms": 4.0}},
        "integer_share": 0.75,
        "fallbacks": [{"kind": "chosen"}, {"kind": "site"}, {"kind": "chosen"}, {"kind": "accumulator"}],
        "seconds": {"load": 1.0, "choose": 2.5},
    }


class Runs:
    """In the place of fewbit.run.execute: writes such a run, or does what `instead` says of it."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.instead: Callable[[Request], list[str] | None] = lambda request: None

    def __call__(self, request: Request) -> None:
        problems = self.instead(request) or []
        self.made.append(f"{request.model} {request.target} {request.bits}")
        assert request.out is not None
        found = report(str(request.bits), problems)
        write_json(request.out / "report.json", {**found, "missed": missed(found, request.max_drop, request.must_pay)})
        write_json(request.out / "plan.json", {})
        seal(request.out)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(TEXT)
    runs = Runs()
    monkeypatch.setattr(row, "execute", runs)
    return runs


def swept(**options: Any) -> list[dict[str, Any]]:
    return list(execute(SweepRequest(file=Path("a.toml"), **options))["rows"])


def test_a_row_for_each_combination_in_the_order_of_the_file_with_the_numbers_of_its_report(runs: Runs) -> None:
    rows = swept()
    asked = [(m, t, b) for m in ("demo", "demo:resnet20") for t in ("ort-x86-vnni", "ort-x86-w4") for b in ("8", "4")]
    assert [(r["model"], r["target"], r["bits"]) for r in rows] == asked
    assert runs.made == [" ".join(a) for a in asked if a[1:] != ("ort-x86-w4", "8")]
    assert [r["end"] for r in rows] == ["right", "right", "refused", "right"] * 2
    assert "has no integers wider than 4 bits" in rows[2]["why"]
    assert (rows[0]["faster"], rows[0]["bytes"], rows[0]["fallbacks"], rows[0]["seconds"]) == (
        {"onnxruntime": 2.0, "openvino": 0.5}, 1_500_000, 2, 3.5
    )  # fmt: skip
    record = checked(Path("sweep"), "sweep")
    assert sum(name.endswith("/plan.json") for name in record["files"]) == 6
    assert read_json(Path("sweep/report.json"))["rows"] == json.loads(json.dumps(rows))
    lines = list(csv.DictReader(Path("sweep/rows.csv").read_text().splitlines()))
    assert [(line["model"], line["end"], line["low"], line["faster onnxruntime"]) for line in lines[1:3]] == [
        ("demo", "right", "-2.0", "2.0"), ("demo", "refused", "", "")
    ]  # fmt: skip


def test_rows_can_be_told_apart_in_80_columns(runs: Runs) -> None:
    """What is the same in all rows stands above them; what is not is there in full, in a list or in a table."""
    done = CliRunner().invoke(app, ["sweep", "a.toml", "--out", "out"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    assert "All rows: recipe fast.\n" in done.output
    names = re.findall(r"model: (\S+)\ntarget: (\S+)\nbits: (\S+)\n", done.output)
    assert names == list(itertools.product(("demo", "demo:resnet20"), ("ort-x86-vnni", "ort-x86-w4"), ("8", "4")))
    Path("a.toml").write_text('models = ["demo", "demo:resnet20"]\ntargets = ["ort-x86-vnni"]\nbits = [8, 4]\n')
    done = CliRunner().invoke(app, ["sweep", "a.toml", "--out", "two"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert "All rows: target ort-x86-vnni, recipe fast.\n" in done.output
    rows = re.findall(r"^│ (\S+) +│ (\d) +│ right │ 89.00 % .*│ 1.50 MB ", done.output, re.MULTILINE)
    assert rows == list(itertools.product(("demo", "demo:resn"), ("8", "4")))  # which goes on: et20


def test_a_killed_sweep_makes_each_row_once_and_is_the_same_as_one_that_was_not(runs: Runs) -> None:
    whole, once = swept(out=Path("whole")), list(runs.made)
    runs.made.clear()

    def kill(request: Request) -> None:
        if len(runs.made) == 3:
            runs.instead = lambda request: None
            raise KeyboardInterrupt

    runs.instead = kill
    with pytest.raises(KeyboardInterrupt):
        swept()
    assert not Path("sweep").exists()
    assert swept() == whole
    assert runs.made == once


def test_rows_of_another_file_are_made_and_those_that_are_left_are_not(runs: Runs) -> None:
    runs.instead = lambda request: (_ for _ in ()).throw(KeyboardInterrupt) if len(runs.made) == 4 else None
    with pytest.raises(KeyboardInterrupt):
        swept()
    Path("a.toml").write_text(TEXT.replace("demo:resnet20", "demo:mobilenet"))
    runs.instead = lambda request: None
    rows = swept()
    assert sum(made.startswith("demo ") for made in runs.made) == 3  # not twice
    assert {r["model"] for r in rows} == {"demo", "demo:mobilenet"}
    assert not [path for path in Path("sweep/rows").iterdir() if "resnet20" in path.name]


def test_what_ends_a_row_is_told_in_words_and_only_a_refusal_is_kept(runs: Runs) -> None:
    ends = [BadModel("no such layer"), Stopped("the disk is full"), ValueError("a bug"), None, None, KeyboardInterrupt()]

    def fail(request: Request) -> list[str] | None:
        error = ends[len(seen)]
        seen.append(request.model)
        if error is not None:
            raise error
        return ["a:weight: 1 code is not the plan's"] if len(seen) == 4 else None

    seen: list[str] = []
    runs.instead = fail
    with pytest.raises(KeyboardInterrupt):
        swept()
    runs.instead = lambda request: seen.append("again")  # type: ignore[assignment,return-value]
    rows = swept()
    assert [(r["end"], r["why"]) for r in rows if r["end"] != "right"] == [
        ("refused", "BadModel: no such layer"),
        ("refused", rows[2]["why"]),
        ("wrong", "a:weight: 1 code is not the plan's"),
        ("refused", rows[6]["why"]),
    ]
    assert seen[6:] == ["again"] * 3  # the two that were no fault of the row, and the one that was killed


def test_a_row_that_misses_a_goal_of_its_options_is_not_right(runs: Runs) -> None:
    runs.instead = lambda request: ["a:weight: 1 code is not the plan's"] if request.bits == "4" else None
    Path("a.toml").write_text('models = ["demo"]\ntargets = ["ort-x86-vnni"]\nbits = [8, 4]\n[options]\nmax_drop = 0.5\n')
    row, both = swept()
    fell = "top-1 accuracy fell by 1.00 points; --max-drop allows 0.5. The change is -2.00 to 0.50 (95 %)."
    assert (row["end"], row["why"]) == ("missed", fell)
    assert (both["end"], both["why"]) == ("wrong", f"a:weight: 1 code is not the plan's; {fell}")
    assert [line["end"] for line in csv.DictReader(Path("sweep/rows.csv").read_text().splitlines())] == ["missed", "wrong"]
    assert fell in Path("sweep/report.html").read_text()
    runs.instead = lambda request: None
    for option, ends in (("max_drop = 1.0", ["right"]), ("must_pay = true", ["missed"])):
        Path("a.toml").write_text(f'models = ["demo"]\ntargets = ["ort-x86-vnni"]\n[options]\n{option}\n')
        rows = swept(out=Path(option[:8]))
        assert [found["end"] for found in rows] == ends
    assert rows[0]["why"].startswith("--must-pay asks for 2 % faster in paired rounds, and the file is 1.01 × faster")


def test_a_row_waits_for_the_end_of_who_was_at_it(runs: Runs, monkeypatch) -> None:
    def busy(request: Request) -> None:
        if len(waits) < 2:
            raise InUse("in use by process 1")

    waits: list[float] = []
    monkeypatch.setattr(row.time, "sleep", waits.append)
    runs.instead = busy
    assert swept()[0]["end"] == "right"
    assert len(waits) == 2
    runs.instead = lambda request: (_ for _ in ()).throw(InUse("in use by process 1"))
    monkeypatch.setattr(row, "PATIENCE", -1.0)
    rows = swept(out=Path("other"))
    assert [r["end"] for r in rows] == ["stopped", "stopped", "refused", "stopped"] * 2
    assert not list(Path("other/rows").glob("*.json"))


def test_a_row_whose_run_was_changed_is_not_taken(runs: Runs) -> None:
    runs.instead = lambda request: (_ for _ in ()).throw(KeyboardInterrupt) if len(runs.made) == 2 else None
    with pytest.raises(KeyboardInterrupt):
        swept()
    file = next(Path("sweep.part/rows").glob("*/report.json"))
    file.write_text(file.read_text().replace("97.0", "98.0"))
    with pytest.raises(BadFile, match=r"report.json: changed after fewbit wrote it"):
        swept()


def test_a_machine_that_lacks_a_file_or_has_another_version_is_refused_before_any_work(runs: Runs, monkeypatch) -> None:
    for found, says in (
        (
            (__version__, ["photos", "net.onnx"]),
            "other has no photos and 1 more; every machine needs models, images",
        ),
        (("0.0.1", []), "other has fewbit 0.0.1 and this machine"),
    ):
        monkeypatch.setattr(
            Local, "everywhere", lambda self, function, item, found=found: {"here": function(item), "other": found}
        )
        with pytest.raises(FewbitError, match=says):
            swept()
        assert not runs.made
        assert not list(Path().glob("sweep*"))


def test_what_a_machine_lacks_is_told_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    paths = [str(tmp_path), f"{tmp_path}/net.py:small", f"{tmp_path}/gone.onnx", f"{tmp_path}/gone.py:small"]
    assert _looked(paths) == (__version__, paths[2:])


def test_a_folder_that_is_something_else_is_refused(runs: Runs) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    with pytest.raises(BadFile, match="mine exists and is not a sweep of fewbit"):
        swept(out=Path("mine"))
    assert not runs.made


def test_the_page_escapes_what_it_is_given_and_names_every_row() -> None:
    found = {"row": "a", "model": "<b>x", "target": "t", "recipe": "mse", "bits": "w8a8", "end": "right", "why": ""}
    found |= {"measure": "m", "float": None, "quantized": None, "agreement": 97.123, "interval": [95.0, 99.0], "codes_wrong": 0}
    found |= {"codes_compared": 10, "bytes": 1_500_000, "faster": {"onnxruntime": 0.5}, "ms": {"onnxruntime": 2.0}}
    found |= {"integer_share": 1.0, "fallbacks": 0, "seconds": 1.0}
    other = {"row": "b", "model": "y", "target": "t", "recipe": "mse", "bits": None, "end": "refused", "why": "<i>no</i>"}
    page = render({"rows": [found, other], "file": "a/b.toml", "at once": 1, "command": "fewbit sweep"})
    assert "<b>x" not in page
    assert "<i>no" not in page
    for words in (
        "Sweep: b",
        "97.12",
        "95.00\u00a0% to 99.00\u00a0%",
        "1.50",
        "2.00\u00a0× slower in onnxruntime",
        "&lt;i&gt;no",
        "rows/a/report.html",
    ):
        assert words in page
    assert math.isclose(flat(found)["ms onnxruntime"], 2.0)
    found |= {"measure": "PSNR", "unit": "dB", "float": 23.0, "quantized": 22.91, "interval": [-0.5, 0.1]}
    page = render({"rows": [found], "file": "b.toml", "at once": 1, "command": "fewbit sweep"}).replace("\u00a0", " ")
    assert [said in page for said in ("23.00 dB", "22.91 dB", "22.50 dB to 23.10 dB", "97.12 %", "22.91 %")] == [
        *[True] * 4, False,
    ]  # fmt: skip
