"""The file of a sweep. Oracle: the product of its lists, written out; the messages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewbit.errors import BadFile, BadImages, BadModel, FewbitError, UnknownName
from fewbit.request import Request
from fewbit.sweep.file import Row, rows_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    Path("net.py").write_text("def small(): ...\n")
    Path("broken.py").write_text("1 / 0\n")
    save_file({"weight": torch.zeros(2)}, "weights.safetensors")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), "net.pt")
    return tmp_path


def rows(text: str) -> tuple[Row, ...]:
    Path("a.toml").write_text(text)
    return rows_of(Path("a.toml"))


def test_rows_are_the_product_of_the_lists_with_the_options_of_all_and_of_each_model(folder: Path) -> None:
    found = rows(
        'models = ["demo", {model = "net.py:small", images = "images.npy", seed = 3}]\n'
        'targets = ["ort-x86-vnni", "openvino-x86"]\nrecipes = ["mse"]\nbits = [8, "4,first=8"]\n[options]\nseed = 1\n'
    )
    assert [tuple(row.options[k] for k in ("model", "target", "recipe", "bits", "seed")) for row in found] == [
        ("demo", "ort-x86-vnni", "mse", "8", 1), ("demo", "ort-x86-vnni", "mse", "4,first=8", 1),
        ("demo", "openvino-x86", "mse", "8", 1), ("demo", "openvino-x86", "mse", "4,first=8", 1),
        ("net.py:small", "ort-x86-vnni", "mse", "8", 3), ("net.py:small", "ort-x86-vnni", "mse", "4,first=8", 3),
        ("net.py:small", "openvino-x86", "mse", "8", 3), ("net.py:small", "openvino-x86", "mse", "4,first=8", 3),
    ]  # fmt: skip
    request = found[5].request(Path("x"))
    assert (request.seed, str(request.images), request.widths.exceptions) == (3, "images.npy", (("first", 8),))
    assert len({row.name for row in found}) == 8


def test_options_may_have_the_names_that_are_typed(folder: Path) -> None:
    found = rows(
        'models = ["demo", {model = "demo:resnet20", no_labels = false, input = ["b=2"]}]\n'
        '[options]\nno_labels = true\ninput = ["a=1"]\n'
    )
    requests = [row.request(Path("x")) for row in found]
    assert [(one.labels, {name: float(value) for name, value in one.inputs.items()}) for one in requests] == [
        (False, {"a": 1.0}), (True, {"b": 2.0}),
    ]  # fmt: skip


def test_torchscript_is_a_model_of_a_sweep_as_of_quantize(folder: Path) -> None:
    (row,) = rows('models = [{model = "net.pt", images = "images.npy", input_size = "3,8,8"}]')
    assert (row.options["model"], row.refusal) == ("net.pt", "")


def test_a_file_with_the_mark_that_some_editors_write_first_is_the_same(folder: Path) -> None:
    text = 'models = ["demo"]\nrecipes = ["mse"]\n'
    Path("marked.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert rows_of(Path("marked.toml")) == rows(text)


def test_one_model_alone_has_the_defaults_of_quantize(folder: Path) -> None:
    (row,) = rows('models = ["demo"]')
    plain = Request(model="demo")
    assert row.request(Path("x")).key() == plain.key()


def test_a_combination_that_cannot_be_is_a_row_with_its_refusal(folder: Path) -> None:
    found = rows('models = ["demo"]\ntargets = ["ort-x86-vnni", "ort-x86-w4"]\nbits = [8, 4]')
    assert [bool(row.refusal) for row in found] == [False, False, True, False]
    assert "has no integers wider than 4 bits" in found[2].refusal


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("models = [", BadFile, "a.toml is not readable TOML .*end of document.* Fix it; a sweep begins with models = "),
        ("", BadFile, "a.toml: models is missing; it is a list of names"),
        ("models = []", BadFile, r"a.toml: models is an empty list; it is a list of names .*: write models = \["),
        ('models = ["demo"]\ntargets = []', BadFile, r"targets is an empty list; .*, or leave targets out\.$"),
        ('models = ["demo"]\nrecipes = []', BadFile, r"recipes is an empty list; .*, or leave recipes out\.$"),
        ('models = ["demo"]\nbits = []', BadFile, r"bits is an empty list; .*: write bits = \[8, .*, or leave bits out\.$"),
        ('models = ["demo"]\n[options]\nimages = []', BadFile, "a.toml: images is an empty list; give it a value, or leave"),
        ('models = [{model = "demo", keep_float = []}]', BadFile, "a.toml: keep_float is an empty list"),
        ('options = []\nmodels = ["demo"]', BadFile, r"options is \[\]; it is a table, \[options\], with a line for each"),
        ('models = "demo"', BadFile, "models is 'demo', which is no list; it is a list of names"),
        ('models = [""]', BadFile, "models has ''"),
        ('models = ["demo"]\nbits = [8.0]', BadFile, "bits has 8.0"),
        ('models = ["demo"]\nbits = [true]', BadFile, "bits has True"),
        ('models = [{images = "images.npy"}]', BadFile, "has no name; write {model = "),
        ('models = ["demo"]\nrecipe = ["mse"]', UnknownName, "unknown key in a.toml 'recipe'. Did you mean recipes"),
        ('models = ["demo"]\nseed = 1', UnknownName, "unknown key in a.toml 'seed'.* below a line \\[options\\]"),
        ('models = ["demo"]\n[options]\nsede = 1', UnknownName, "unknown option in a.toml 'sede'. Did you mean seed"),
        ('models = ["demo"]\n[options]\nout = "x"', UnknownName, "unknown option in a.toml 'out'"),
        ('models = ["demo"]\n[options]\nrecipe = "x"', BadFile, "recipe is not an option of all rows; give it as a list"),
        ('models = ["demo"]\n[options]\nseed = -1', FewbitError, "a.toml: no row can be made: FewbitError: --seed -1"),
        ('models = ["demo"]\nrecipes = ["mse", "fats"]', FewbitError, "with recipe fats: UnknownName: .*Did you mean fast"),
        ('models = ["demo"]\ntargets = ["ort-x86"]', FewbitError, "no row can be made: UnknownName: unknown target 'ort-x86'"),
        ('models = ["demo"]\nbits = ["eight"]', FewbitError, "no row can be made: .*--bits eight is not understood"),
        ('models = ["demo", "nowhere.onnx"]', BadFile, "nowhere.onnx does not exist"),
        ('models = ["demo", "nowhere.py:net"]', BadFile, "nowhere.py does not exist"),
        ('models = ["demo", "net.py:smal"]', UnknownName, "unknown function in net.py 'smal'. Did you mean small"),
        ('models = ["demo", "broken.py:net"]', BadModel, "broken.py cannot be imported: ZeroDivisionError"),
        ('models = ["demo", "hf:nowhere"]', BadModel, "hf:nowhere cannot be loaded: .* Give a folder with config.json"),
        ('models = ["demo"]\n[options]\nloader = "net.py:smal"', UnknownName, "unknown function in net.py 'smal'"),
        ('models = ["demo"]\n[options]\ntask = "net.py:smal"', UnknownName, "unknown function in net.py 'smal'"),
        ('models = ["demo"]\n[options]\nno_label = true', UnknownName, "option in a.toml 'no_label'. Did you mean no_labels"),
        ('models = ["demo"]\n[options]\nno_labels = 3', FewbitError, "--no-labels 3 is not allowed; it should be a valid"),
        ('models = ["demo", "nowhere.pt"]', BadFile, "nowhere.pt does not exist; a file of weights goes with a name"),
        ('models = ["demo", "weights.safetensors"]', BadModel, "weights.safetensors holds weights and not the model"),
        ('models = ["demo", "torchvision:resnet19"]', UnknownName, "unknown torchvision model .resnet19.. Did you mean resnet"),
        ('models = ["demo", "resnet18x"]', UnknownName, "unknown model 'resnet18x'. Did you mean resnet18"),
        ('models = ["net.py:small"]', FewbitError, "no row can be made: BadImages: no images"),
        ('models = ["demo", "demo"]', BadFile, "a.toml has one row twice: demo-"),
        (f'models = ["demo"]\nbits = {[8] * 1001}\nrecipes = {["mse"] * 100}', BadFile, "100,100 rows; .* at most 100,000"),
    ],
)  # fmt: skip
def test_what_no_row_can_use_is_refused_before_any_work(folder, text, kind, says) -> None:
    with pytest.raises(kind, match=says):
        rows(text)


def test_a_row_is_another_one_when_its_files_or_options_are(folder: Path) -> None:
    text = 'models = [{model = "net.py:small", images = "images.npy"}]\n'
    names = [rows(text)[0].name, rows(text)[0].name, rows(text + "[options]\nseed = 1")[0].name]
    for file in ("images.npy", "net.py"):
        os.utime(file, (1, 1))
        names.append(rows(text)[0].name)
    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_a_list_of_images_that_are_missing_is_refused_before_the_work(folder: Path) -> None:
    says = r"no row can be made: BadImages: images: a does not exist; of 2 images 2 are not there\. Give files of images, or a "
    with pytest.raises(FewbitError, match=says):
        rows('models = ["demo"]\n[options]\nimages = ["a", "b"]\n')


def test_missing_images_of_one_model_are_refused(folder: Path) -> None:
    with pytest.raises(FewbitError, match=f"with model net.py:small: {BadImages.__name__}: gone.npy does not exist"):
        rows('models = ["demo", {model = "net.py:small", images = "gone.npy"}]')
