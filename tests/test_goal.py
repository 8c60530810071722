"""A limit of the drop. Oracles: brute force over counts and over modules, files of another run, the images themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit.data.images import Preprocess, open_images
from fewbit.data.shares import halves
from fewbit.errors import BadImages, FewbitFailed
from fewbit.files import read_json
from fewbit.onnx_file import load_proto
from fewbit.report.answers import good, not_as_requested
from fewbit.report.goals import missed
from fewbit.request import Request
from fewbit.run import quantize
from fewbit.stages.settle import FILE, Walk, said


@pytest.fixture(scope="module", autouse=True)
def no_times():
    """Nothing is timed op by op: the order of modules does not depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbit.stages.times.absent", lambda target: "it is left out")
        yield


@pytest.mark.parametrize("most", range(10))
@pytest.mark.parametrize("needed", range(1, 11))
def test_the_fewest_that_suffice_are_those_of_brute_force(most: int, needed: int) -> None:
    walk, asked = Walk.__new__(Walk), list[int]()
    walk.asked = type("Asked", (), {"time": None})()

    def suffices(count: int) -> bool:
        asked.append(count)
        return count >= needed

    brute = next((count for count in range(1, most + 1) if count >= needed), 0)
    assert walk.fewest(suffices, most) == brute
    assert len(asked) == len(set(asked)) <= 8


class Ruined(nn.Module):
    """`b` reads a map with one place of a million times the others, which nothing reads behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3), nn.Linear(16, 10)
        place = torch.zeros(1, 1, 8, 8)
        place[..., 0, 0] = 3e3
        self.register_buffer("place", place)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(nn.functional.gelu(self.a(x)) + self.place)[..., 1:, 1:]
        return self.d(nn.functional.gelu(self.c(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(96, 3, 8, 8)).astype(np.float32))
    return path


def run(images: Path, out: Path | None = None, **options: object):
    torch.manual_seed(0)
    options = {"recipe": "minmax", "target": "ort-x86-vnni", "input_size": (3, 8, 8), "max_drop": 12.0, **options}
    return quantize(Ruined().eval(), images, scored=48, seconds=0.01, out=out, **options)


@pytest.fixture(scope="module")
def found(images: Path, tmp_path_factory: pytest.TempPathFactory):
    return run(images, tmp_path_factory.mktemp("found") / "run")


def test_the_layer_that_integers_ruin_is_left_float_and_no_other(found) -> None:
    first, second = read_json(found.folder / "tables.json")["goal"]
    assert (first["changes"], first["within"], first["taken"]) == ({}, False, False)
    assert (second["changes"], second["within"], second["taken"]) == ({"keep_float": ["b"]}, True, True)
    assert found.plan.exemptions == ("b",)
    assert set(found.plan.integer_ops) == {"a", "c", "d"}
    (left,) = [row for row in found.report["fallbacks"] if row["kind"] == "chosen"]
    assert (left["site"], left["why"]) == ("b", "in float by --max-drop")
    assert found.report["exemptions"] == []  # nobody asked for it
    assert 100 - found.report["accuracy"]["agreement"] <= 12
    assert second["what"] == "recipe minmax, float: b"
    note = found.report["goal"]
    assert (
        "2 files tried; the fastest within the limit was taken: recipe minmax, float: b. On the 12 images that chose it,"
        in note
    )
    assert note.endswith("Modules with the most loss for each multiply-accumulate were tried first.")
    assert note in good(found.report).lines
    assert not (found.folder / FILE).exists()


def test_each_row_says_all_that_differs_from_what_was_asked() -> None:
    walk, rows = Walk.__new__(Walk), list[tuple[str, dict]]()
    walk.asked = Request(model="demo", bits="4,first=8", time=None, keep_float="stem")
    walk.order = lambda base: ([SimpleNamespace(module=name, ops=(name,)) for name in ("head", "stem.1")], "loss")
    walk.tried = lambda what, changes, by: rows.append((what, changes)) or {"within": what.endswith("float: head")}
    walk.raised({"what": "recipe fast", "changes": {"recipe": "fast"}})
    assert [what for what, _ in rows] == [
        "recipe fast, 8 bits: head",
        "recipe fast, 8 bits: head, stem.1",
        "recipe fast, 8 bits everywhere, float: head",
    ]
    assert rows[1][1] == {"recipe": "fast", "bits": "w4a4,first=8,head=8,stem.1=8"}
    assert rows[2][1] == {"recipe": "fast", "bits": "8", "keep_float": ["stem", "head"]}


def test_the_sentence_says_which_file_was_taken_and_whether_it_is_within() -> None:
    row = {
        "taken": True,
        "within": True,
        "what": "recipe mse",
        "limit": 0.5,
        "measure": "accuracy",
        "unit": "%",
        "drop": -0.2,
        "images": 50,
        "by": "",
    }
    note = said([row])
    assert note == (
        "--max-drop 0.5: 1 file tried; the fastest within the limit was taken: recipe mse. On the 50 images that chose it, "
        "accuracy rose by 0.20 points."
    )
    note = said([{**row, "within": False, "drop": 1.0}])
    assert "none is within the limit, so the nearest was taken: recipe mse." in note
    assert note.endswith("accuracy fell by 1.00 points.")
    assert said([{**row, "measure": "PSNR", "unit": "dB", "drop": 1.0}]).endswith("PSNR fell by 1.00 dB.")
    assert said([]) == ""


def test_images_that_chose_are_not_scored(found, images: Path) -> None:
    record, pixels = read_json(found.folder / "run.json"), np.load(images)
    assert found.report["images"] == {"calibration": 72, "scored": 12}
    assert len(set(record["calibrated_on"])) == 84  # and 12 that chose
    assert len(pixels) == 84 + 12


def test_half_of_the_images_choose_and_the_others_score() -> None:
    every = open_images(np.zeros((7, 3, 8, 8), np.float32), Preprocess((3, 8, 8)))
    first, second = halves(every, 2)
    assert [*first.rows] == [*every.subset([0, 1, 4, 5]).rows]
    assert [*second.rows] == [*every.subset([2, 3, 6]).rows]
    with pytest.raises(BadImages, match=r"there are only 7 to score on; give more: --score DIR"):
        halves(every, 4)


@pytest.mark.slow
def test_the_file_is_that_of_a_run_that_was_asked_for_it(found, images: Path) -> None:
    direct = run(images, max_drop=None, keep_float="b")
    assert load_proto(direct.folder / "model.onnx").graph == load_proto(found.folder / "model.onnx").graph


@pytest.mark.slow
def test_a_killed_walk_goes_on_from_the_files_that_it_has_measured(
    found, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, calls = Walk.measure, list[int]()

    def killed(self: Walk, index: int, request: object) -> object:
        calls.append(index)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return once(self, index, request)

    monkeypatch.setattr(Walk, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "run")
    again = run(images, tmp_path / "run")
    assert calls == [0, 1, 1]
    assert load_proto(again.folder / "model.onnx").graph == load_proto(found.folder / "model.onnx").graph


@pytest.mark.slow
def test_where_no_file_is_within_the_limit_the_nearest_is_written_and_fails(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitFailed, match=r"fell by 0\.\d+ points; --max-drop allows 0\.") as failed:
        run(images, tmp_path / "run", max_drop=0.0)
    assert read_json(tmp_path / "run" / "report.json")["missed"] == [str(failed.value)]
    rows = read_json(tmp_path / "run" / "tables.json")["goal"]
    assert not any(row["within"] for row in rows)
    assert [row["drop"] for row in rows if row["taken"]] == [min(row["drop"] for row in rows)]


def test_a_limit_that_the_scored_images_exceed_is_in_the_report_and_raised(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitFailed) as failed:
        run(images, tmp_path / "run", max_drop=0.0, time="0.001s", quick=True, calibration=8)
    report = read_json(tmp_path / "run" / "report.json")
    drop = 100 - report["accuracy"]["agreement"]
    (said,) = report["missed"]
    assert str(failed.value) == said
    assert f"fell by {drop:.2f} points; --max-drop allows 0." in said
    assert report["missed"] == missed(report, 0.0, False)
    assert said in not_as_requested(report).loud
    assert "not kept" in (tmp_path / "run" / "report.html").read_text()
