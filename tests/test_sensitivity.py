"""What a module is worth. Oracles: the executor with only some ops in integers, sums by hand, the order of made-up numbers."""

from __future__ import annotations

import html
import itertools
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fewbit.capture.structure import modules
from fewbit.choose.joint_search import JointSearch
from fewbit.choose.sensitivity import Losses, OutputKL
from fewbit.cli import app
from fewbit.core.plan import Plan
from fewbit.core.task import Outputs
from fewbit.errors import BadFile, BadValues, FewbitError
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.files import read_json
from fewbit.progress import Progress
from fewbit.recipes import RECIPES
from fewbit.request import Request, SearchRequest, SensitivityRequest
from fewbit.request.command import quantize_command
from fewbit.run import sensitivity
from fewbit.stages.sensitivity import Worth, ordered, units, with_commands, with_regained, worths
from fewbit.stages.times import times_here, without_slower
from fewbit.target import load_target
from fewbit.task import Classify
from fewbit.verify.latency import Work
from fewbit.workers import LOCAL
from planning import context_for, plan_for
from tasks import Apart

VNNI = load_target("ort-x86-vnni")


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


def plan_of(net, **options):
    return plan_for(net.graph, net.stats, VNNI, RECIPES["minmax"], **options)


def divergence(net, plan: Plan, ops: list[str]) -> float:
    """torch's KL divergence where only some ops of a plan are in integers."""

    def answers(executor: Executor) -> torch.Tensor:
        batches = [logits for (logits,) in Stream(executor, net.images.split(3)).outputs()]
        return torch.cat(batches).double().log_softmax(1)

    exact, found = answers(Executor(net.graph)), answers(Executor.of(net.graph, plan, ops))
    return torch.nn.functional.kl_div(found, exact, log_target=True, reduction="batchmean").item()


def test_losses_are_those_of_a_plan_with_the_module_alone_and_with_all_but_it(net) -> None:
    plan = plan_of(net)
    given = net.graph, plan, net.images.split(3)
    rows, whole = with_regained(worths(*given, None, Progress()), *given, Progress())
    assert {op for row in rows for op in row.ops} <= set(plan.integer_ops)
    assert whole == pytest.approx(divergence(net, plan, list(plan.integer_ops)), rel=1e-4, abs=1e-9)
    for row in rows:
        others = [op for op in plan.integer_ops if op not in row.ops]
        assert row.loss == pytest.approx(divergence(net, plan, list(row.ops)), rel=1e-4, abs=1e-9)
        assert whole - row.regained == pytest.approx(divergence(net, plan, others), rel=1e-4, abs=1e-9)
        assert row.macs_share == sum(net.graph.op(op).macs for op in row.ops) / net.graph.macs


class Unsure(Classify):
    """A classifier of fewbit's kind whose divergence is no number."""

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        return super().divergence(exact, outputs) * math.nan


def test_a_loss_that_is_no_number_is_not_called_none(conv_net) -> None:
    graph = replace(conv_net.graph, task=Unsure(0, 10))
    plan = plan_of(conv_net)
    with pytest.raises(BadValues, match=r"task classify: the divergence from the float model with \S+ in integers is nan"):
        Losses(graph, plan, [conv_net.images])(plan.integer_ops[:1], plan.integer_ops[:1])
    with pytest.raises(BadValues, match=r"divergence .* in integers is nan; a finite number is needed"):
        OutputKL()(graph, modules(graph), {8: plan}, [conv_net.images])
    context = context_for(graph, conv_net.stats, VNNI, images=[conv_net.images])
    with pytest.raises(BadValues, match=r"the loss of the whole model .* is not a finite number for any of \d+ plans"):
        JointSearch(seconds=None, evaluations=3)(context.start(), context)


def test_losses_are_the_same_in_any_order(vit) -> None:
    plan = plan_of(vit)
    mine = units(vit.graph, plan)
    first, second = (Losses(vit.graph, plan, [vit.images]) for _ in range(2))
    assert [first(one.ops, one.ops) for one in mine] == [second(one.ops, one.ops) for one in mine[::-1]][::-1]


def test_another_process_computes_the_same_numbers(net) -> None:
    """Bit for bit, also of images that lie in memory another way, for which kernels add up in another order."""
    plan = plan_of(net)
    given = net.graph, plan, [net.images.to(memory_format=torch.channels_last)]
    here, there = (
        with_regained(worths(*given, None, Progress(), workers), *given, Progress(), workers) for workers in (LOCAL, Apart())
    )
    assert here == there
    assert len(here[0]) > 2


def made_up(integer: dict[str, float]):
    """A measurement: an op takes 2 ms as float and 1 ms in integers, or as said of its kind; quantizers take nothing."""

    def measure(work: Work, runtime: str, threads: int) -> tuple[float, float]:
        return (0.0, 0.0) if work.kind.endswith("quantize") else (2.0, integer.get(work.kind, 1.0))

    return measure


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Where a table is stored; the machine is the target's, whatever it is."""
    monkeypatch.setattr("fewbit.stages.times.absent", lambda target: "")
    monkeypatch.setattr("fewbit.stages.times.float_onnx", lambda *given, **more: None)
    monkeypatch.setattr("fewbit.stages.times.whole_of", lambda *given: 100.0)
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    return tmp_path


def test_milliseconds_are_sums_over_the_ops_of_a_module(vit, here) -> None:
    context = context_for(vit.graph, vit.stats, VNNI, everything=True)
    plan = plan_of(vit, everything=True)
    measure = made_up({"matmul": 2.5})
    times = times_here(context, plan, 1, here, Progress(), measure=measure)
    rows = worths(vit.graph, plan, [vit.images], times, Progress())
    for row in rows:
        kinds = [vit.graph.op(op).kind for op in row.ops]
        assert row.ms == row.ms_alone == pytest.approx(kinds.count("linear") - 0.5 * kinds.count("matmul"))
    assert any("matmul" in [vit.graph.op(op).kind for op in row.ops] for row in rows)


def test_what_loses_time_stays_float_by_itself_and_says_why(vit, here) -> None:
    context = context_for(vit.graph, vit.stats, VNNI, everything=True)
    slower, log = without_slower(context, 1, here, Progress(), measure=made_up({"matmul": 2.5}))
    expected = {op.name for op in vit.graph.ops if op.kind == "matmul"}
    assert set(slower.slower) == expected
    assert set(context.allowed.integer_ops) - set(slower.allowed.integer_ops) == expected
    said = {f.site: (f.kind, f.why) for f in slower.allowed.fallbacks}
    assert all(said[op] == ("chosen", slower.slower[op]) for op in expected)
    assert "on this machine" in slower.slower[min(expected)]
    assert {row["op"]: (row["float_ms"], row["integer_ms"]) for row in log.rows} == dict.fromkeys(expected, (2.0, 2.5))
    faster, log = without_slower(context, 2, here, Progress(), measure=made_up({}))  # of 2 threads there is another table
    assert (faster.slower, log.rows) == ({}, ())


def test_there_are_no_times_of_another_processor(vit, tmp_path) -> None:
    target, asked = load_target("ort-arm64"), list[Work]()
    context = context_for(vit.graph, vit.stats, target)
    plan = plan_for(vit.graph, vit.stats, target, RECIPES["minmax"])

    def measure(work: Work, *_: object) -> tuple[float, float]:
        asked.append(work)
        return 1.0, 1.0

    assert times_here(context, plan, 1, tmp_path, Progress(), measure=measure) is None
    assert not asked


def row(name: str, loss: float, ms: float | None, macs: int = 1) -> Worth:
    return Worth(0, name, "op", (name,), loss, macs, 0.0, ms=ms)


def test_the_order_is_that_of_loss_for_each_millisecond() -> None:
    """By hand: e loses time, f gains none; a 4/ms, c 3/ms, b 2/ms; d loses less than a hundredth of all 16.01."""
    rows = [row("a", 4, 1), row("b", 6, 3), row("c", 3, 1), row("d", 0.01, 1e-3), row("e", 0, -1), row("f", 3, 0.0)]
    assert "".join(one.module for one in ordered(rows)) == "efacbd"


def test_without_times_the_order_is_that_of_loss_for_each_multiply_accumulate() -> None:
    rows = [row("a", 4, None, 4), row("b", 6, None, 3), row("c", 3, None, 0), row("d", 0.01, None, 1)]
    assert "".join(one.module for one in ordered(rows)) == "cbad"


@pytest.fixture
def asked(monkeypatch) -> list[Request]:
    """What `fewbit quantize` is asked for; it stops there."""
    requests = list[Request]()

    def stop(request: Request, progress: object) -> None:
        requests.append(request)
        raise FewbitError("stop")

    monkeypatch.setattr("fewbit.run.execute", stop)
    return requests


def test_a_command_asks_for_what_was_asked(asked, tmp_path) -> None:
    classes = tmp_path / "of it.txt"
    classes.write_text("a\nb\n")
    options = {
        "images": str(tmp_path), "target": "ort-x86-vnni", "recipe": "minmax", "bits": "4,first=8",
        "keep_float": ("a b", "c.*"),
        "everything": True, "labels": False, "mean": (0.5, 0.25, 0.125), "input_size": (3, 8, 8), "crop_pct": 0.5,
        "classes": classes, "inputs": {"size": torch.tensor([1.5, 2.0])}, "calibration": 7, "seed": 3, "opset": 17,
    }  # fmt: skip
    command = quantize_command(SensitivityRequest(model="demo", scored=5, **options), "--keep-float", "d", "--out", "x")
    assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 2
    (found,) = asked
    direct = Request(model="demo", **{**options, "keep_float": ("a b", "c.*", "d")}, out=tmp_path)
    assert found.key() == direct.key()
    assert (found.mean, found.input_size, found.crop_pct) == (direct.mean, direct.input_size, direct.crop_pct)
    assert found.inputs["size"].tolist() == [1.5, 2.0]
    assert found.out == Path("x")


def test_the_defaults_of_another_command_are_typed(tmp_path) -> None:
    request = SearchRequest(model="demo", images=str(tmp_path), target="ort-x86-vnni", loss="kl", time="5s")
    words = shlex.split(quantize_command(request))
    assert words == [
        "fewbit", "quantize", "demo", "--target", "ort-x86-vnni", "--images", str(tmp_path), "--recipe", "mse",
        "--calibration", "64",
    ]  # fmt: skip


def test_commands_are_cumulative_and_a_module_is_its_pattern_where_that_is_no_more(vit) -> None:
    plan = plan_of(vit)
    rows = ordered(worths(vit.graph, plan, [vit.images], None, Progress()))
    request = SensitivityRequest(model="demo", target="ort-x86-vnni", recipe="minmax")
    *commands, last = (command for _, command in with_commands(vit.graph, plan, request, rows))
    assert last == ""
    for k, command in enumerate(commands, 1):
        words = shlex.split(command)
        kept = [after for word, after in itertools.pairwise(words) if word == "--keep-float"]
        left = set(plan_of(vit, keep_float=kept).integer_ops)
        assert left == set(plan.integer_ops) - {op for row in rows[:k] for op in row.ops}
        assert words[-1] == f"run-without-{k}"


class Ruined(nn.Module):
    """`b` reads a map with one place of a million times the others, which nothing reads behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
        place = torch.zeros(1, 1, 8, 8)
        place[..., 0, 0] = 3e3
        self.register_buffer("place", place)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(nn.functional.gelu(self.a(x)) + self.place)[..., 1:, 1:]
        return self.c(nn.functional.gelu(x).mean((2, 3)))


def test_the_folder_has_the_layer_that_integers_ruin_first(here, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fewbit.verify.latency.measured", made_up({}))
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
    request = SensitivityRequest(
        model=Ruined().eval(), images=images, recipe="minmax", target="ort-x86-vnni", input_size=(3, 8, 8), scored=4,
        out=tmp_path / "found", threads=1,
    )  # fmt: skip
    summary = sensitivity(request)
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["sensitivity.html", "sensitivity.json"]
    assert read_json(tmp_path / "found" / "sensitivity.json")["rows"] == summary["rows"]
    assert summary["rows"][0]["module"] == "b"
    assert summary["images"] == {"calibration": 20, "measured": 4}
    page = (tmp_path / "found" / "sensitivity.html").read_text()
    assert "Half of what single modules lose is lost by 1 of 3 modules." in page
    assert summary["rows"][1]["command"] in html.unescape(page)
    assert summary["rows"][2]["command"] == ""
    monkeypatch.setattr("fewbit.run.sensitivity", lambda request, progress: summary)
    done = CliRunner().invoke(app, ["sensitivity", "demo", "--out", str(tmp_path / "other")])
    listed = done.output.split("(the page has one for each row):\n")[1].splitlines()
    assert listed[:3] == [f"  {row['command']}" for row in summary["rows"][:2]] + ["  Nothing would be left in integers."]
    with pytest.raises(BadFile, match="exists; replace it with --force"):
        sensitivity(request)
    with pytest.raises(FewbitError, match=r"all 3 ops of Ruined float, so there is nothing to quantize\. Choose"):
        sensitivity(request.model_copy(update={"target": "float", "out": tmp_path / "none", "hardware": load_target("float")}))
    assert not list(tmp_path.glob("none*"))
