"""Tables are what the records say: widths, losses, heads, files and runs, number by number."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.core.grid import Grid, QParams
from fewbit.core.values import Choice, Graph, Op, Plan
from fewbit.errors import BadFile
from fewbit.observe.outliers import Outliers
from fewbit.report import tables

MIXED: dict[str, Any] = {
    "mean": 5.0,
    "units": [
        {"unit": "stem", "kind": "op", "bits": 6, "weights": 10, "nuclear": None, "losses": {"4": 9.0, "6": 2.0}},
        {"unit": "a", "kind": "attention", "bits": 4, "weights": 20, "nuclear": 7.5, "losses": {"4": 3.0, "6": 1.0}},
    ],
    "uniform": [{"bits": 4, "bytes": 15, "loss": 12.0}, {"bits": 6, "bytes": 23, "loss": 3.0}],
    "frontier": [
        {"bytes": 15, "loss": 12.0, "mean": 4.0, "bits": [4, 4], "taken": False},
        {"bytes": 18, "loss": 5.0, "mean": 4.6666, "bits": [6, 4], "taken": True},
        {"bytes": 23, "loss": 3.0, "mean": 6.0, "bits": [6, 6], "taken": False},
    ],
}
EMPTY: dict[str, Any] = {
    "frontier": [], "units": [], "ranking": [], "joint": [], "norms": [], "equalized": [], "rebuilt": [],
}  # fmt: skip
JOINT: dict[str, Any] = {
    "loss": "KL from the float model",
    "images": 32,
    "sites": 2,
    "norms": [{"p": 2.0, "loss": 0.5}, {"p": 3.0, "loss": 0.25}, {"p": 4.0, "loss": 1.0}],
    "parabola": {"a": 0.5, "b": -2.75, "c": 4.0, "r2": 1.0, "vertex": 2.75},
    "p": 3.0,
    "start": 0.25,
    "best": 0.125,
    "evaluations": 3,
    "curve": [[0, 0.25, 0.25], [1, None, 0.25], [2, 0.125, 0.125]],
    "seconds": 300.0,
    "out_of_time": False,
}
FLIPS = [{"op": "a.qk", "head": 0, "with": 0.01, "without": 0.02}]


def plan(**extra: Any) -> Plan:
    return Plan("target", "recipe", "8", {}, (), extra=extra)


def test_the_frontier_has_all_points_one_width_and_the_one_that_was_taken() -> None:
    rows = tables.searched(plan(mixed=MIXED))["frontier"]
    assert [(row["kind"], row["bytes"], row["loss"], row["bits"], row["label"]) for row in rows] == [
        ("a width for each module", 15, 12.0, 4.0, "4 bits"),
        ("a width for each module", 18, 5.0, 4.6666, "4.67 bits"),
        ("a width for each module", 23, 3.0, 6.0, "6 bits"),
        ("one width", 15, 12.0, 4, "4 bits"),
        ("one width", 23, 3.0, 6, "6 bits"),
        ("this run", 18, 5.0, 4.6666, "4.67 bits"),
    ]


def test_a_module_has_the_loss_of_its_own_width() -> None:
    rows = tables.searched(plan(mixed=MIXED))["units"]
    assert [row.pop("loss") for row in rows] == [2.0, 3.0]
    assert rows == MIXED["units"]


def test_ranking_rows_are_those_of_the_plan_and_a_plan_without_searches_has_empty_tables() -> None:
    assert tables.searched(plan(ranking=FLIPS)) == {**EMPTY, "ranking": FLIPS}
    assert tables.searched(plan()) == EMPTY


def test_the_curve_of_a_joint_search_is_that_of_the_plan() -> None:
    rows = tables.searched(plan(joint=JOINT))["joint"]
    assert [[row[key] for key in ("evaluation", "loss", "best")] for row in rows] == JOINT["curve"]
    assert {row["what"] for row in rows} == {JOINT["loss"]}
    assert (rows[0]["evaluations"], rows[0]["images"], rows[0]["sites"]) == (3, 32, 2)


def test_losses_over_p_have_their_parabola_and_the_start() -> None:
    rows = tables.searched(plan(joint=JOINT))["norms"]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("measured", "parabola", "start")}
    assert [(row["p"], row["loss"]) for row in kinds["measured"]] == [(2.0, 0.5), (3.0, 0.25), (4.0, 1.0)]
    assert [(row["p"], row["loss"]) for row in kinds["start"]] == [(3.0, 0.25)]
    ends = [kinds["parabola"][i] for i in (0, 20, -1)]
    assert [(row["p"], row["loss"]) for row in ends] == [(2.0, 0.5), (3.0, 0.25), (4.0, 1.0)]
    assert [row["kind"] for row in tables.searched(plan(joint={**JOINT, "parabola": None}))["norms"]] == ["measured"] * 3 + [
        "start"
    ]
    assert tables.searched(plan(joint={**JOINT, "norms": []}))["norms"] == []


def test_files_are_weighed(tmp_path: Path) -> None:
    for count, name in enumerate(tables.WEIGHED, start=3):
        (tmp_path / name).write_bytes(bytes(count))
    assert [row["bytes"] for row in tables.files(tmp_path)] == [3, 4, 5]


def one(bits: str = "4", quantized: float | None = 70.0, model: str = "m", images: str = "i") -> tuple[Any, Any]:
    """report.json and run.json of a run."""
    score = {"float": 75.0, "quantized": quantized, "agreement": 90.0, "interval": [68.0, 72.0]}
    size = {"float_bytes": 32, "onnx_bytes": 5, "average_weight_bits": 4.5}
    report = {"bits": bits, "recipe": "mse", "accuracy": score, "size": size}
    return report, {"hashes": {"model": model, "scored": images}}


def test_runs_become_rows_and_the_float_model_is_the_last() -> None:
    point = {"bytes": 5, "bits": 4.5, "accuracy": 70.0, "interval": [68.0, 72.0], "measure": "accuracy"}
    whole = {"bytes": 32, "bits": 32.0, "accuracy": 75.0, "interval": None, "measure": "accuracy"}
    assert tables.runs({"a": one(), "b": one("mixed:5:4,5")}) == [
        {"kind": "mse, one width", "label": "4"} | point,
        {"kind": "mse, a width for each module", "label": "mixed:5:4,5"} | point,
        {"kind": "float", "label": "float model"} | whole,
    ]


def test_where_one_run_has_no_labels_all_rows_are_agreements_and_an_interval_of_an_accuracy_is_dropped() -> None:
    rows = tables.runs({"a": one(), "b": one(quantized=None)})
    assert {row["measure"] for row in rows} == {"agreement"}
    assert [(row["accuracy"], row["interval"]) for row in rows] == [(90.0, None), (90.0, [68.0, 72.0]), (100.0, None)]


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


def test_equalized_rows_are_those_of_the_plan() -> None:
    rows = [{"kind": "norm", "op": "fc1", "strength": 0.5, "before": 2.0, "after": 1.0, "shift": True, "moved": True}]
    assert tables.searched(plan(equalize=rows)) == {**EMPTY, "equalized": rows}


def test_what_was_done_about_an_outlier_is_read_from_the_plan() -> None:
    def found(site: str) -> Outliers:
        return Outliers(site, 100.0, 20.0, (3,), 0.1, None, 0.0, (), 1.0)

    def chosen(site: str, scale: float, axis: int | None = None) -> Choice:
        steps = torch.full((4,) if axis is not None else (), scale)
        return Choice(
            site, "input", Grid(8, signed=False, symmetric=False, axis=axis), QParams(steps, torch.zeros_like(steps)), ""
        )

    ops = (Op("moved", "linear", "n", {"input": "moved:input"}), Op("off", "linear", "n", {"input": "off:input"}))
    graph = Graph(nn.Module(), ops, (), (3, 8, 8))  # type: ignore[arg-type]
    rows = [{"op": "moved", "strength": 0.5, "moved": True}, {"op": "off", "strength": None, "moved": False}]
    one = dataclasses.replace(plan(equalize=rows), choices={
        "moved:input": chosen("moved:input", 0.1),
        "off:input": chosen("off:input", 0.1),
        "wide:input": chosen("wide:input", 100 / 255),
        "each:input": chosen("each:input", 0.1, axis=1),
        "less:input": chosen("less:input", 0.1),
    })  # fmt: skip
    sites = ["moved:input", "off:input", "wide:input", "each:input", "float:input", "less:input"]
    seen = {"less:input": (-12.5, 3.0), "off:input": (-100.0, 3.0)}
    done = [row["done"] for row in tables.outliers(graph, one, [found(site) for site in sites], seen)]
    assert done == [
        "moved into the weights behind, strength 0.5",
        "clipped at 25.5 of 100",
        "covered by the range",
        "each channel has its own step",
        "stays float",
        "equalized: 100 is 12.5",
    ]
