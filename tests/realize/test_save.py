"""Oracle: the same model in one file, in both runtimes; onnx's own loader."""

from __future__ import annotations

import filecmp
import json

import numpy as np
import onnx
import pytest

from fewbit import quantize
from fewbit.deploy.export import export
from fewbit.deploy.stamp import read
from fewbit.errors import BadFile
from fewbit.onnx_file import bytes_of
from fewbit.realize import realize
from fewbit.run import Run
from fewbit.runtimes import open_session, runtime_names


@pytest.fixture
def small(monkeypatch):
    """Every file has more weights than it may."""
    monkeypatch.setattr("fewbit.realize.beside.INSIDE", 0)
    monkeypatch.setattr("fewbit.realize.beside.TWIN", 0)


@pytest.mark.parametrize("runtime", runtime_names())
def test_a_file_with_its_weights_beside_it_computes_the_same(conv_net, tmp_path, monkeypatch, runtime):
    graph, plan = conv_net.graph, conv_net.plan("ort-x86-vnni")
    realize(graph, plan, tmp_path / "one.onnx", opset=20)
    monkeypatch.setattr("fewbit.realize.beside.INSIDE", 0)
    realize(graph, plan, tmp_path / "two.onnx", opset=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    assert onnx.load(tmp_path / "two.onnx", load_external_data=False).ByteSize() < bytes_of(tmp_path / "two.onnx")
    for shown in ((), [next(site for site, choice in plan.choices.items() if choice.codes is None) + ".codes"]):
        one, two = (
            open_session(runtime, tmp_path / name, outputs=shown).run(conv_net.images.numpy())
            for name in ("one.onnx", "two.onnx")
        )
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_with_weights_beside_its_files_is_verified_stamped_exported_and_guarded(conv_net, tmp_path, small):
    out = tmp_path / "run"
    result = quantize(
        conv_net.module, conv_net.images, target="ort-x86-vnni", out=out, input_size=(3, 8, 8), seconds=0.01, threads=1
    )
    assert not result.checks.wrong
    assert not result.checks.wrong_outputs
    names = set(json.loads((out / "run.json").read_text())["files"])
    assert {"model.onnx.data", "float.onnx.data"} <= names
    assert result.report["size"]["onnx_bytes"] == bytes_of(out / "model.onnx") > (out / "model.onnx").stat().st_size
    assert read(out / "model.onnx").intact
    assert Run.open(out).verify().file == ()
    exported = export(out, tmp_path / "taken").folder
    assert filecmp.cmp(exported / "model.onnx.data", out / "model.onnx.data", shallow=False)
    content = bytearray((out / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    run = Run.open(out)
    (out / "model.onnx.data").write_bytes(content)
    assert not read(out / "model.onnx").intact
    assert any("values changed" in one.what or "is another" in one.what for one in run.do("files"))
    with pytest.raises(BadFile, match=r"model\.onnx\.data"):
        Run.open(out)
