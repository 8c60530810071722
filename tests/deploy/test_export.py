"""`fewbit export`. Oracles: the outputs of the run's own file, and what a folder held before."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from deploy.test_predict import BLOCKED, made
from fewbit.cli import app
from fewbit.deploy import export as exporting
from fewbit.deploy import read
from fewbit.deploy.export import export
from fewbit.errors import BadFile, FewbitFailed, Stopped, UnknownName
from fewbit.files import write_json
from fewbit.folder import check_out, seal
from fewbit.run import Result
from fewbit.runtimes import open_session, runtime_names

needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")


TEXTS = (".md", ".py", ".cpp", ".mjs", ".html", ".json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export` reads of a run."""
    folder = tmp_path_factory.mktemp("run")
    made(folder / "deploy", tmp_path_factory.mktemp("net"), mean=0.5, std=0.25)
    save_file({"images": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)}, folder / "images.safetensors")
    write_json(folder / "run.json", {})
    seal(folder)
    return folder


@pytest.mark.parametrize("form", ["onnx", "ort", pytest.param("openvino", marks=needs_openvino)])
def test_every_format_answers_as_the_run_s_own_file(run: Path, tmp_path: Path, form: str) -> None:
    picture = tmp_path / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)).save(picture)
    exported = export(run, tmp_path / form, form)
    assert exported.images == 4
    answers = []
    for folder in (run / "deploy", tmp_path / form):
        words = [sys.executable, "-c", BLOCKED, str(folder / "predict.py"), str(picture)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"})
        answers.append(json.loads(done.stdout)["classes"])
    assert answers[0] == answers[1]
    file = {"onnx": "model.onnx", "ort": "model.ort", "openvino": "model.xml"}[form]
    texts = {path.name: path.read_text() for path in (tmp_path / form).iterdir() if path.suffix in TEXTS}
    assert f"`{file}` is the model" in texts["README.md"]
    assert f"The file is {file}, in this folder" in texts["predict.py"]
    if form != "onnx":
        assert not [name for name, text in texts.items() if "model.onnx" in text]
        assert "measured is in the run: `fewbit show RUN`" in texts["README.md"]
        with pytest.raises(BadFile, match=r"(onnxruntime's own form|openvino's IR), which cannot be shown.*fewbit show RUN"):
            read(tmp_path / form / file)
    assert (tmp_path / form / "example.cpp").exists() == (form != "openvino")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([form, "p.png"])


def test_a_format_that_gives_other_answers_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: Path, folder: Path) -> None:
        import onnx

        file = onnx.load(model)
        weight = next(one for one in file.graph.initializer if len(one.dims) > 1)
        array = onnx.numpy_helper.to_array(weight).copy()
        array.flat[0] += 1
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        onnx.save(file, folder / "model.onnx")

    form = exporting.Format("", ("model.onnx",), other)
    monkeypatch.setattr(exporting, "FORMATS", {"onnx": form})
    with pytest.raises(FewbitFailed, match=r"model\.onnx gives another .* on image 0"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_the_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    for to in (tmp_path / "there", tmp_path / "there" / "mine", tmp_path / "no" / "folder", Path("/proc/x")):
        with pytest.raises(BadFile, match="--to"):
            export(run, to)
    (tmp_path / "link").symlink_to(run)
    for inside in (run / "inner", run / "deploy" / "inner", tmp_path / "link" / "inner"):
        with pytest.raises(BadFile, match=r"--to .*inner is in the run"):
            export(run, inside)
        assert not inside.exists()
    with pytest.raises(UnknownName, match="unknown format 'tflite'"):
        export(run, tmp_path / "out", "tflite")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "deploy" / "task.json").write_text("{}")
    with pytest.raises(BadFile, match=r"task\.json: changed"):
        export(other, tmp_path / "out")


def test_a_path_that_is_not_utf_8_is_refused_before_the_work(run: Path, tmp_path: Path) -> None:
    """As Python reads every name of other letters in the locale C. Oracle: what onnxruntime and openvino take, no such text."""
    odd = tmp_path / "dossier \udcc3\udca9"
    shutil.copytree(run, odd)
    said = r"is not UTF-8 to Python here, and no runtime takes such a path; set PYTHONUTF8=1"
    for runtime in runtime_names():
        with pytest.raises(BadFile, match=said):
            open_session(runtime, odd / "model.onnx")
    for given, to in ((odd, tmp_path / "to"), (run, tmp_path / "\udcff")):
        with pytest.raises(BadFile, match=said):
            export(given, to)
    with pytest.raises(BadFile, match=said):
        check_out(tmp_path / "\udcff", "run", force=False)
    assert len(list(tmp_path.iterdir())) == 1


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may have more bytes: the error of a full disk, EFBIG in the place of ENOSPC, without a disk of one's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["onnx", "ort", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("size", [100, 0])
def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(run: Path, tmp_path: Path, form: str, size: int) -> None:
    """It fills at once, or at the model: every text of the folder is smaller than the model that is made here."""
    big = tmp_path / "big"
    shutil.copytree(run, big)
    if not size:
        for path in (big / "deploy").iterdir():
            if path.name not in ("task.json", "preprocess.json", "README.md", "predict.py"):
                path.unlink()
        (big / "deploy" / "predict.py").write_text("")
        size = max(path.stat().st_size for path in (big / "deploy").iterdir())
        seal(big)
    to = tmp_path / "to"
    with small_disk(size), pytest.raises(Stopped) as error:
        export(big, to, form)
    assert str(error.value).startswith(f"--to {to} cannot be written: ")
    assert str(error.value).endswith("Free some space, or give another folder: --to DIR.")
    assert str(run) not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_a_full_disk_is_told_of_the_folder_that_a_result_goes_to(run: Path, tmp_path: Path) -> None:
    unread: Any = None
    result = Result(run, unread, unread, unread, unread, unread, unread)
    with small_disk(100), pytest.raises(Stopped, match=r"the file is too large here\. Free some space or give") as error:
        result.export(tmp_path / "to")
    assert str(error.value).startswith(f"{tmp_path / 'to'}.part/")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_was_compared(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "empty")])
    assert result.exit_code == 0, result.output
    assert "Its outputs are those of the run's own file on 4 images" in result.output
    assert CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "x"), "--format", "onx"]).exit_code == 2
