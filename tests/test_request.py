"""What is refused before any work. Oracle: the messages; the fields of Request themselves for the command line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

from fewbit import models
from fewbit.cli import app
from fewbit.core.duration import parse_time
from fewbit.core.pixels import FIELDS
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadFile, BadImages, FewbitError, UnknownName
from fewbit.load.load import READERS
from fewbit.recipes import RECIPES, RECOMMENDED
from fewbit.request import (
    BenchRequest,
    EvaluateRequest,
    Request,
    SearchRequest,
    SensitivityRequest,
    SweepRequest,
    VerifyRequest,
)
from fewbit.request.recipe_options import DEFAULT
from fewbit.request.types import Asked, option
from fewbit.run import quantize
from fewbit.stages.load import load

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"recipie": "fast"}, UnknownName, "unknown option 'recipie'. Did you mean recipe"),
        ({"label": True}, UnknownName, r"unknown option 'label'\. Did you mean no_labels .*`fewbit quantize --help` says"),
        ({"labels": True, "no_labels": False}, FewbitError, "labels and no_labels are one option, --no-labels; leave one"),
        ({"inputs": {"a": 1}, "input": ["a=1"]}, FewbitError, "inputs and input are one option, --input; leave one"),
        ({"no_labels": "yes"}, FewbitError, "--no-labels 'yes' is not allowed; it should be a valid boolean"),
        ({"annotations": 3}, FewbitError, "--annotations 3 is not allowed; it should be a path"),
        ({"recipe": "fats"}, UnknownName, "unknown recipe 'fats'. Did you mean fast"),
        ({"recipe": 3}, FewbitError, "--recipe 3 is not a name"),
        ({"target": "ort-x86-vnnj"}, UnknownName, "unknown target 'ort-x86-vnnj'. Did you mean ort-x86-vnni"),
        ({"bits": "w9a8"}, FewbitError, "has no integers wider than 8 bits; allowed are 2 to 8"),
        ({"bits": "eight"}, FewbitError, "--bits eight is not understood"),
        ({"bits": 8.0}, FewbitError, "--bits 8.0 is no width, .*; write 8 for that width everywhere, or write mixed:8.0 for"),
        ({"bits": 5.5}, FewbitError, "--bits 5.5 is no width, which is a whole number; write mixed:5.5 for a width of each"),
        ({"bits": "5.5"}, FewbitError, "--bits 5.5 is no width, which is a whole number; write mixed:5.5 for"),
        ({"bits": NAN}, FewbitError, "--bits nan is not understood"),
        ({"bits": True}, FewbitError, "--bits True is not allowed"),
        ({"bits": "mixed:9"}, FewbitError, "has no integers wider than 8 bits, and 9 on average .*; give mixed:8 or less"),
        ({"time": "2min"}, FewbitError, "recipe fast has none, these have: "),
        ({"time": "2min", "recipe": "fast"}, FewbitError, "recipe fast has none"),
        ({"time": "soon", "recipe": "lapq"}, FewbitError, "--time soon is not understood"),
        ({"time": 90, "recipe": "lapq"}, FewbitError, "--time 90 .*a valid string: type --time 10min"),
        ({"loss": "kl"}, FewbitError, "recipe fast has none, these have: "),
        ({"loss": "mse", "recipe": "lapq"}, FewbitError, "allowed are kl .* and labels"),
        ({"loss": "mse", "images": "synthetic"}, FewbitError, "allowed are kl .* and labels"),
        ({"steps": 5}, FewbitError, "--steps .*recipe fast has none"),
        ({"steps": 0, "recipe": "fdda"}, FewbitError, "--steps 0 .*greater than or equal to 1: type --steps 100"),
        ({"curve": True, "recipe": "lapq"}, FewbitError, "--curve runs the recipe again .*recipe lapq is slow"),
        ({"curve": True, "recipe": "best"}, FewbitError, "use one of mse, fast"),
        ({"calibration": 0}, FewbitError, "--calibration 0 .*equal to 1: type --calibration 128, or leave it out."),
        ({"calibration": "many"}, FewbitError, "--calibration 'many' .*a valid integer"),
        ({"calibration": 1.5}, FewbitError, "--calibration 1.5 .*a valid integer"),
        ({"scored": -1}, FewbitError, "--scored -1 .*greater than or equal to 1"),
        ({"seed": -1}, FewbitError, "--seed -1 .*greater than or equal to 0"),
        ({"seed": True}, FewbitError, "--seed True .*a valid integer"),
        ({"threads": 0}, FewbitError, "--threads 0 .*greater than or equal to 1: type --threads 2"),
        ({"seconds": 0.0}, FewbitError, "--seconds 0.0 .*greater than or equal to 0.001"),
        ({"seconds": NAN}, FewbitError, "--seconds nan .*a finite number"),
        ({"max_drop": INF}, FewbitError, "--max-drop inf .*a finite number"),
        ({"max_drop": -1.0}, FewbitError, "--max-drop -1.0 .*greater than or equal to 0"),
        ({"everything": "yes"}, FewbitError, "--everything 'yes' .*a valid boolean: type --everything"),
        ({"keep_float": 3}, FewbitError, "--keep-float 3 .*a valid tuple"),
        ({"mean": (0.5, 11)}, BadImages, r"--mean \(0.5, 11\) .*for each channel, or one for all, from -10 to 10"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, BadImages, "mean has 2 numbers and the model 3 channels; give 3 or one"),
        ({"mean": (0.5, 0.5), "input_size": (3, 8, 8)}, BadImages, "mean has 2 numbers and the model 3 channels"),
        ({"mean": (0.5, 0.5, NAN)}, BadImages, r"--mean \(0.5, 0.5, nan\) .*a finite number.*as in --mean 0.485"),
        ({"input_size": "3,32.5,32"}, BadImages, "--input-size 3,32.5,32 .*whole pixels, 1 to 8192, as in"),
        ({"input_size": "3,4,32,32"}, BadImages, r"--input-size 3,4,32,32 .* Of clips fold the time into the channels: images"),
        ({"input_size": (0, 32, 32)}, BadImages, r"--input-size \(0, 32, 32\) .*channels \(1 to 1024\), height and width"),
        ({"std": (1.0, 0.0, 1.0)}, BadImages, r"--std \(1.0, 0.0, 1.0\) .*from 0.0001 to 10"),
        ({"interpolation": "bicubik"}, UnknownName, "Did you mean bicubic"),
        ({"resize": "sqash"}, UnknownName, "Did you mean squash"),
        ({"crop_pct": 0.0}, BadImages, "--crop-pct 0.0 .*a number from 0.1 to 10"),
        ({"classes": "nowhere.txt"}, BadFile, "--classes nowhere.txt does not exist"),
        ({"weights": "nowhere.safetensors"}, BadFile, "--weights nowhere.safetensors does not exist"),
        ({"images": "nowhere"}, BadImages, "nowhere does not exist"),
        ({"score": Path("nowhere")}, BadImages, "nowhere does not exist"),
        ({"images": "synthetic:nowhere"}, BadImages, "nowhere does not exist"),
        ({"model": "vit_small_patch16_224"}, BadImages, "no images; .*--images DIR"),
        ({"model": "vit_small_patch16_224", "images": "synthetic"}, BadImages, "real ones are needed to score on: --score DIR"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, object], kind: type[FewbitError], says: str) -> None:
    with pytest.raises(kind, match=says) as refused:
        Request(**{"model": "demo", "target": "ort-x86-vnni", **options})
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [({"evaluations": 0}, "--evaluations 0"), ({"least": 1}, "--least 1"), ({"points": 0}, "--points 0"),
     ({"loss": "mse"}, "allowed are kl and labels"), ({"curve": True}, "unknown option 'curve'")],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(FewbitError, match=says):
        SearchRequest(model="demo", **options)


def test_python_is_told_the_option_that_it_meant() -> None:
    with pytest.raises(UnknownName, match=r"unknown option 'recipie'\. Did you mean recipe"):
        quantize("demo", recipie="fast")


def test_two_mistakes_are_both_said() -> None:
    with pytest.raises(FewbitError, match=r"--calibration 0 .*--threads 0"):
        Request(model="demo", calibration=0, threads=0)


@pytest.mark.parametrize(
    ("bits", "recipe"),
    [
        (None, "fast"), ("8", "fast"), ("8,first=4", "fast"), ("w4a8", "fast"), ("6", "fast"), ("w8a4", "fast-rotated"),
        ("4,first=w4a8", "fast-rotated"), ("mixed:6.0", "fast"),
    ],
)  # fmt: skip
def test_the_recipe_that_nobody_named_follows_the_bits(bits, recipe) -> None:
    request = Request(model="demo", bits=bits, target="ort-x86-vnni")
    assert (request.recipe, request.method.passes) == (recipe, RECIPES[recipe].passes)
    assert request.key()["recipe"] == recipe
    assert Request(model="demo", bits=bits, recipe="minmax").recipe == "minmax"
    assert {recipe, DEFAULT} <= {*RECOMMENDED, "fast-rotated"}


def test_the_key_has_what_decides_the_result_and_nothing_else() -> None:
    key = Request(model="demo", target="ort-x86-vnni", keep_float="head").key()
    assert (key["model"], key["target"], key["recipe"], key["bits"], key["keep_float"]) == (
        "demo", "ort-x86-vnni", "fast", "8", ["head"],
    )  # fmt: skip
    others = {"out": "x", "force": True, "threads": 7, "seconds": 1.0, "command": "c"}
    assert Request(model="demo", target="ort-x86-vnni", keep_float=("head",), **others).key() == key
    assert set(key).isdisjoint({*others, "images", "score", "weights", "mean"})
    for name, value in {
        "seed": 1,
        "bits": "w4a8",
        "everything": True,
        "labels": False,
        "calibration": 5,
        "max_drop": 1.0,
    }.items():
        assert Request(model="demo", target="ort-x86-vnni", keep_float="head", **{name: value}).key() != key, name


def test_a_path_of_python_is_a_model_as_its_text_is(tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=r"here\.onnx"):
        load(Request(model=tmp_path / "here.onnx", images=torch.zeros(4, 3, 8, 8)))
    path, text = (Request(model=kind("here.onnx"), images=tmp_path, target="ort-x86-vnni") for kind in (Path, str))
    assert (path.ref, path.key()) == (text.ref, text.key()) == ("here.onnx", text.key())


def test_a_module_and_arrays_are_values_of_a_request() -> None:
    request = Request(model=torch.nn.ReLU(), images=torch.zeros(2, 3, 8, 8), input_size=[3, 8, 8])
    assert (request.key()["model"], request.input_size) == ("ReLU", (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quantize", Request), ("search", SearchRequest), ("evaluate", EvaluateRequest), ("verify", VerifyRequest),
        ("bench", BenchRequest),
    ],
)  # fmt: skip
def test_the_command_line_has_every_field_with_its_help_and_its_default(name: str, kind: type[Asked]) -> None:
    parameters = {p.name: p for p in get_command(app).commands[name].params}  # type: ignore[attr-defined]
    fields = {n: f for n, f in kind.model_fields.items() if n != "command"}
    assert set(parameters) - {"help"} == set(fields)
    for field, info in fields.items():
        parameter = parameters[field]
        if field in kind.ARGUMENTS:
            continue
        assert parameter.opts == [option(field)]
        assert parameter.help == info.description
        assert info.description
        if info.is_required():
            assert parameter.required
        elif field not in ("labels", "out", "inputs", "keep_float", "budget", "batch", "runtime"):
            assert parameter.default == info.default, field


def test_each_field_of_preprocessing_is_an_option_and_a_field_of_preprocess() -> None:
    own = {field.name for field in dataclasses.fields(Preprocess)}
    assert set(FIELDS) <= set(Request.model_fields)
    assert {"size" if name == "input_size" else name for name in FIELDS} == own - {"antialias", "processor", "whole"}


def test_commands_on_a_run_say_of_an_option_what_quantize_says() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    of_quantize = {p.name: p.help for p in commands["quantize"].params}
    shared = {
        name: {p.name for p in commands[name].params if p.help and of_quantize.get(p.name) == p.help} - {"help"}
        for name in ("evaluate", "bench")
    }
    assert shared == {
        "evaluate": {"skip_bad", "annotations", "labels", "threads", "workers", "ray"},
        "bench": {"threads", "seconds"},
    }


@pytest.mark.parametrize(
    "words", [("evaluate", "--images", "x", "--limit"), ("evaluate", "--images", "x", "--threads"), ("bench", "--batch")]
)
def test_limits_of_commands_on_a_run_are_known_before_it_is_opened(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [words[0], "no-run", *words[1:], "0"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert re.search(rf"{words[-1]}.*(1<=x|x>=1|greater than or equal to 1)", done.output)


@pytest.mark.parametrize("command", ["quantize", "search"])
@pytest.mark.parametrize(("name", "least"), [("calibration", 1), ("scored", 1), ("steps", 1), ("threads", 1), ("seed", 0)])
def test_limits_are_those_of_the_command_line(command: str, name: str, least: int) -> None:
    done = CliRunner().invoke(app, [command, "demo", f"--{name}", str(least - 1)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert re.search(rf"(x>=|greater than or equal to ){least}", done.output)  # typer below 0.29 says the range


def test_the_fields_cover_what_the_house_asks_of_a_default() -> None:
    """Every default is itself allowed: an empty request is one that can be."""
    request = Request(model="demo")
    followed = {"model", "recipe"}  # the recipe follows the bits
    assert request.model_dump(exclude=followed) == {
        name: field.default for name, field in Request.model_fields.items() if name not in followed
    }


IMPORTED = "import sys; from fewbit import quantize; print(*sys.modules)"


def test_quantize_is_imported_without_timm_and_scipy_optimize() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fewbit.run" in loaded
    heavy = re.compile(r"(timm|scipy\.optimize|torchvision|transformers|openvino|nncf)(\.|$)")
    assert sorted(name for name in loaded if heavy.match(name) and name.count(".") < 2) == []


def test_a_search_takes_ranges_alone_and_says_so_before_any_work() -> None:
    assert SearchRequest(model="demo", recipe="kl").method.passes == RECIPES["kl"].passes
    with pytest.raises(FewbitError, match="search with one of mse, minmax, percentile, kl, then"):
        SearchRequest(model="demo", recipe="fast")


def test_a_word_that_nobody_reads_is_cut() -> None:
    for options in ({"bits": "8" * 5000}, {"target": "a" * 5000}, {"images": "x" * 5000}, {"weights": "w" * 5000}):
        (word,) = options.values()
        with pytest.raises(FewbitError, match=f"{word[:20]}") as caught:
            Request(**{"model": "demo", **options})
        assert len(str(caught.value)) < 700


def test_a_search_takes_every_option_about_the_model_and_its_images() -> None:
    of_the_file = {"bits", "everything", "only_what_pays", "normalize_inside", "curve", "seconds", "max_drop"}
    assert set(Request.model_fields) - set(SearchRequest.model_fields) == {*of_the_file, "must_pay", "quick", "memory"}


def test_a_target_whose_runtime_is_not_installed_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.runtimes.runtime_names", lambda: ("onnxruntime",))
    with pytest.raises(FewbitError, match=r"^target openvino-x86 runs in openvino, which is not installed: pip install"):
        Request(model="nothing", images="nowhere", target="openvino-x86")
    assert Request(model="demo", target="tensorrt").hardware.runs_in == "onnxruntime"  # which never runs here


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "is empty"), ({"a.txt": b"a"}, "holds no images"), ({"a.png": b"a"}, "a.png cannot be decoded")],
    ids=["empty", "text", "broken"],
)
@pytest.mark.parametrize("option", ["images", "score"])
def test_images_are_looked_at_before_the_model_is_loaded(
    files: dict[str, bytes], said: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def loaded(*model: object, **options: object) -> None:
        raise LookupError

    monkeypatch.setattr("fewbit.stages.load.load_model", loaded)
    with pytest.raises(BadImages, match=said):
        load(Request(model="demo", **{option: tmp_path}))
    if "a.png" in files:
        with pytest.raises(LookupError):
            load(Request(model="demo", skip_bad=True, **{option: tmp_path}))


@pytest.mark.parametrize(
    ("ref", "form"),
    [
        ("demo", models.DEMO), ("demo:detr", models.DEMO), ("demo:other", models.TIMM), ("resnet18", models.TIMM),
        ("timm:resnet18.a1_in1k", models.TIMM), ("torchvision:resnet18", models.TORCHVISION),
        ("hf:google/vit-base", models.HUGGING_FACE), ("hf:mine/w.safetensors", models.HUGGING_FACE), ("a/b.onnx", models.ONNX),
        ("a/b.pt2", models.PROGRAM), ("a/b.pt", models.TORCHSCRIPT), ("w.safetensors", models.TORCHSCRIPT),
        ("net.py", models.FUNCTION), ("a/net.py:make", models.FUNCTION), ("net.pyc", models.TIMM),
    ],
)  # fmt: skip
def test_each_name_of_a_model_has_one_form_which_can_be_read(ref: str, form: models.Form) -> None:
    assert models.form_of(ref) is form
    assert set(READERS) == set(models.FORMS)
    assert form.takes_weights == (form in (models.TIMM, models.TORCHVISION))
    assert form.text in (Request.model_fields["model"].description or "")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1h", 3600), ("1.5 h", 5400), ("0.001s", 0.001)])
def test_time_is_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["10", "ten minutes", "-5s", "10m", "1h30min", ""])
def test_time_that_is_not_understood_says_what_is_allowed(text):
    with pytest.raises(FewbitError, match="allowed are seconds, minutes and hours: 90s, 10min, 1h"):
        parse_time(text)


@pytest.mark.parametrize("text", ["0s", "0.0min", "00h"])
@pytest.mark.parametrize(("kind", "options"), [(Request, {"recipe": "best"}), (Request, {"max_drop": 1}), (SearchRequest, {})])
def test_no_time_at_all_is_refused_with_what_is_allowed(kind, options, text):
    with pytest.raises(FewbitError, match=f"^--time {text} leaves no time; allowed is more than 0, as in 90s, 10min, 1h"):
        kind(model="demo", time=text, **options)


REQUESTS = (Request, SensitivityRequest, SearchRequest, SweepRequest, EvaluateRequest, VerifyRequest, BenchRequest)


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_option_has_the_name_that_the_help_lists_with_an_underline(kind):
    """Oracle: the options that typer itself makes for the command."""
    name = kind.__name__.removesuffix("Request").lower() or "quantize"
    parameters = typer.main.get_command(app).commands[name].params
    typed = {text for one in parameters if one.name != "help" for text in one.opts if text.startswith("--")}
    arguments = {field: "demo" if field == "model" else __file__ for field in kind.ARGUMENTS}
    with pytest.raises(UnknownName, match=f"`fewbit {name} --help`") as caught:
        kind(**arguments, qqqq=1, **({"images": "x"} if kind is EvaluateRequest else {}))
    allowed = str(caught.value).partition("There are: ")[2].partition(". `")[0].split(", ")
    assert {f"--{one.replace('_', '-')}" for one in allowed if one not in kind.ARGUMENTS} == typed


def test_the_names_that_are_typed_mean_what_they_do_on_the_command_line():
    typed = Request(model="demo", no_labels=True, input=["size=[[3, 4]]"])
    ours = Request(model="demo", labels=False, inputs={"size": [[3, 4]]})
    assert (typed.labels, ours.labels, Request(model="demo", no_labels=False).labels) == (False, False, True)
    assert typed.inputs["size"].tolist() == ours.inputs["size"].tolist() == [[3, 4]]
