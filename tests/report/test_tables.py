"""Tables are what the records say: widths, losses, heads, files and runs, number by number."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid, QParams
from fewbit.core.plan import Choice, PassLog, Plan
from fewbit.errors import BadFile
from fewbit.observe.outliers import Outliers
from fewbit.report import tables
from fewbit.report.rows import attention, outliers


@pytest.mark.parametrize(
    ("wrong", "said"), [([1], "1 code at 1 site differs between"), ([2, 3], "5 codes at 2 sites differ between")]
)
def test_one_code_at_one_site_is_said_as_one(wrong: list[int], said: str) -> None:
    found = [SimpleNamespace(site="a", wrong=count, max_difference=1) for count in wrong]
    result = SimpleNamespace(file=(), weights=(), selections=((), ()), off=found, on=(), wrong_outputs=())
    (line,) = tables.problems(result)  # type: ignore[arg-type]
    assert line.startswith(said)


def test_a_site_without_a_ratio_of_signal_to_noise_is_none_of_the_worst() -> None:
    rows = [{"site": name, "range": [0, 1], "observed": [0, 0], "sqnr_db": value} for name, value in (("a", None), ("b", 9.0))]
    assert [row["site"] for row in tables.histograms(rows, {"a": {}, "b": {}})] == ["b"]


def plan(*rows: dict[str, Any]) -> Plan:
    """A plan whose graph was equalized."""
    return Plan("target", "recipe", "8", {}, (), log=(PassLog("equalize", "Equalize()", rows),))


def test_the_map_of_a_class_token_is_its_row_over_the_patches() -> None:
    tokens = [[100 * q + k for k in range(7)] for q in range(7)]
    op = {"op": "a", "image": 0, "float": [tokens], "quantized": [tokens], "grid": [2, 3], "flipped_share": [0.25, 0.5]}
    (row,) = attention({**op, "class_token": True})
    assert row["float"] == row["quantized"] == [[1, 2, 3], [4, 5, 6]]
    assert (row["flipped_share"], row["x"], row["y"]) == (0.25, "patch column", "patch row")
    (row,) = attention({**op, "class_token": False})
    assert (row["float"], row["x"], row["y"]) == (tokens, "key", "query")


def test_files_are_weighed(tmp_path: Path) -> None:
    for count, name in enumerate(tables.WEIGHED, start=3):
        (tmp_path / name).write_bytes(bytes(count))
    assert [row["bytes"] for row in tables.files(tmp_path)] == [3, 4, 5]


def one(bits: str = "4", quantized: float | None = 70.0, model: str = "m", images: str = "i") -> tuple[Any, Any]:
    """report.json and run.json of a run."""
    measures = {"measure": "top-1 accuracy", "unit": "%", "agreement_measure": "agreement in class"}
    score = {"float": 75.0, "quantized": quantized, "agreement": 90.0, "interval": [-7.0, -3.0], **measures}
    size = {"float_bytes": 32, "onnx_bytes": 5, "average_weight_bits": 4.5}
    report = {"bits": bits, "recipe": "mse", "accuracy": score, "size": size}
    return report, {"hashes": {"model": model, "scored": images}}


def test_runs_become_rows_beside_the_accuracy_of_the_float_model() -> None:
    point = {"bytes": 5, "bits": 4.5, "accuracy": 70.0, "interval": [68.0, 72.0], "float": 75.0}
    point |= {"measure": "top-1 accuracy", "unit": "%", "agreement_measure": "agreement in class"}
    assert tables.runs({"a": one(), "b": one("mixed:5:4,5")}) == [
        {"kind": "mse, one width", "label": "4", "agreement": 90.0} | point,
        {"kind": "mse, mixed precision", "label": "mixed:5:4,5", "agreement": 90.0} | point,
    ]


def test_where_one_run_has_no_labels_all_rows_are_agreements_and_an_interval_of_an_accuracy_is_dropped() -> None:
    rows = tables.runs({"a": one(), "b": one(quantized=None)})
    assert {(row["measure"], row["float"]) for row in rows} == {("agreement in class", None)}
    assert [(row["accuracy"], row["interval"]) for row in rows] == [(90.0, None), (90.0, [-7.0, -3.0])]


def test_runs_of_another_model_or_on_other_images_are_refused() -> None:
    with pytest.raises(BadFile, match=r"^b has another model than a;"):
        tables.runs({"a": one(), "b": one(model="n")})
    with pytest.raises(BadFile, match=r"^b was scored on other images than a;"):
        tables.runs({"a": one(), "b": one(images="j")})


@pytest.mark.parametrize("place", ["bits", "recipe", "accuracy", "size", "hashes"])
def test_a_run_whose_record_lacks_something_is_named(place: str) -> None:
    broken = copy.deepcopy(one())
    for record in broken:
        record.pop(place, None)
    with pytest.raises(BadFile, match=f"^b: .*{place}"):
        tables.runs({"a": one(), "b": broken})
    with pytest.raises(BadFile, match=r"^b: "):
        tables.runs({"a": one(), "b": ([], [])})


def test_what_was_done_about_an_outlier_is_read_from_the_plan() -> None:
    def found(site: str) -> Outliers:
        return Outliers(site, 100.0, 20.0, 1, (3,), 0.1, None, 0.0, 0, (), 1.0)

    def chosen(site: str, scale: float, axis: int | None = None) -> Choice:
        steps = torch.full((4,) if axis is not None else (), scale)
        return Choice(
            site, "input", Grid(8, signed=False, symmetric=False, axis=axis), QParams(steps, torch.zeros_like(steps)), ""
        )

    ops = (Op("moved", "linear", "n", {"input": "moved:input"}), Op("off", "linear", "n", {"input": "off:input"}))
    graph = Graph(nn.Module(), ops, (), (), ())  # type: ignore[arg-type]
    rows = [{"op": "moved", "strength": 0.5, "moved": True}, {"op": "off", "strength": None, "moved": False}]
    one = dataclasses.replace(plan(*rows), choices={
        "moved:input": chosen("moved:input", 0.1),
        "off:input": chosen("off:input", 0.1),
        "wide:input": chosen("wide:input", 100 / 255),
        "each:input": chosen("each:input", 0.1, axis=1),
        "less:input": chosen("less:input", 0.1),
    })  # fmt: skip
    sites = ["moved:input", "off:input", "wide:input", "each:input", "float:input", "less:input"]
    observed = {"less:input": (-12.5, 3.0), "off:input": (-100.0, 3.0)}
    done = [row["done"] for row in outliers(graph, one, [found(site) for site in sites], observed)]
    assert done == [
        "moved into the weights behind, strength 0.5",
        "clipped at 25.5 of 100",
        "covered by the range",
        "each channel has its own scale",
        "stays float",
        "equalized: 100 is 12.5",
    ]
