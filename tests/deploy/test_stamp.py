"""What an integer file says of itself. Oracles: the SHA-256 of the file that was measured, and the records that went in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.core.plan import Plan
from fewbit.core.record import MADE, Record
from fewbit.deploy import made, read, stamp, stamped
from fewbit.errors import BadFile
from fewbit.folder import MARKS, seal

PLAN = Plan("ort-x86-vnni", "fast", "w4a8", {}, (), exemptions=("head: float",), model="/home/me/net.onnx")
RECORD = {
    "versions": {"fewbit": "9.9"}, "task": "classify", "runtime": "onnxruntime", "seed": 3, "machine": {"threads": 7},
    "hashes": {"model": "ab", "calibration": "cd"}, "classes": ["cat", "dog"], "batch": None,
    "inputs": [
        {"name": "x", "shape": [3, 8, 6], "batch": True, "kind": "image", "others": [[3, 9, 6]]},
        {"name": "level", "shape": [], "batch": False, "kind": "constant"},
        {"name": "prompt", "shape": [77], "batch": True, "kind": "each image"},
    ],
}  # fmt: skip
REPORT: dict[str, Any] = {
    "verify": {
        "problems": [], "sites": 1, "codes_compared": 12345, "codes_wrong": 0, "codes_differing": 2, "worst_site": "a",
    },
    "accuracy": {
        "measure": "top-1 accuracy", "unit": "%", "float": 82.300000001, "quantized": 82.1, "agreement": 99.1234567,
        "agreement_measure": "agreement", "interval": [-0.00001, 1.5], "runtime": "onnxruntime", "why": "", "rows": [],
    },
    "images": {"calibration": 128, "scored": 1000},
}  # fmt: skip


def net(folder: Path, value: float = 1.0) -> Path:
    """y = x + value, with an entry of its own."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    stored = [numpy_helper.from_array(np.array([value], np.float32), "w")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], stored)
    model = helper.make_model(graph)
    helper.set_model_props(model, {"own": "[1]"})
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def test_the_entry_is_of_the_very_file_that_was_measured_and_says_how_it_was_made(tmp_path: Path) -> None:
    path = net(tmp_path)
    before = path.read_bytes()
    stamp(path, made(PLAN, RECORD, REPORT))
    assert path.read_bytes().startswith(before)  # nothing in front of it has changed
    said = read(path)
    assert said.intact
    assert said.entries["own"] == "[1]"
    entry = said.entries[MADE]
    measured = entry.pop("measured")
    assert entry == {
        "fewbit": "9.9", "model": "net.onnx", "target": "ort-x86-vnni", "recipe": "fast", "bits": "w4a8",
        "left_alone": ["head: float"], "task": "classify", "runtime": "onnxruntime", "seed": 3, "hashes": RECORD["hashes"],
        "classes": ["cat", "dog"], "inputs": ["x: batch x 3 x any (here 8) x 6", "level: a number", "prompt: batch x 77"],
    }  # fmt: skip
    assert measured.pop("sha256") == hashlib.sha256(before).hexdigest()
    assert measured == {
        "right": True, "problems": [], "sites": 1, "codes_compared": 12345, "codes_wrong": 0, "measure": "top-1 accuracy",
        "unit": "%", "float": 82.3, "quantized": 82.1, "agreement_measure": "agreement", "agreement": 99.1235,
        "interval": [-0.0, 1.5], "runtime": "onnxruntime", "why": "", "images": 1000,
    }  # fmt: skip


def test_a_second_stamp_takes_the_place_of_the_first_and_records_give_the_same_again(tmp_path: Path) -> None:
    path = net(tmp_path)
    stamp(path, made(PLAN, RECORD, REPORT))
    once = path.read_bytes()
    stamp(path, made(PLAN, json.loads(json.dumps(RECORD)), json.loads(json.dumps(REPORT))))
    assert path.read_bytes() == once
    assert stamped(onnx.load(net(tmp_path)), made(PLAN, RECORD, REPORT)).SerializeToString() == once


def test_a_file_that_was_wrong_says_so() -> None:
    report = {**REPORT, "verify": {**REPORT["verify"], "problems": ["a: 1 of 9 codes"], "codes_wrong": 1}}
    measured = made(PLAN, RECORD, report)["measured"]
    assert (measured["right"], measured["problems"], measured["codes_wrong"]) == (False, ["a: 1 of 9 codes"], 1)


def test_a_graph_that_was_changed_after_it_was_measured_is_noticed(tmp_path: Path) -> None:
    path = net(tmp_path)
    stamp(path, made(PLAN, RECORD, REPORT))
    entry = onnx.load(path).metadata_props[-1]
    other = onnx.load(net(tmp_path, 2.0))
    other.metadata_props.append(entry)
    onnx.save(other, path)
    assert read(path).intact is False
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 1
    assert "was changed after it was measured" in result.output


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("82.3", "92.3"),
        ('"codes_wrong": 0', '"codes_wrong": 1'),
        ('"recipe": "fast"', '"recipe": "best"'),
        ('"cd"', '"ce"'),
        (", ", ","),
    ],
)
def test_a_measurement_that_was_changed_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    path = net(tmp_path)
    stamp(path, made(PLAN, RECORD, REPORT))
    assert (read(path).intact, read(path).as_made) == (True, True)
    model = onnx.load(path)
    entry = model.metadata_props[-1]
    assert before in entry.value
    entry.value = entry.value.replace(before, after)
    onnx.save(model, path)
    assert (read(path).intact, read(path).as_made) == (True, False)
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 1
    assert "its metadata entry fewbit.made, which says how it was made" in " ".join(result.output.split())


def test_an_entry_that_has_lost_its_digest_is_noticed(tmp_path: Path) -> None:
    path = net(tmp_path)
    stamp(path, made(PLAN, RECORD, REPORT))
    model = onnx.load(path)
    whole = json.loads(model.metadata_props[-1].value)
    assert whole.pop("sha256") == hashlib.sha256((json.dumps(whole, indent=1) + "\n").encode()).hexdigest()
    model.metadata_props[-1].value = json.dumps(whole)
    onnx.save(model, path)
    assert read(path).as_made is False


def test_the_command_shows_it_and_says_where_there_is_nothing(tmp_path: Path) -> None:
    path = net(tmp_path)
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 0
    assert "does not say how it was made" in result.output
    stamp(path, made(PLAN, RECORD, REPORT))
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    for words in (
        "recipe │ fast",
        "left alone │ head: float",
        "classes │ cat, dog",
        "codes wrong │ 0",
        "sites │ 1 ",
        "right │ yes",
    ):
        assert words in shown, words


def test_times_stand_beside_the_file_with_the_machine_and_not_in_it(tmp_path: Path) -> None:
    path = net(tmp_path).rename(tmp_path / "model.onnx")
    stamp(path, made(PLAN, RECORD, REPORT))
    stamped_once = path.read_bytes()
    assert "fewbit show RUN has them" in " ".join(CliRunner().invoke(app, ["show", str(path)]).output.split())
    paid = {
        "runtime": "onnxruntime", "batch": 4, "threads": 0, "ms": 12.3456, "spread": [12.0, 13.0],
        "float_runtime": "onnxruntime", "float_ms": 24.0, "float_spread": [23.0, 25.0], "rounds": 9,
        "ratio": 1.94, "interval": [1.9, 1.98], "pays": True,
    }  # fmt: skip
    for name, value in (("report", {"pays": paid}), ("run", {"machine": {"processor": "Some CPU", "threads": 7}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert "How fast" not in CliRunner().invoke(app, ["show", str(path)]).output  # beside a file, but not of a finished run
    (tmp_path / MARKS["run"]).write_text("")
    seal(tmp_path)
    shown = " ".join(CliRunner().invoke(app, ["show", str(path)]).output.split())
    for words in (
        "processor │ Some CPU", "threads │ 7", "batch │ 4", "milliseconds │ 12.3 ms (middle half 12 to 13)",
        "fastest float model │ 24 ms (middle half 23 to 25) in onnxruntime",
        "times as fast │ 1.940 in paired rounds, 95 % interval 1.900 to 1.980",
        "pays │ yes",
    ):  # fmt: skip
        assert words in shown, (words, shown)
    (tmp_path / "report.json").write_text('{"pays": null}')  # as where nothing was timed
    seal(tmp_path)
    assert "How fast" not in CliRunner().invoke(app, ["show", str(path)]).output
    assert path.read_bytes() == stamped_once


def test_another_entry_of_that_name_is_refused(tmp_path: Path) -> None:
    path = net(tmp_path)
    model = onnx.load(path)
    model.metadata_props.add(key=MADE, value='{"measured": 3}')
    onnx.save(model, path)
    with pytest.raises(BadFile, match=MADE):
        read(path)


def test_a_file_without_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes(b"x\n")  # which protobuf takes for a message of an unknown field
    for path in (tmp_path / "net.py", Path("/dev/null")):
        with pytest.raises(BadFile, match="no graph"):
            read(path)


def test_a_file_that_is_made_of_one_does_not_inherit_how_that_was_made() -> None:
    record = Record({"size": [3, 8, 8]}, metadata={MADE: "{}", "own": "1"})
    assert set(record.entries()) == {"own", "fewbit.preprocess"}
