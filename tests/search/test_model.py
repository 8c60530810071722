"""Candidates as plans, costs and files. Oracles: choose, simulate, the file on disk, sums by hand."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from fewbit.choose import parse_bits
from fewbit.cli import app
from fewbit.cli.terminal import PLAIN
from fewbit.core.record import Record
from fewbit.errors import BadFile, FewbitError, UnknownName
from fewbit.execute.simulate import simulate
from fewbit.onnx_file import bytes_of
from fewbit.recipes import RECIPES
from fewbit.report import frontpage
from fewbit.runtimes import OnnxRuntime
from fewbit.search.budget import parse_budget, too_small, typed
from fewbit.search.costs import Sizes, costs_of, smallest
from fewbit.search.judge import Judge
from fewbit.search.model import Loss, Model, Scored, Settings
from fewbit.search.run import run
from fewbit.search.search import measured, problem_of
from fewbit.search.space import Problem
from fewbit.search.strategies import Greedy, Random, Trial
from fewbit.stages.realize import write_model
from fewbit.target import load_target
from fewbit.task import Tensors
from fewbit.verify.latency import Table, Work, cache_folder, one_op, quantizer, table
from fewbit.verify.latency import measured as measured_op
from fewbit.verify.times import Times
from fewbit.workers import LOCAL
from planning import context_for, plan_for
from report.canned import searched
from tasks import Apart

VNNI = load_target("ort-x86-vnni")


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


def model_of(net, edges="weights", target=VNNI):
    return Model(context_for(net.graph, net.stats, target, name="mse", everything=True), RECIPES["mse"], Settings(edges))


def numbers(plan):
    """A plan without the records of how it was asked for."""
    choices = {k: (c.grid, c.qparams.scale.tolist(), None if c.codes is None else c.codes.tolist(), c.all_readers)
               for k, c in plan.choices.items()}  # fmt: skip
    return choices, plan.integer_ops, {k: b.values.tolist() for k, b in plan.biases.items()}


def drawn(dimensions, seed):
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(len(d.options))) for d in dimensions)


@pytest.mark.parametrize("edges", ["weights", "all"])
def test_a_candidates_plan_is_the_one_that_choose_makes_from_its_file(net, edges, tmp_path):
    model = model_of(net, edges)
    floats = {op.name: False for op in net.graph.ops if op.name in model.base.integer_ops}
    dimensions = model.dimensions(floats)
    for seed in range(3):
        bits = model.bits(dimensions, drawn(dimensions, seed))
        path = tmp_path / f"{seed}.json"
        widths = {"weights": 8, "activations": 8, "widths": dict(bits.ops), "float": list(bits.floats)}
        path.write_text(json.dumps(widths))
        plan = plan_for(net.graph, net.stats, VNNI, RECIPES["mse"], name="mse", bits=parse_bits(str(path)), everything=True)
        assert numbers(model.plan(bits)) == numbers(plan)
        assert not set(bits.floats) & set(plan.integer_ops)


def test_the_loss_is_that_of_the_simulation_whatever_was_asked_before(net):
    model = model_of(net, "all")
    dimensions = model.dimensions({op.name: False for op in net.graph.ops if op.name in model.base.integer_ops})
    loss = Loss(net.graph, [net.images], None)
    score = Scored(model, loss, dimensions)
    with torch.no_grad():
        p = net.graph.module(net.images).double().log_softmax(1)
    first = drawn(dimensions, 0)
    chain = [
        first,
        *((*first[:k], 0, *first[k + 1 :]) for k in range(len(first))),
        *(drawn(dimensions, s) for s in range(1, 4)),
    ]
    for candidate in chain:
        with torch.no_grad():
            q = simulate(net.graph, model.plan(model.bits(dimensions, candidate)))(net.images).double().log_softmax(1)
        assert score(candidate) == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("edges", ["weights", "all"])
def test_another_process_finds_the_same_losses(net, edges):
    """Bit for bit, whatever it was asked before."""
    model = model_of(net, edges)
    dimensions = model.dimensions({op.name: False for op in net.graph.ops if op.name in model.base.integer_ops})
    problem = Problem(dimensions, partial(Sizes.of(model), dimensions), {"bits": 6.0})
    score = Scored(model, Loss(net.graph, net.images.split(3), None), dimensions)
    for strategy in (Random, Greedy):
        here, there = (
            run(problem, strategy(problem, 12), score, evaluations=12, workers=workers).trials for workers in (LOCAL, Apart())
        )
        assert here == there
        assert len(here) == 12


def test_half_the_bits_are_half_the_bytes_of_the_codes(vit):
    model = model_of(vit)
    dimensions = model.dimensions({})
    sizes = Sizes(vit.graph, model.base.integer_ops, 8)
    low = tuple(len(d.options) - 1 for d in dimensions)
    predicted = sizes(dimensions, tuple(0 for _ in low))["bytes"] - sizes(dimensions, low)["bytes"]
    weights = sum(int(np.prod(s.shape)) for s in vit.graph.sites if s.role == "weight")
    assert predicted == pytest.approx(weights / 2, abs=len(low))  # 8 bits less 4
    assert sizes(dimensions, low)["bits"] == 4
    assert smallest(vit.graph, model.context.allowed, 4) == sizes(dimensions, low)


def test_every_activation_edge_is_a_dimension_of_its_own(conv_net):
    found = {d.name: d.options for d in model_of(conv_net, "all").dimensions({})}
    assert found["stem:output"] == found["stem"] == (8, 7, 6, 5, 4)
    assert "head:input" not in found  # the codes of the pooling, in another shape


def made_up(model, integer, quantizers=None):
    """A table in which each op takes 2 ms as float and `integer(op)` ms as integers, and quantizers nothing or what is given by
    their kind.
    """
    given = model.graph, model.target, model.base
    times = Times(*given, model.with_floats, Table({}), 100.0)
    ms = {str(work): (2.0, integer(name)) for name, work in times.work.items()}
    works = [work for work in Times.works(*given) if work.kind.endswith("quantize")]
    ms |= {str(work): (0.0, (quantizers or {}).get(work.kind, 0.0)) for work in works}
    return Times(*given, model.with_floats, Table({}, ms), 100.0)


def test_an_op_that_is_slower_in_integers_stays_float_by_itself(vit):
    model = model_of(vit)
    times = made_up(model, lambda name: 3.0 if name.endswith(("qk", "pv")) else 1.0)
    problem = problem_of(model, Loss(vit.graph, [vit.images], None), times, {})
    assert sorted(problem.always) == ["blocks.0.pv", "blocks.0.qk"]
    plan = plan_for(vit.graph, vit.stats, VNNI, RECIPES["mse"], bits=problem.bits(problem.problem({}).start), everything=True)
    assert not set(problem.always) & set(plan.integer_ops)
    count = sum(1 for op in vit.graph.ops if op.name in plan.integer_ops)
    assert times(problem.always) == 100.0 - count


def test_the_float_prediction_is_the_float_measurement(net):
    model = model_of(net)
    times = made_up(model, lambda name: 1.0)
    assert times([op.name for op in net.graph.ops]) == 100.0


def test_what_stands_between_codes_and_real_numbers_is_counted_once(conv_net):
    """Convolutions in a row hand on codes: one quantizer at the input. With `depth` in float the addition and the
    pooling are float too: quantized are the image, depth's result and the pooled map; real again are the codes that depth
    reads, and both that the addition reads (every reader of what a convolution reads takes the codes)."""
    model = model_of(conv_net)
    times = made_up(model, lambda name: 1.0)
    kinds = [w.kind for w in times.boundary(model.with_floats(()))]
    assert kinds == ["quantize"]
    kinds = sorted(w.kind for w in times.boundary(model.with_floats(("depth",))))
    assert kinds == ["dequantize"] * 3 + ["quantize"] * 3
    slow = made_up(model, lambda name: 1.0, {"quantize": 0.25, "dequantize": 4.0})  # each op in integers saves 1 ms
    for floats, between in ((), 0.25), (("depth",), 3 * 0.25 + 3 * 4.0):
        assert slow(floats) == 100 - len(model.with_floats(floats).integer_ops) + between


def test_a_budget_of_milliseconds_gives_every_op_the_choice(vit):
    model = model_of(vit)
    times = made_up(model, lambda name: 1.0)
    problem = problem_of(model, Loss(vit.graph, [vit.images], None), times, {"ms": 97.0})
    assert all(d.options[0] == 0 for d in problem.dimensions)
    each = problem.problem({"ms": 97.0})
    everything_float = tuple(0 for _ in problem.dimensions)
    assert each.costs(everything_float)["ms"] == 100.0
    assert each.costs(each.repaired(everything_float))["ms"] == 97.0


def test_a_recipe_that_looks_at_ops_is_refused(vit):
    with pytest.raises(FewbitError, match="mse, minmax, percentile, kl"):
        Model(context_for(vit.graph, vit.stats, VNNI, name="liu2021"), RECIPES["liu2021"])


# the table ----------------------------------------------------------------------------------------------------------


LINEAR = Work("linear", ((1, 6, 16), (8, 16)))
CONV = Work("conv", ((1, 4, 6, 6), (8, 4, 3, 3)), ((1, 1), (1, 1), (1, 1), (1,)), codes=True)


@pytest.mark.parametrize(("work", "kernel"), [(LINEAR, "MatMulIntegerToFloat"), (CONV, "QLinearConv")])
def test_the_integer_form_of_one_op_runs_in_an_integer_kernel(work, kernel, tmp_path):
    onnx.save(one_op(work, integer=True), str(tmp_path / "op.onnx"))
    OnnxRuntime(tmp_path / "op.onnx", save_optimised=tmp_path / "optimised.onnx")
    assert kernel in {node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node}


def test_a_table_is_measured_once_and_says_where(tmp_path):
    asked = []

    def measure(work, runtime, threads):
        asked.append(str(work))
        return 2.0, 1.0

    for works in ([LINEAR], [LINEAR, CONV, LINEAR]):
        got = table(works, "onnxruntime", "a processor", 1, folder=tmp_path, measure=measure)
    assert asked == [str(LINEAR), str(CONV)]
    assert got[CONV] == (2.0, 1.0)
    assert {"runtime", "version", "processor", "threads", "date", "rounds"} <= set(got.provenance)
    table([LINEAR], "onnxruntime", "another processor", 1, folder=tmp_path, measure=measure)
    assert len(asked) == 3
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("work", "columns", "forms", "expected"),
    [
        (LINEAR, 3, [set(), {"MatMul"}, {"MatMul", "DequantizeLinear"}], (5.0 - 1.5, 3.0 - 1.5)),
        (quantizer("quantize", (4, 6)), 2, [set(), {"QuantizeLinear"}], (0.0, 5.0 - 1.5)),
        (quantizer("dequantize", (4, 6)), 2, [set(), {"DequantizeLinear"}], (0.0, 5.0 - 1.5)),
    ],
    ids=lambda one: getattr(one, "kind", ""),
)
def test_a_measurement_is_the_median_of_each_form_less_that_of_an_empty_graph(work, columns, forms, expected, monkeypatch):
    module, files = importlib.import_module("fewbit.verify.latency"), []
    rounds = [(1e-3, 4e-3, 2e-3), (2e-3, 9e-3, 8e-3), (1.5e-3, 5e-3, 3e-3)]

    def opened(runtime, path, threads):
        files.append({node.op_type for node in onnx.load(path).graph.node} & {"MatMul", "QuantizeLinear", "DequantizeLinear"})
        return OnnxRuntime(path, threads=threads)

    def timed(calls, seconds, count):
        assert len([call() for call in calls]) == columns  # each runs on what it is given
        return [one[:columns] for one in rounds]

    monkeypatch.setattr(module, "open_session", opened)
    monkeypatch.setattr(module, "paired", timed)
    assert measured_op(work, "onnxruntime", 1) == pytest.approx(expected)
    assert files == forms
    rounds[:] = [(7e-3, 4e-3, 2e-3)]
    assert measured_op(work, "onnxruntime", 1) == (0, 0)  # nothing takes less than no time


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWBIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fewbit"
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


# what is typed ------------------------------------------------------------------------------------------------------


def test_budgets():
    assert parse_budget("6bit") == parse_budget("6 bits") == ("bits", 6.0)
    assert parse_budget("3MB") == ("bytes", 3e6)
    assert parse_budget("1.5ms") == ("ms", 1.5)
    for name, limit, text in (
        ("bits", 4.0, "4bit"),
        ("bits", 4.001, "4.01bit"),
        ("bytes", 9.06e3, "9.1KB"),
        ("ms", 0.0121, "0.013ms"),
    ):
        assert typed(name, limit) == text
        assert parse_budget(text) == (name, pytest.approx(float(text.rstrip("bitKBms")) * (1e3 if name == "bytes" else 1)))
        assert parse_budget(text)[1] >= limit
    for limits, says in (({"ms": 1e-4}, "0.0001ms"), ({"bytes": 212345.0, "bits": 1.25}, "212.345KB and 1.25bit")):
        assert f"keeps the budget {says}; the smallest" in str(too_small(limits, {"ms": 1.0, "bytes": 1e6, "bits": 4.0}))
    for wrong in ("6", "0bit", "ms", "3GB", "nanbit", "1e309MB", "-1ms", f"{10**30}MB", "infms", ""):
        with pytest.raises(FewbitError, match="6bit"):
            parse_budget(wrong)


def test_files_of_widths_that_are_wrong(vit, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"weights": 8, "activations": 8, "widths": {"head": 99}, "float": []}')
    with pytest.raises(BadFile, match="2 to 16"):
        parse_bits(str(path))
    path.write_text('{"weights": 8, "activations": 8, "widths": {"haed": 4}, "float": []}')
    with pytest.raises(UnknownName, match="head"):
        parse_bits(str(path)).of(vit.graph)


def test_the_page_has_a_command_for_every_point():
    summary = searched()
    row, other = summary["points"]
    page = frontpage.render(summary)
    data = page.split('<script type="application/json" id="points">')[1].split("</script>")[0]
    assert [r["command"] for r in json.loads(data)] == [row["command"], other["command"]]
    assert [said in page for said in ("1.1", "89.00\u00a0% to 91.50\u00a0%", "2.00\u00a0× faster", "Apollo 7, 3 threads")] == [
        True
    ] * 4
    assert frontpage.render({**summary, "points": []}).count("No candidate was evaluated.") == 1


def test_the_points_of_a_search_have_the_unit_of_their_measure_and_the_loss_is_named():
    summary = searched()
    summary["measure"] = "squared error by variance, from the float model"
    points = {"measure": "PSNR", "unit": "dB", "quantized": 22.91, "float": 23.0, "interval": [-0.5, 0.1], "bytes": 3_572}
    summary["points"] = [{**row, **points} for row in summary["points"]]
    page = frontpage.render(summary).replace("\u00a0", " ")
    for said in (
        "PSNR on held-out images, dB", "22.91 dB PSNR, 95.00 % agreement in class", "22.50 dB to 23.10 dB", "3.57 kB",
        "squared error by variance, from the float model", "judged on 1 calibration image",
    ):  # fmt: skip
        assert said in page, said
    assert "22.91 %" not in page


def test_the_loss_that_judges_is_named_by_the_task(conv_net):
    """Oracle: what each task says that its divergence is; none of them but a classifier's is a KL divergence of answers."""
    images = [conv_net.images[:2]]
    assert Loss(conv_net.graph, images, None).measure.what == "KL divergence, nats, from the float model"
    other = replace(conv_net.graph, task=Tensors((True,)))
    assert Loss(other, images, None).measure.what == "squared error by variance, from the float model"
    labels = torch.zeros(2, dtype=torch.int64)
    assert Loss(conv_net.graph, images, labels, "labels").measure.what == "cross-entropy with labels, nats"


def test_costs_have_milliseconds_only_where_there_are_times(vit):
    model = model_of(vit)
    dimensions = model.dimensions({})
    start = tuple(0 for _ in dimensions)
    assert set(costs_of(Sizes.of(model), dimensions, None)(start)) == {"bits", "bytes"}
    assert costs_of(Sizes.of(model), dimensions, made_up(model, lambda name: 2.0))(start)["ms"] == 100.0


@pytest.mark.parametrize("which", ["conv_net", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("edges", ["weights", pytest.param("all", marks=pytest.mark.slow)])
def test_the_bytes_of_a_candidate_are_those_of_its_file(request, which, edges, tmp_path):
    """Of any mix of widths: what unpacks codes is counted, its tables once. What saturates an activation varies a little."""
    net = request.getfixturevalue(which)
    model, form, nothing = model_of(net, edges), VNNI.file_format, Record({"size": [3, 8, 8]})
    dimensions = model.dimensions({})

    def written(candidate):
        write_model(net.graph, model.plan(model.bits(dimensions, candidate)), tmp_path / "m.onnx", form, nothing)
        return bytes_of(tmp_path / "m.onnx")

    start = tuple(0 for _ in dimensions)
    written(start)
    sizes = Sizes.of(model, *measured(model, tmp_path / "m.onnx", form, nothing))
    narrowest = tuple(len(d.options) - 1 for d in dimensions)
    several = (start, narrowest, drawn(dimensions, 1)) if which == "vit" else (drawn(dimensions, 0),)
    for candidate in several:
        slack = 0 if edges == "weights" else 0.02 * written(candidate)
        assert sizes(dimensions, candidate)["bytes"] == pytest.approx(written(candidate), abs=2 + slack)


def test_the_front_is_of_the_ratios_that_are_shown_and_medians_that_say_something_else_are_marked(monkeypatch, tmp_path, vit):
    model = model_of(vit)
    problem = problem_of(model, Loss(vit.graph, [vit.images], None), made_up(model, lambda name: 1.0), {})
    judge = Judge(problem, None, None, tmp_path, 1)
    row = {**searched()["points"][0], "float_ms": 2.0}
    files = iter([
        {**row, "bytes": 200, "ms": 1.2, "faster": 0.72},  # by the medians the fastest of all
        {**row, "bytes": 100, "ms": 1.99, "faster": 0.997},  # as fast, as good, smaller
        {**row, "bytes": 150, "ms": 1.97, "faster": 1.004},  # shown as fast as well
    ])  # fmt: skip
    monkeypatch.setattr(Judge, "artefact", lambda *_: next(files))
    first = {**row, "point": "uniform 8", "bytes": 300, "ms": 1.0, "faster": 2.0, "quantized": 90.0}
    trial = Trial(problem.problem({}).start, 0.0, {"bytes": 1.0, "ms": 2.0})
    rows = judge.points(first, [trial] * 3, tmp_path, lambda: None)
    assert [one["front"] for one in rows] == [True, False, True, False]
    said = "1.39\u00a0× slower in paired rounds, and 1.67\u00a0× faster by these two medians: noise"
    page = frontpage.render({**searched(), "points": rows})
    assert said in page
    assert page.count("noise") == 3  # in the table, where the point is drawn and where it is picked
    monkeypatch.setattr("fewbit.search.execute", lambda *_: {"points": rows})
    printed = CliRunner().invoke(app, ["search", "demo", "--out", str(tmp_path / "out")], catch_exceptions=False).output
    assert printed.count("noise") == 1
    assert f"01 beside float: {said.translate(PLAIN)}." in printed


def test_a_point_over_the_budget_is_not_among_those_that_are_recommended(monkeypatch, tmp_path, vit):
    """Whatever was predicted: the file that was written counts."""
    model = model_of(vit)
    problem = problem_of(
        model, Loss(vit.graph, [vit.images], None), made_up(model, lambda name: 1.0), {"bytes": 2e5, "ms": 20.0}
    )
    judge = Judge(problem, None, None, tmp_path, 1)
    row = {**searched()["points"][0], "bytes": 200_000, "ms": 20.0}
    files = iter([{**row, "bytes": 215_610}, {**row, "bytes": 100_000, "ms": 20.5}, row])
    monkeypatch.setattr(Judge, "artefact", lambda *_: next(files))
    first = {**row, "point": "uniform 8", "bytes": 318_747, "ms": 99.0, "agreement": 99.0, "quantized": 99.0}
    trial = Trial(problem.problem({}).start, 0.0, {"bytes": 1.0, "ms": 2.0})
    rows = judge.points(first, [trial] * 3, tmp_path, lambda: None)
    says = ["318.8KB over 200KB and 99ms over 20ms", "215.7KB over 200KB", "20.5ms over 20ms", ""]
    assert [one["over"] for one in rows] == says
    assert [one["front"] for one in rows] == [False, False, False, True]
    page = frontpage.render({**searched(), "points": rows})
    assert all(one in page for one in says)
    picked = json.loads(page.split('id="points">')[1].split("</script>")[0])
    assert [one["first"] for one in picked] == [False, False, False, True]
    assert ["over the budget" in one["said"] for one in picked] == [True, True, True, False]
