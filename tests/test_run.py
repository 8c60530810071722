"""The loop of the stages. Oracles: how often fake stages are called; the bytes of a run that nobody killed."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fewbit import Run
from fewbit.data import images as decoded
from fewbit.data.images import Memory, open_images
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadImages, BadValues, FewbitError, Stopped
from fewbit.files import write_json
from fewbit.folder import Workplace
from fewbit.progress import Progress
from fewbit.run import quantize
from fewbit.stages import REOPENED, STAGES, Stage
from fewbit.unfinished import keep_rows, rows_so_far


class Told(Progress):
    """What the user was told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


SAME = ("plan.json", "plan.safetensors", "model.onnx", "float.onnx", "images.safetensors", "exported.pt2")


class Fake:
    """Stages that count their calls and write a file each: b needs a, c needs b and a."""

    def __init__(self, dies: str = "") -> None:
        self.calls: list[str] = []
        self.dies = dies

    def stages(self) -> tuple[Stage, ...]:
        def one(name: str, gives: str, run: Callable[..., Any], load: bool = True) -> Stage:
            return Stage(name, run, (gives,), (f"{gives}.json",), self.read(gives) if load else None, scratch=())

        return one("first", "a", self.first), one("second", "b", self.second), one("third", "c", self.third, load=False)

    def read(self, gives: str) -> Callable[..., Any]:
        def load(folder: Path) -> str:
            self.calls.append(f"read {gives}")
            return (folder / f"{gives}.json").read_text()

        return load

    def made(self, name: str, value: str, folder: Path) -> str:
        if name == self.dies:
            raise KeyboardInterrupt
        self.calls.append(name)
        (folder / f"{name}.json").write_text(value)
        return value

    def first(self, folder: Path) -> str:
        return self.made("a", "1", folder)

    def second(self, a: str, folder: Path, more: str = "") -> str:
        return self.made("b", a + "2" + more, folder)

    def third(self, a: str, b: str, folder: Path) -> str:
        return self.made("c", a + b + "3", folder)


def test_a_value_is_made_once_with_what_it_needs_when_it_is_asked_for(tmp_path: Path) -> None:
    fake = Fake()
    run = Run(tmp_path, fake.stages(), {})
    assert run["c"] == "1123"
    assert fake.calls == ["a", "b", "c"]
    assert (run["b"], run.do("second"), fake.calls) == ("12", "12", ["a", "b", "c"])
    assert set(run.progress.seconds) == {"first", "second", "third"}


def test_a_value_that_no_stage_makes_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="accuracy"):
        _ = Run(tmp_path, Fake().stages(), {})["accuracy"]


@pytest.mark.parametrize(
    ("dies", "again"), [("a", ["a", "b", "c"]), ("b", ["read a", "b", "c"]), ("c", ["read a", "read b", "c"])]
)
def test_a_killed_run_goes_on_behind_the_last_file(tmp_path: Path, dies: str, again: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        _ = Run(tmp_path, Fake(dies).stages(), {})["c"]
    fake = Fake()
    assert Run(tmp_path, fake.stages(), {})["c"] == "1123"
    assert fake.calls == again


def test_a_stage_runs_again_with_other_values_and_shares_what_it_does_not_change(tmp_path: Path) -> None:
    fake = Fake()
    run = Run(tmp_path, fake.stages(), {})
    assert run["b"] == "12"
    assert run.do("second", more="!") == "12!"
    assert run.do("second", a="7") == "72"
    assert fake.calls == ["a", "b", "b", "b"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net's file and an array of images."""
    root = tmp_path_factory.mktemp("run")
    (root / "net.py").write_text(
        "import torch\nfrom torch import nn\nINPUT_SIZE, MEAN, STD = (3, 16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)\n"
        "    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(512, 4)).eval()\n"
    )
    np.save(root / "x.npy", np.random.default_rng(0).integers(0, 255, (24, 20, 20, 3), dtype=np.uint8))
    return root


def small(place: Path, out: Path, **options: Any) -> Any:
    return quantize(f"{place / 'net.py'}:model", place / "x.npy", out=out, recipe="fast", seconds=0.01, **options)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nobody killed."""
    return Path(small(place, place / "whole").folder)


def killed_behind(name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    once = Run.do

    def killed(self: Run, stage: str, **given: Any) -> Any:
        made = once(self, stage, **given)
        if stage == name:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Run, "do", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(Run, "do", once)


STOPS = {stage.name: () if stage.name in ("choose", "evaluate") else pytest.mark.slow for stage in STAGES}


@pytest.mark.parametrize("name", [pytest.param(k, marks=v) for k, v in STOPS.items() if k not in ("load", "curve", "twin")])
def test_a_run_that_was_killed_in_any_stage_goes_on_to_the_same_bytes(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    killed_behind(name, monkeypatch, lambda: small(place, tmp_path / "run"))
    assert (tmp_path / "run.part" / "request.json").exists()
    small(place, tmp_path / "run")
    for file in SAME:
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes(), file
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in whole.iterdir()}


def test_a_changed_file_of_a_killed_run_is_refused_by_name_and_made_again_once_it_is_removed(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    killed_behind("summarize", monkeypatch, lambda: small(place, out))
    part = tmp_path / "run.part"
    for name in ("exported.pt2", "plan.safetensors", "stages.json"):
        content = (part / name).read_bytes()
        (part / name).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        with pytest.raises(
            Stopped, match=rf"run\.part/{re.escape(name)} (was changed after|is not as).*remove it: the same command"
        ):
            small(place, out)
        assert (part / name).exists()
        (part / name).write_bytes(content)
    (part / "plan.safetensors").unlink()
    small(place, out)
    for file in SAME:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_what_was_made_of_a_removed_file_is_made_again_and_what_no_stage_finished_too(tmp_path: Path) -> None:
    assert Run(tmp_path, Fake().stages(), {})["c"] == "1123"
    (tmp_path / "a.json").unlink()
    fake = Fake()
    run = Run(tmp_path, fake.stages(), {})
    assert (run["a"], run["b"], fake.calls) == ("1", "12", ["a", "b"])
    (tmp_path / "stages.json").unlink()  # as where a stage is killed between its file and the digest
    (tmp_path / "a.json").write_text("half")
    fake = Fake()
    run = Run(tmp_path, fake.stages(), {})
    assert (run["a"], run["b"], fake.calls) == ("1", "12", ["a", "b"])


def test_each_file_of_a_stage_is_compared_before_it_is_used(tmp_path: Path) -> None:
    def stages() -> tuple[Stage, ...]:
        def made(folder: Path) -> int:
            for name in ("a.json", "b.onnx", "b.onnx.data"):
                (folder / name).write_text(name)
            return 1

        return (Stage("first", made, ("a",), ("a.json", "b.onnx"), lambda folder: 2),)

    assert (Run(tmp_path, stages(), {})["a"], Run(tmp_path, stages(), {})["a"]) == (1, 2)
    for name in ("a.json", "b.onnx", "b.onnx.data"):
        (tmp_path / name).write_text("another")
        with pytest.raises(
            Stopped, match=rf"{name} was changed after fewbit wrote it \(SHA-256\), and is not used\. Restore it"
        ):
            _ = Run(tmp_path, stages(), {})["a"]
        (tmp_path / name).unlink()
        assert (Run(tmp_path, stages(), {})["a"], Run(tmp_path, stages(), {})["a"]) == (1, 2)


@pytest.mark.parametrize("file", ["goal.json", "curve.json"])
def test_changed_rows_of_a_killed_run_are_refused_by_name(tmp_path: Path, file: str) -> None:
    rows = [{"drop": 0.25, "images": 8}, {"drop": 1.5, "images": 16}]
    assert rows_so_far(tmp_path / file) == []
    keep_rows(tmp_path / file, rows)
    assert rows_so_far(tmp_path / file) == rows
    content = (tmp_path / file).read_bytes()
    for changed in (content.replace(b"0.25", b"0.75"), content[: len(content) // 2], b"[]", b""):
        (tmp_path / file).write_bytes(changed)
        with pytest.raises(Stopped, match=rf"{file} is not as fewbit wrote it\. Restore it, or remove it"):
            rows_so_far(tmp_path / file)


def test_another_request_empties_what_a_killed_run_left(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.part").mkdir()
    write_json(tmp_path / "run.part" / "request.json", {"request": "another"})
    (tmp_path / "run.part" / "plan.json").write_text("{")
    told = Told()
    assert not small(place, tmp_path / "run", progress=told).checks.wrong
    (line,) = told.lines
    assert line.startswith(f"{tmp_path / 'run.part'} has unfinished work, which cannot be used")


def test_a_command_whose_unfinished_work_is_given_up_is_named_and_one_that_goes_on_says_nothing(tmp_path: Path) -> None:
    def told(identity: str, command: str) -> list[str]:
        said = list[str]()
        with Workplace(tmp_path / "run", by=command) as place:
            place.resume({"request": identity}, lambda line: said.append(f"{line} {(place.part / 'plan.json').exists()}"))
            (place.part / "plan.json").write_text("{}")
        return said

    assert told("one", "fewbit quantize demo --recipe best") == []
    assert told("one", "fewbit quantize demo --recipe best --threads 3") == []
    (line,) = told("another", "fewbit search demo")
    assert "unfinished work of fewbit quantize demo --recipe best, which cannot be used" in line
    assert line.endswith("given up and deleted. True")  # said before it is gone
    assert told("another", "fewbit search demo") == []


def test_commands_on_a_finished_run_are_its_stages() -> None:
    functions, reopened = ({stage.name: stage.run for stage in stages} for stages in (STAGES, REOPENED))
    for name in ("verify", "evaluate", "bench", "report"):
        assert reopened[name] is functions[name]


def test_a_finished_run_scores_and_checks_as_it_did(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.files import read_json
    from fewbit.report import tables

    report, run = read_json(whole / "report.json"), Run.open(whole)
    assert tables.verify(run.verify()) == report["verify"]
    x = open_images(place / "x.npy", run.preprocess)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    score = run.do("evaluate", scored=x.subset(sorted(order[:6])), threads=2)
    assert score.to_json() == report["accuracy"]
    page = (whole / "report.html").read_bytes()
    assert run.do("report").read_bytes() == page


@pytest.mark.parametrize("arguments", [["--help"], ["report"]])
def test_help_and_report_need_no_torch(whole: Path, arguments: list[str]) -> None:
    words = [*arguments, str(whole)] if arguments == ["report"] else arguments
    after = "import atexit, sys; atexit.register(lambda: print('loaded', 'torch' in sys.modules)); "
    code = after + f"from fewbit.cli import app; app({words}, standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "loaded False" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", ["fast", pytest.param("mse", marks=pytest.mark.slow)])
def test_a_calibration_image_is_decoded_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    count: dict[str, int] = {}
    once = decoded.as_input

    def counted(item: Any, name: str, preprocess: Preprocess) -> torch.Tensor:
        count[name] = count.get(name, 0) + 1
        return once(item, name, preprocess)

    monkeypatch.setattr(decoded, "as_input", counted)
    result = quantize(f"{place / 'net.py'}:model", place / "x.npy", out=tmp_path / "run", recipe=recipe, seconds=0.01)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    assert {count[f"x.npy:{i}"] for i in order[6:]} == {1}
    assert max(count.values()) == 3  # scored: a few are compared, a few looked at, all are scored
    assert not result.checks.wrong


@pytest.mark.parametrize("folder_is_there", [True, False])
def test_remembered_images_are_those_that_are_decoded(tmp_path: Path, folder_is_there: bool) -> None:
    x = np.random.default_rng(1).integers(0, 255, (11, 9, 7, 3), dtype=np.uint8)
    plain = open_images(x, Preprocess((3, 8, 8)))
    images = plain.remembered(Memory(tmp_path if folder_is_there else None))
    odd = images.subset([9, 1, 3, 3])
    for _ in range(2):
        assert torch.equal(torch.cat(list(odd.batches(3))), torch.cat(list(plain.subset([9, 1, 3, 3]).batches(4))))
        assert torch.equal(torch.cat(list(images.batches(4))), torch.cat(list(plain.batches(11))))
    other = pickle.loads(pickle.dumps(images))  # as another process gets them
    assert torch.equal(torch.cat(list(other.batches(4))), torch.cat(list(plain.batches(11))))
    images.batches(2)[0].zero_()  # a batch is the reader's own
    assert torch.equal(torch.cat(list(images.batches(4))), torch.cat(list(plain.batches(11))))
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_channels_last_in_memory_gets_the_plan_of_the_same_model_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(2)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))  # so that equalization changes constants
    images = torch.randn(8, 3, 8, 8)
    for name, form in (("plain", torch.contiguous_format), ("last", torch.channels_last)):
        net = net.to(memory_format=form)  # type: ignore[call-overload]
        quantize(net, images, out=tmp_path / name, recipe="fast", input_size=(3, 8, 8), quick=True, scored=4)
    assert (tmp_path / "last/plan.safetensors").read_bytes() == (tmp_path / "plain/plan.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("gains", "named"),
    [
        ((1e20, 1e-20, 1), ["0:weight", "1:weight"]),
        ((1e-30, 1e30, 1), ["0:weight", "1:weight"]),
        ((1, 1e10, 1e10), ["2:output"]),
    ],
)
def test_numbers_whose_squares_leave_float32_are_refused_by_name_and_kept_float_on_request(
    gains: tuple[float, ...], named: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(n, 4, 1, bias=False) for n in (3, 4, 4)), nn.Flatten(2)).eval()
    with torch.no_grad():
        for layer, gain in zip(net, gains, strict=False):
            layer.weight.mul_(gain)
    images, asked = torch.randn(8, 3, 8, 8), list[str]()
    options: dict[str, Any] = {"recipe": "fast", "input_size": (3, 8, 8), "quick": True, "scored": 4, "out": tmp_path / "run"}
    while asked != named:
        with pytest.raises(BadValues, match=r"^the largest number of .* leave float32") as found:
            quantize(net, images, keep_float=asked, **options)
        asked += re.findall(r"--keep-float '([^']+)'", str(found.value))
        assert asked == named[: len(asked)]
    assert quantize(net, images, keep_float=asked, **options).report["verify"]["problems"] == []


def test_a_run_that_would_quantize_nothing_is_refused_with_the_reasons(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(2)).eval()
    says = r"^tensorrt would leave all 2 ops of Sequential float, .* \(0: conv on tensorrt: inputs is 3, the kernel needs"
    with pytest.raises(FewbitError, match=says):
        quantize(net, torch.randn(8, 3, 8, 8), out=tmp_path / "run", target="tensorrt", input_size=(3, 8, 8), quick=True)
    assert not list(tmp_path.glob("run*"))


def test_a_model_without_weights_or_products_is_not_told_to_choose_another_target() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(
        FewbitError, match=r"^Sequential has no layer with weights .* so no target has anything to quantize"
    ) as found:
        quantize(net, torch.randn(8, 3, 8, 8), input_size=(3, 8, 8), quick=True)
    assert "Choose another" not in str(found.value)


class OfOne(nn.Module):
    """A branch whose weights are zeros, for one image at a time; without the other branch it says nothing of the image."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.a, self.b, self.alone = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), alone
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.b(x) if self.alone else self.a(x) + self.b(x)).reshape(1, -1)


def test_weights_of_zeros_alone_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"input_size": (3, 8, 8), "quick": True, "task": "tensors", "score": torch.randn(6, 3, 8, 8)}
    said = "All numbers of b:weight are 0, so what goes through there says nothing of an image. Are these trained weights?"
    progress = Told()
    with pytest.raises(
        BadImages, match=rf"^the float model gives the same numbers for every scored image.* {re.escape(said)}$"
    ):
        quantize(OfOne(True).eval(), torch.randn(8, 3, 8, 8), out=tmp_path / "run", progress=progress, **options)
    assert "observe" not in progress.seconds  # known before the work
    result = quantize(OfOne(False).eval(), torch.randn(8, 3, 8, 8), out=tmp_path / "run", **options)
    assert said in result.report["notes"]


def test_what_libraries_warn_of_their_own_internals_is_not_for_users(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    parametrizations.orthogonal(net[3])  # torch.export.save warns of its tensors
    quantize(net.eval(), torch.randn(8, 3, 8, 8), out=tmp_path / "run", input_size=(3, 8, 8), quick=True)
    assert [str(one.message) for one in recwarn] == []


def test_a_model_that_gives_the_same_for_every_scored_image_is_refused_before_the_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    net[3].weight.data.zero_()
    progress, options = Told(), {"input_size": (3, 8, 8), "quick": True, "recipe": "fast", "score": torch.randn(20, 3, 8, 8)}
    with pytest.raises(BadImages, match=r"^the float model gives the same numbers for every scored image.*--score DIR"):
        quantize(net, torch.randn(8, 3, 8, 8), out=tmp_path / "run", progress=progress, **options)
    assert "twin" in progress.seconds
    assert not {"observe", "choose", "realize"} & {*progress.seconds}


def test_a_model_that_says_something_of_the_last_scored_image_alone_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    scored = torch.zeros(20, 3, 8, 8)
    scored[-1] = torch.randn(3, 8, 8)
    options = {"input_size": (3, 8, 8), "quick": True, "recipe": "fast", "score": scored}
    result = quantize(net, torch.randn(8, 3, 8, 8), out=tmp_path / "run", **options)
    assert 0 < result.report["accuracy"]["agreement"] <= 100
