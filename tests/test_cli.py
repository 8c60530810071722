"""The command line on bad input: one clear message, exit code 2, nothing half-written; and the demo end to end."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fewbit.choose import parse_bits
from fewbit.choose.ranges import Percentile
from fewbit.cli import app
from fewbit.cli.diff import changes, counted, not_comparable
from fewbit.cli.terminal import out
from fewbit.core.plan import PassLog, described
from fewbit.core.task import Output, Signature, Task
from fewbit.errors import FewbitError
from fewbit.folder import checked, seal
from fewbit.realize import save_plan
from fewbit.recipes import RECIPES
from fewbit.report.goals import drop_missed
from fewbit.run import Run, quantize
from fewbit.stages.task import written
from fewbit.target import detect
from fewbit.task.segment import Segment
from mutations import flips, mutations
from small_net import NET

runner = CliRunner()

MODEL = (
    NET
    + """
def normed():
    net = Net()
    net.conv = nn.Sequential(net.conv, nn.BatchNorm2d(8))
    net.train()(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return net.eval()

class Masked(Net):
    def forward(self, x):
        x = nn.functional.pad(self.conv(x), (0, 1, 0, 1), value=float("-inf"))
        return self.head(nn.functional.max_pool2d(x, 3, 2).mean((2, 3)))

def masked(): return Masked().eval()

def infinite():
    net = Net().eval()
    net.head.weight.data[0, 0] = float("inf")
    return net

def exploding():
    net = Net().eval()
    net.conv.weight.data *= 1e38
    return net

def conditional():
    class Branch(nn.Module):
        def forward(self, x): return x.sum((2, 3)) if x.sum() > 0 else x.mean((2, 3))
    return Branch()
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file and folders of images: `flat` with 24 pictures, `classes` with 4 class folders of 3."""
    root = tmp_path_factory.mktemp("cli")
    (root / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)

    for i in range(24):
        picture(root / "flat" / f"{i}.png")
    for c in "abcd":
        for i in range(3):
            picture(root / "classes" / c / f"{i}.png")
    return root


def run(*args: object) -> tuple[int, str]:
    """Exit code and everything printed, on one line so that wrapping does not matter."""
    result = runner.invoke(app, [str(a) for a in args], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A finished run of the tiny model."""
    folder = place / "run"
    quantize(f"{place / 'net.py'}:model", place / "flat", out=folder, seconds=0.01)
    return folder


def refused(place: Path, *args: object, says: tuple[str, ...]) -> None:
    """Exit code 2, every fragment in the message, and no run folder, finished or not."""
    code, text = run(*args, "--out", place / "refused")
    assert code == 2, text
    for fragment in says:
        assert fragment in text, text
    assert not (place / "refused").exists()
    assert not (place / "refused.part").exists()


def test_the_version_and_the_short_help_are_there() -> None:
    import fewbit

    assert (run("--version")[0], run("--version")[1].strip()) == (0, f"fewbit {fewbit.__version__}")
    assert run("-h") == run("--help")
    assert "Post-training quantization" in run("-h")[1]
    assert (Path(fewbit.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("args", [("--help",), ("quantize", "--bad"), ("search", "--help")])
def test_help_and_a_mistyped_option_are_answered_without_torch(args: tuple[str, ...]) -> None:
    code = f"import sys; from fewbit.cli import app; app({list(args)}, standalone_mode=False)"
    after = "import atexit, sys; atexit.register(lambda: print('loaded', 'torch' in sys.modules)); "
    done = subprocess.run([sys.executable, "-c", after + code], capture_output=True, text=True)
    assert "loaded False" in done.stdout


@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        ("model", ["--images", "{}/nowhere"], ("nowhere", "does not exist")),
        ("model", ["--images", "{}/flat", "--target", "ort-x86-vni"], ("unknown target 'ort-x86-vni'", "ort-x86-vnni")),
        ("model", ["--images", "{}/flat", "--recipe", "mze"], ("unknown recipe 'mze'", "mse")),
        ("model", ["--images", "{}/flat", "--bits", "w9a8"], ("--bits w9a8", "2 to 8")),
        ("model", ["--images", "{}/flat", "--keep-float", "hed"], ("--keep-float", "'hed'", "head")),
        (
            "model",
            ["--images", "{}/flat", "--mean", "1,2"],
            ("mean has 2 numbers and the model 3 channels", "give 3 or one for all", "--mean"),
        ),
        ("model", ["--images", "{}/flat", "--interpolation", "bicubik"], ("bicubik", "bicubic")),
        ("modle", ["--images", "{}/flat"], ("unknown function", "'modle'", "model")),
        ("infinite", ["--images", "{}/flat"], ("head.weight", "NaN or infinite")),
        ("exploding", ["--images", "{}/flat"], ("conv:weight is", "leave float32", "--keep-float")),
        ("model", ["--images", "{}/flat", "--recipe", ""], ("--recipe '' is empty",)),
        ("model", ["--images", "{}/flat", "--target", ""], ("--target '' is empty",)),
        ("model", ["--images", ""], ("--images '' is empty",)),
        ("model", ["--images", "{}/flat", "--weights", "{}/net.py"], ("--weights", "timm")),
        ("conditional", ["--images", "{}/flat"], ("cannot be exported", "Branch")),
        ("model", [], ("no images", "--images DIR")),
        ("model", ["--images", "{}/flat", "--score", "{}/flat"], ("calibration images too",)),
        ("model", ["--images", "{}/flat", "--target", "{}/no.toml"], ("no.toml", "does not exist")),
        ("model", ["--images", "synthetic"], ("real ones are needed to score on", "--score DIR")),
        ("model", ["--images", "synthetic", "--score", "{}/flat"], ("neither batch norm nor attention", "--images DIR")),
        ("model", ["--images", "synthetic:{}/flat", "--score", "{}/flat"], ("no batch norm", "--recipe mse")),
        ("model", ["--images", "{}/flat", "--recipe", "fdda"], ("no batch norm", "--recipe mse")),
        (
            "model",
            ["--images", "{}/flat", "--steps", "5"],
            ("--steps", "fdda", "recipe fast has none, these have: best,"),
        ),
        ("model", ["--images", "{}/flat", "--curve", "--recipe", "lapq"], ("--curve", "mse")),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_code_2(
    place: Path, function: str, args: list[str], says: tuple[str, ...]
) -> None:
    refused(place, "quantize", f"{place / 'net.py'}:{function}", *(a.format(place) for a in args), says=says)


def test_labels_that_do_not_match_the_classes_are_refused(place: Path) -> None:
    shutil.copytree(place / "classes" / "a", place / "five" / "e", dirs_exist_ok=True)
    for c in "abcd":
        shutil.copytree(place / "classes" / c, place / "five" / c, dirs_exist_ok=True)
    model = f"{place / 'net.py'}:model"
    refused(place, "quantize", model, "--images", place / "flat", "--score", place / "five", says=("class", "4", "5"))


@pytest.mark.slow
def test_an_unreadable_image_is_named_and_skipped_only_on_request(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "flat", tmp_path / "flat")
    (tmp_path / "flat" / "bad.png").write_bytes(b"no picture")
    model = f"{place / 'net.py'}:model"
    refused(place, "quantize", model, "--images", tmp_path / "flat", says=("bad.png", "--skip-bad"))
    result = quantize(model, tmp_path / "flat", skip_bad=True, seconds=0.01)
    assert result.report["images"]["calibration"] + result.report["images"]["scored"] == 24


def test_images_of_another_size_in_an_array_are_refused(place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 8, 8), np.float32))
    model = f"{place / 'net.py'}:model"
    refused(place, "quantize", model, "--images", tmp_path / "x.npy", says=("x.npy", "(4, 3, 8, 8)", "(n, 3, 16, 16)"))


def test_a_target_file_with_an_illegal_field_names_the_line(place: Path, tmp_path: Path) -> None:
    from fewbit.target.load import HERE

    text = (HERE / "ort-x86-vnni.toml").read_text().replace('runs = "follow"', 'runs = "folow"', 1)
    line = 1 + text[: text.index('"folow"')].count("\n")
    (tmp_path / "mine.toml").write_text(text)
    model = f"{place / 'net.py'}:model"
    args = ("quantize", model, "--images", place / "flat", "--target", tmp_path / "mine.toml")
    refused(place, *args, says=("mine.toml", f"line {line}", "folow"))


def test_a_run_for_a_target_file_of_the_user_is_read_back_without_it(place: Path, tmp_path: Path) -> None:
    from fewbit.target.load import HERE

    text = (HERE / "openvino-x86.toml").read_text().replace('name = "openvino-x86"', 'name = "mine"')
    (tmp_path / "mine.toml").write_text(text)
    quantize(
        f"{place / 'net.py'}:model", place / "flat", target=str(tmp_path / "mine.toml"), out=tmp_path / "run", seconds=0.01
    )
    (tmp_path / "mine.toml").unlink()
    code, text = run("verify", tmp_path / "run")
    assert code == 0, text
    code, text = run("evaluate", tmp_path / "run", "--images", place / "classes")
    assert code == 0, text
    assert "openvino" in text


def test_an_output_folder_that_exists_is_not_overwritten(place: Path, finished: Path, tmp_path: Path) -> None:
    before = (finished / "plan.json").read_bytes()
    model = f"{place / 'net.py'}:model"
    code, text = run("quantize", model, "--images", place / "flat", "--out", finished)
    assert (code, (finished / "plan.json").read_bytes()) == (2, before)
    assert "--force" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    code, text = run("quantize", model, "--images", place / "flat", "--out", tmp_path / "mine", "--force")
    assert code == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


@pytest.mark.parametrize("name", ["plan.safetensors", "plan.json", "model.onnx", "exported.pt2"])
def test_a_truncated_file_of_a_run_is_named(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    whole = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).write_bytes(whole[: len(whole) // 2])
    code, text = run("verify", tmp_path / "run")
    assert code == 2, text
    assert f"{name}: changed" in text


def test_a_full_disk_leaves_nothing_that_looks_finished(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from fewbit import files

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(FewbitError, match="the disk is full"):
        quantize(f"{place / 'net.py'}:model", place / "flat", out=tmp_path / "run", seconds=0.01)
    assert not (tmp_path / "run").exists()


def test_a_site_that_stays_float_may_hold_infinities(place: Path, tmp_path: Path) -> None:
    """Padding with minus infinity before a pooling of maxima, as vision transformers with a convolutional stem have."""
    result = quantize(f"{place / 'net.py'}:masked", place / "flat", out=tmp_path / "run", recipe="fast", seconds=0.01)
    assert result.report["verify"]["codes_wrong"] == 0
    assert "maxpool:input" not in result.plan.choices
    assert 90 < result.report["accuracy"]["outputs"][0]["agreement"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mse", "fast"])
def test_a_killed_run_goes_on_behind_the_last_stage(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from fewbit.stages import realize

    model, once = f"{place / 'net.py'}:model", realize.save

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(realize, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, place / "flat", recipe=recipe, out=tmp_path / "run", seconds=0.01)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(realize, "save", once)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("observed twice")

    monkeypatch.setattr("fewbit.stages.observe.statistics_of", again)
    result = quantize(model, place / "flat", recipe=recipe, out=tmp_path / "run", seconds=0.01)
    assert result.report["verify"]["codes_wrong"] == 0
    assert not (tmp_path / "run.part").exists()


def test_the_same_request_gives_the_same_bytes(place: Path, finished: Path, tmp_path: Path) -> None:
    quantize(f"{place / 'net.py'}:model", place / "flat", out=tmp_path / "run", seconds=0.01)
    for name in ("plan.json", "plan.safetensors", "model.onnx", "float.onnx"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_report_json_has_the_fields_that_others_read(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert set(report) >= {
        "schema", "model", "target", "recipe", "bits", "exemptions", "images", "accuracy", "size", "latency", "verify",
        "integer_share", "fallbacks", "seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert set(report["accuracy"]) == {
        "task", "measure", "float", "quantized", "agreement", "agreement_measure", "interval", "why", "outputs", "runtime",
        "unit", "rows",
    }  # fmt: skip
    assert set(report["size"]) == {"float_bytes", "onnx_bytes", "packed_bytes", "average_weight_bits"}
    assert report["size"]["onnx_bytes"] == (finished / "model.onnx").stat().st_size
    listed = [row["bytes"] for row in json.loads((finished / "tables.json").read_text())["size"]]
    assert listed == [(finished / name).stat().st_size for name in ("float.onnx", "model.onnx", "plan.safetensors")]
    assert report["verify"]["codes_wrong"] == 0
    assert report["accuracy"]["quantized"] is None  # no labels in a flat folder


def test_verify_catches_a_changed_scale_and_names_its_site(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(finished, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "plan.safetensors")
    tensors["head:input.scale"] *= 1.01
    save_file(tensors, tmp_path / "run" / "plan.safetensors")
    code, text = run("verify", tmp_path / "run")
    assert code == 2, text
    assert "plan.safetensors: changed" in text
    seal(tmp_path / "run")  # as if fewbit had written it so
    code, text = run("verify", tmp_path / "run")
    assert code == 2, text  # it stands in plan.json as well
    assert "head:input, scale is " in " ".join(text.split())


def test_a_change_of_any_number_or_bit_of_a_run_is_caught_and_its_file_is_named(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    quantize(f"{place / 'net.py'}:model", place / "flat", out=folder, keep_float="head", seconds=0.01)  # constants of each kind
    for mutation in (*mutations(folder), *flips(folder, 8)):
        copy = shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
        mutation.change(copy / mutation.file)
        code, text = run("verify", copy)
        assert code == 2, mutation
        assert f"{mutation.file}" in "".join(text.split()), (mutation, text)


DELETED = """
import os, sys
from pathlib import Path
from typer.testing import CliRunner
from fewbit.cli import app
run, gone = map(Path, sys.argv[1:])
os.chdir(gone)
gone.rmdir()
there = {"show": [[run], [run / "model.onnx"]], "report": [[run]]}
behind = {
    "diff": [run, run], "export": [run, "--to", gone / "x"], "quantize": ["demo", "--out", gone], "targets": [], "recipes": [],
    "search": ["demo", "--out", gone], "sensitivity": ["demo", "--out", gone], "evaluate": [run, "--images", run],
}
for name in (one.name or one.callback.__name__ for one in app.registered_commands):
    for words in there.get(name, [behind.get(name, [run])]):
        done = CliRunner().invoke(app, [name, *map(str, words)])
        wanted = name in there or "the current folder is not there any more" in done.output and "(cd DIR)" in done.output
        assert wanted and done.exit_code == (0 if name in there else 2), (name, done.exit_code, done.output)
        assert "torch" not in sys.modules, name
        print(name)
"""


def test_where_the_current_folder_is_deleted_commands_that_need_torch_say_so(finished: Path, tmp_path: Path) -> None:
    """torch ends the process there, with a message of a library; oracle: whether it was imported."""
    (tmp_path / "gone").mkdir()
    words = [sys.executable, "-c", DELETED, str(finished), str(tmp_path / "gone")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"show", "report", "quantize", "verify", "serve", "sweep"} <= {*done.stdout.split()}


def test_evaluate_bench_report_and_diff_read_a_run(place: Path, finished: Path, tmp_path: Path) -> None:
    code, text = run("evaluate", finished, "--images", place / "classes")
    assert code == 0, text
    assert "12" in text
    code, text = run("evaluate", finished, "--images", place / "flat", "--no-labels")
    assert code == 2, text
    assert "calibrated on 18 of the 24 images" in text
    code, text = run("bench", finished, "--seconds", "0.01", "--batch", "2")
    assert code == 0, text
    assert "model.onnx" in text
    assert "peak memory" in text
    before = (finished / "report.html").read_bytes()
    assert run("report", finished)[0] == 0
    assert (finished / "report.html").read_bytes() == before
    quantize(f"{place / 'net.py'}:model", place / "flat", out=tmp_path / "other", recipe="minmax", seconds=0.01)
    code, text = run("diff", finished, tmp_path / "other", "--json", tmp_path / "diff.json")
    assert code == 0, text
    changed = {row["site"] for row in json.loads((tmp_path / "diff.json").read_text())}
    assert any(row["field"] == "codes" and row["differing"] for row in json.loads((tmp_path / "diff.json").read_text()))
    assert "head:input" in changed
    assert text.index("codes that are wrong") < text.index("The plans differ")  # what came out of both is first
    assert f"The plans differ at {len(changed)} sites: " in text
    assert "head:input" not in text
    listed = run("diff", finished, tmp_path / "other", "--all")[1]
    assert "head:input" in listed
    assert not re.search(r"\w\(\w+=|all_readers|\{'", text + listed)  # no name or value as Python writes it
    alike = run("diff", finished, finished)[1]
    assert "The plans are the same." in alike
    for word in ("comparable", "images scored", "opset", "IR version", "normalization"):
        assert word not in alike + text


def test_diff_says_what_is_not_the_same_in_images_and_files(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files themselves."""
    monkeypatch.setattr(out, "_width", 1000)  # so that no cell goes on in a next line
    net, other = f"{place / 'net.py'}:model", tmp_path / "other"
    options = {"seconds": 0.01, "normalize_inside": True, "mean": 0.4, "opset": 21, "ir_version": 11, "crop_pct": 0.5}
    quantize(net, place / "classes", out=other, **options)
    text = run("diff", finished, other)[1]
    rows = {name: both for name, *both in re.findall(r"│ ([^│]+) │ ([^│]+) │ ([^│]+) │", text)}
    files = [onnx.load(folder / "model.onnx") for folder in (finished, other)]
    assert rows["opset"] == [str(file.opset_import[0].version) for file in files]
    assert rows["IR version"] == [str(file.ir_version) for file in files]
    assert rows["crop pct"] == ["1", "0.5"]
    for at, (file, layout) in enumerate(zip(files, ("float32 NCHW", "uint8 NHWC"), strict=True)):
        kind = file.graph.input[0].type.tensor_type
        assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name == layout.split()[0]
        sides = ", ".join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
        assert rows["input"][at] == f"{layout} ({sides})"
    counts = rows["images scored"]
    assert counts == [str(json.loads((folder / "report.json").read_text())["images"]["scored"]) for folder in (finished, other)]
    assert f"scored on different images ({counts[0]} and {counts[1]}), so" in text
    assert rows["normalization"][1].startswith("inside the file: mean 0.4, 0.4, 0.4; std ")


@pytest.mark.parametrize(
    ("counts", "hashes", "said"),
    [
        ((50, 50), ("a", "a"), ""),
        ((50, 20), ("a", "b"), "different images (50 and 20), so"),
        ((5000, 5000), ("a", "b"), "different images (5,000 each), so"),
    ],
)
def test_figures_are_comparable_where_the_images_are_the_same(counts: Any, hashes: Any, said: str) -> None:
    found = not_comparable([{"hashes": {"scored": one}} for one in hashes], [{"images": {"scored": n}} for n in counts])
    assert said in found
    assert bool(said) == bool(found)


def test_diff_counts_every_code_bias_and_scale_that_differs(conv_net: Any, tmp_path: Path) -> None:
    plan = conv_net.plan("ort-x86-vnni", "mse", bits=parse_bits("w3a8"))
    mixed = replace(plan.choices["b:weight"].grid, widths=(0, 1, 2, 3) * (conv_net.graph.site("b:weight").shape[0] // 4))
    codes = {name: choice.codes.clone() for name, choice in plan.choices.items() if choice.codes is not None}
    codes["b:weight"] = torch.zeros_like(codes["b:weight"])
    others = {name: value.clone() for name, value in codes.items()}
    for name, places in (("a:weight", [0, 1, 7, -1]), ("b:weight", [0, -1])):
        flat = others[name][3::4].flatten() if name == "b:weight" else others[name].flatten()
        flat[places] = torch.where(flat[places] == 0, 1, 0).to(flat.dtype)
        if name == "b:weight":
            others[name][3::4] = flat.reshape(others[name][3::4].shape)  # of the channels that have 3 bits
            others[name][2, 0, 0, 0] = -1
        else:
            others[name] = flat.reshape(others[name].shape)
    folders = []
    for name, own in (("one", codes), ("two", others)):
        grids = {site: mixed if site == "b:weight" else plan.choices[site].grid for site in own}
        choices = {**plan.choices, **{s: replace(plan.choices[s], codes=own[s], grid=grids[s]) for s in own}}
        if name == "two":
            scale = choices["stem:weight"].qparams.scale.clone()
            middle = scale.flatten().argsort()[1]  # neither the least nor the largest
            scale.view(-1)[middle] *= 1.0001
            choices["stem:weight"] = replace(
                choices["stem:weight"], qparams=replace(choices["stem:weight"].qparams, scale=scale)
            )
        op, bias = next(iter(plan.biases.items()))
        moved = replace(bias, integer=replace(bias.integer, codes=bias.integer.codes + (name == "two")))
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        save_plan(conv_net.graph, replace(plan, choices=choices, biases={**plan.biases, op: moved}), folders[-1])
    found = {(row["site"], row["field"]): row["differing"] for row in changes(*folders)}
    count = plan.biases[op].integer.codes.numel()
    assert found == {
        ("a:weight", "codes"): 4,
        ("b:weight", "codes"): 3,
        ("stem:weight", "scale"): 1,
        (f"{op}:bias", "bias"): count,
    }
    assert counted(changes(*folders)) == "7 codes at 2, scale at 1, bias at 1"
    assert changes(folders[0], folders[0]) == []


def test_report_draws_other_runs_beside_and_keeps_them(place: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "other")
    report = json.loads((finished / "report.json").read_text()) | {"recipe": "another", "bits": "mixed:6:5,6,7"}
    (tmp_path / "other" / "report.json").write_text(json.dumps(report))
    seal(tmp_path / "other")
    code, text = run("report", tmp_path / "run", "--beside", tmp_path / "other", "--beside", tmp_path / "run")
    assert code == 0, text
    rows = json.loads((tmp_path / "run" / "tables.json").read_text())["runs"]
    assert [row["kind"] for row in rows] == ["fast, one width", "another, mixed precision"]
    assert [row["accuracy"] for row in rows] == [report["accuracy"]["agreement"]] * 2
    checked(tmp_path / "run")
    drawn = (tmp_path / "run" / "report.html").read_bytes()
    assert drawn != (finished / "report.html").read_bytes()
    assert run("report", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == drawn


@pytest.mark.parametrize("broken", ["no folder", "no model", "no report", "half a report", "no hashes"])
def test_report_beside_a_folder_that_is_no_run_writes_nothing(finished: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "other"
    if broken != "no folder":
        shutil.copytree(finished, other)
    if broken == "no model":
        (other / "model.onnx").unlink()
    elif broken == "no report":
        (other / "report.json").unlink()
    elif broken == "half a report":
        (other / "report.json").write_text('{"bits": "8"')
    elif broken == "no hashes":
        (other / "run.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    code, text = run("report", tmp_path / "run", "--beside", other)
    assert code == 2, text
    assert str(other) in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_a_drop_beyond_the_floor_is_said_with_its_figure_and_its_limit() -> None:
    measures = {
        "measure": "top-1 accuracy",
        "unit": "%",
        "agreement_measure": "agreement in class",
        "why": "Labels are missing.",
        "interval": (-3, 0.5),
    }
    labelled = {"float": 80.0, "quantized": 78.5, "agreement": 97.0, **measures}
    assert drop_missed(labelled, 1.0) == (
        "top-1 accuracy fell by 1.50 points; --max-drop allows 1. The change is -3.00 to 0.50 (95 %). Labels are missing."
    )
    without = {"float": None, "quantized": None}
    assert drop_missed({**labelled, **without}, 2.0) == (
        "agreement in class fell by 3.00 points; --max-drop allows 2. The agreement is -3.00 to 0.50 (95 %). Labels are "
        "missing."
    )
    for quantized, limit, shown in ((80 - 0.0004, 0, "0.0004"), (80 - 0.012, 0, "0.01"), (78.4997, 1.5, "1.5003")):
        begins = f"top-1 accuracy fell by {shown} points; --max-drop allows {limit}."  # the digits that show what is too much
        assert drop_missed({**labelled, "quantized": quantized}, limit).startswith(begins)
    assert drop_missed({**labelled, "quantized": float("nan")}, 1.5).startswith("top-1 accuracy is not a number for the int")
    tenth = {"float": 100 * 823 / 1000, "quantized": 100 * 822 / 1000}  # 0.10000000000000853
    assert [drop_missed(labelled, 1.5), drop_missed(labelled, None), drop_missed({**labelled, **tenth}, 0.1)] == [""] * 3
    restored = {**labelled, "measure": "PSNR", "unit": "dB", "float": 22.91, "quantized": 21.82}
    assert drop_missed(restored, 0.3).startswith("PSNR fell by 1.09 dB; --max-drop allows 0.3.")
    in_percent = drop_missed({**restored, **without}, 0.3)
    assert in_percent.startswith("agreement in class fell by 3.00 points; ")


def test_annotations_that_are_not_to_be_read_are_refused_before_a_run_is_opened(tmp_path: Path) -> None:
    code, text = run("evaluate", tmp_path / "none", "--images", tmp_path, "--annotations", "x.json", "--no-labels")
    assert code == 2
    assert "--annotations x.json says what is known of the images, and --no-labels ignores it; leave one out." in text
    code, text = run("evaluate", tmp_path / "none", "--images", tmp_path, "--annotations", "x.json")
    assert code == 2
    assert "--annotations x.json does not exist; give the file or folder" in text


def test_annotations_are_read_before_the_model_of_a_run_is_opened(
    place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbit.stages.capture.load_model", lambda *_, **__: pytest.fail("the model is opened"))
    code, text = run("evaluate", finished, "--images", place / "classes", "--annotations", place)
    assert code == 2, text
    assert "task classify has none" in " ".join(text.split())


MAP = Output("map", (5, 8, 8))


@pytest.mark.parametrize(
    ("ports", "tail", "task"),
    [
        ({"map": (1, ["batch", 5, 8, 8])}, False, Segment.of(Signature([MAP], (16, 16), list("abcde")))),
        ({"map": (1, [1, 5, 8, 8]), "n": (7, [1, 3])}, False, Segment.of(Signature([MAP], (16, 16), list("abcde")))),
        ({"map": (1, ["batch", 5, "height", "width"])}, False, None),
        ({"map": (1, ["batch", 5, 8, 8])}, True, None),
    ],
)
def test_the_task_of_a_run_is_what_its_float_file_gives(
    tmp_path: Path, ports: dict[str, tuple[int, list[int | str]]], tail: bool, task: Task | None
) -> None:
    outputs = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in ports.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], outputs)), tmp_path / "float.onnx")
    if tail:
        (tmp_path / "tail.onnx").touch()
    assert written({"task": "segment", "classes": list("abcde"), "preprocess": {"size": [3, 16, 16]}}, tmp_path) == task


def test_lists_name_what_there_is() -> None:
    few, every = run("targets")[1], run("targets", "--all")[1]
    assert "tensorrt" not in few
    assert few.index(f"{detect()} (default)") < few.index(detect("openvino"))
    assert "ort-x86-w4" not in few
    assert "tensorrt" in every
    assert "tensorrt does not run" in every
    assert "query a8" in run("targets", "ort-x86-vnni")[1]
    few = run("recipes")[1]
    assert [name for name in RECIPES if f" {name} " in few] == ["mse", "fast", "best"]
    assert all(f" {name} " in run("recipes", "--all")[1] for name in RECIPES)
    assert "Gptq(" not in few
    assert "closest to the float one (GPTQ)" in run("recipes", "fast")[1]
    assert run("recipes", "fats")[0] == 2


@pytest.mark.slow
def test_synthetic_images_calibrate_and_are_shown_and_a_curve_is_drawn(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"score": place / "classes", "steps": 5, "calibration": 2, "seconds": 0.01, "bits": 4}
    result = quantize(f"{place / 'net.py'}:normed", "synthetic", out=out, curve=True, **options)
    made = load_file(out / "synthetic.safetensors")
    assert made["images"].shape == (2, 3, 16, 16)
    assert result.report["calibration"]["source"].startswith("2 synthetic images by NormInversion")
    rows = json.loads((out / "tables.json").read_text())
    assert [row["images"] for row in rows["curve"]] == [1, 2]
    assert rows["curve"][-1]["quantized"] == result.report["accuracy"]["quantized"]  # the same images, recipe and runtime
    last, whole = (row["outputs"][0] for row in (rows["curve"][-1], result.report["accuracy"]))
    assert last["agreement"] == pytest.approx(whole["agreement"])
    assert [row["label"] for row in rows["synthetic"]] == made["labels"].tolist()
    assert "Synthetic images" in (out / "report.html").read_text()
    assert any("Too few" in w or "unlike" in w for w in result.report["calibration"]["warnings"])


@pytest.mark.slow
def test_a_recipe_that_trains_takes_synthetic_images_beside_real_ones(place: Path, tmp_path: Path) -> None:
    options = {"score": place / "classes", "steps": 5, "calibration": 2, "seconds": 0.01, "bits": 4}
    beside = f"synthetic:{place / 'flat'}"
    tuned = quantize(f"{place / 'net.py'}:normed", beside, out=tmp_path / "tuned", recipe="fdda", **options)
    assert "beside 24 of folder" in tuned.report["calibration"]["source"]
    log = json.loads((tmp_path / "tuned" / "plan.json").read_text())["log"]
    (record,) = (entry["summary"] for entry in log if entry["name"] == "finetune")
    assert (record["steps"], record["real"], record["synthetic"]) == (5, 0, 2)
    assert not tuned.checks.wrong


def test_python_gives_the_simulation_and_exports_the_run(place: Path, tmp_path: Path) -> None:
    from fewbit.load import load_model

    net = load_model(f"{place / 'net.py'}:model").program.module()
    x = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    result = quantize(load_model(f"{place / 'net.py'}:model").program, x, seconds=0.01)
    error = (result.module(x) - net(x)).norm() / net(x).norm()
    assert error < 0.02
    folder = result.export(tmp_path / "out")
    assert Run.open(folder).verify().wrong == ()
    with pytest.raises(FewbitError, match="--force"):
        result.export(tmp_path / "out")


@pytest.mark.slow
def test_the_demo_finishes_and_is_right(tmp_path: Path) -> None:
    result = quantize("demo", out=tmp_path / "run")
    assert result.report["verify"]["codes_wrong"] == 0
    assert result.report["accuracy"]["float"] - result.report["accuracy"]["quantized"] < 1.0


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fewbit", "recipes"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fewbit", run_name="__main__")
    assert ended.value.code == 0
    assert "(the default)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_in_words(name):
    shown = runner.invoke(app, ["recipes", name], env={"COLUMNS": "200", "NO_COLOR": "1"})
    code, passes, recipe = shown.exit_code, shown.output.splitlines()[1:], RECIPES[name]
    assert (code, len(passes)) == (0, len(recipe.passes) + (recipe.equalize is not None))
    assert not re.search(r"[=_]|\b(True|False|None)\b|^  [A-Z]", "\n".join(passes), re.MULTILINE)


def test_every_method_says_what_it_does():
    """Also one of a user's own, by its name."""

    class TryFactors:
        pass

    assert described(TryFactors()) == "try factors"
    assert described(Percentile(0.999)) == "the range of 99.9 % of the values"
    assert PassLog.of("x", Percentile(0.9)) == PassLog("x", "Percentile(share=0.9)", (), {}, "the range of 90 % of the values")
