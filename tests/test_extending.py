"""The examples of docs/extending.md, run as they stand there. Oracles: numpy, a loop, every factor by hand, onnxruntime."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Captured
from fewbit.capture.sites import tensor_of
from fewbit.choose import Recipe, choose
from fewbit.choose.range_method import Samples
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.bits import Bits
from fewbit.core.grid import Grid, QParams, qparams_from_range
from fewbit.core.plan import Plan
from fewbit.execute.simulate import simulate
from fewbit.realize import realize
from fewbit.target import load_target
from fewbit.verify.compare import compare

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


def blocks(heading: str, language: str) -> list[str]:
    """The code of a section of the page."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def example(heading: str, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """What the Python of a section defines."""
    (code,) = blocks(heading, "python")
    module = ModuleType(f"extending_{heading.replace(' ', '_')}")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"{PAGE.name}: {heading}", "exec"), module.__dict__)
    return module.__dict__


def planned(net: Captured, recipe: Recipe, target: str, **options: Any) -> Plan:
    return choose(net.context(target, "custom", **options), recipe)


def test_every_section_with_an_example_is_tested() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["A range method", "A rounding of weights", "A pass over the whole model", "A target", "A kind of op"]


def test_the_range_method_takes_three_standard_deviations(conv_net: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    names = example("A range method", monkeypatch)
    sigmas = names["Sigmas"](2.0)
    plan = planned(conv_net, Recipe("", (Ranges(sigmas, sigmas),)), "ort-x86-vnni")

    for choice in (c for c in plan.choices.values() if c.role == "weight"):
        rows = tensor_of(conv_net.graph, conv_net.graph.site(choice.site)).flatten(1).numpy().astype(np.float64)
        mean, spread = rows.mean(1), rows.std(1)
        low, high = np.maximum(mean - 2 * spread, rows.min(1)), np.minimum(mean + 2 * spread, rows.max(1))
        np.testing.assert_allclose(choice.qparams.scale.numpy(), np.maximum(-low, high) / 127, rtol=1e-5)

    whole = conv_net.plan("ort-x86-vnni").choices  # recipe minmax
    ours = planned(conv_net, names["recipe"], "ort-x86-vnni").choices
    scales = {name: (choice.qparams.scale, whole[name].qparams.scale) for name, choice in ours.items() if choice.is_free}
    assert all(bool((own <= widest * (1 + 1e-6)).all()) for own, widest in scales.values())
    assert any(bool((own < 0.9 * widest).any()) for own, widest in scales.values())


@dataclass(frozen=True)
class Wider:
    """A range in which no code is cut, whatever is carried."""

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        return qparams_from_range(1.1 * samples.low, 1.1 * samples.high, grid)


def test_the_rounding_carries_each_error_along_its_row(vit: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = example("A rounding of weights", monkeypatch)["CarryError"]()
    ranges = Ranges(MinMax(), Wider())
    carried, nearest = (planned(vit, Recipe("", passes), "ort-x86-vnni") for passes in ((ranges, rounding), (ranges,)))
    largest = 0.0
    for choice in (c for c in carried.choices.values() if c.codes is not None):
        w = tensor_of(vit.graph, vit.graph.site(choice.site)).flatten(1).double() / choice.qparams.scale[:, None]
        expected, error = torch.zeros_like(w), torch.zeros(len(w), dtype=torch.float64)
        for i in range(w.shape[1]):  # as the docstring says it
            expected[:, i] = (w[:, i] + error).round()
            error = error + w[:, i] - expected[:, i]
        assert (
            choice.codes.flatten(1) != expected
        ).double().mean() < 0.01  # sums of float32 may stand on the other side of a half
        assert (choice.codes.flatten(1).double().sum(1) - w.sum(1)).abs().max() <= 0.5 + 1e-3
        other = nearest.choices[choice.site].codes
        assert other is not None
        largest = max(largest, (other.flatten(1).double().sum(1) - w.sum(1)).abs().max().item())
    assert largest > 1.0


def test_the_pass_finds_the_best_factor_of_each_scale(conv_net: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Recipe = example("A pass over the whole model", monkeypatch)["recipe"]
    context = conv_net.context("ort-x86-vnni", "custom", bits=Bits(4, 4))
    plan, start = choose(context, recipe), choose(context, replace(recipe, passes=recipe.passes[:1]))
    exact = conv_net.module(conv_net.images)

    def error(plan: Plan) -> float:
        with torch.no_grad():
            return (simulate(conv_net.graph, plan)(conv_net.images) - exact).square().mean().item()

    (log,) = plan.logs("try factors")
    assert log.settings == "TryFactors(factors=(1.0, 0.8, 1.25))"
    assert [row["error"] for row in log.rows] == sorted((row["error"] for row in log.rows), reverse=True)
    assert error(plan) == pytest.approx(log.summary["error"], rel=1e-5)
    assert error(plan) < 0.9 * error(start)
    for row in log.rows:
        ratio = plan.choices[row["site"]].qparams.scale / start.choices[row["site"]].qparams.scale
        assert ratio.item() == pytest.approx(row["factor"], rel=1e-6)

    first, *_ = [name for name, choice in start.choices.items() if choice.role != "weight" and choice.is_free]
    errors = {}
    for factor in (1.0, 0.8, 1.25):  # the first site, on the plan that it began with
        other = replace(recipe.passes[1], factors=(factor,)).scaled(start, context, start.choices[first], factor)
        errors[factor] = error(other)
    assert log.rows[0]["site"] == first
    assert log.rows[0]["factor"] == min(errors, key=errors.__getitem__)


def test_the_target_says_only_what_is_different(vit: Captured, tmp_path: Path) -> None:
    (text,) = blocks("A target", "toml")
    path = tmp_path / "six-bit-linear.toml"
    path.write_text(text, encoding="utf-8")
    target, base = load_target(str(path)), load_target("ort-x86-vnni")
    assert target.name == "six-bit-linear"
    assert (target.runtime, target.opset) == (base.runtime, base.opset)
    assert {rule.kind for rule in base.op} - {rule.kind for rule in target.op} == {"matmul"}

    plan = vit.plan(str(path))
    kinds = {op.name: op.kind for op in vit.graph.ops}
    linear = [
        c for c in plan.choices.values() if c.role == "weight" and kinds[vit.graph.site(c.site).readers[0][0]] == "linear"
    ]
    assert linear
    assert {(choice.grid.bits, choice.grid.low, choice.grid.high) for choice in linear} == {(6, -31, 31)}
    assert {kinds[name] for name in plan.integer_ops} == {"linear"}


class Gated(nn.Module):
    """A gated MLP on the pixels of an image: the product of two activations, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 16), nn.Linear(8, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x.mean(1))


def test_the_kind_of_op_runs_in_integers_in_the_runtime(
    capture_net: Callable[[nn.Module], Captured], widest_weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.capture.kinds import KINDS

    kind = example("A kind of op", monkeypatch)["kind"]
    monkeypatch.setitem(KINDS, kind.name, kind)  # type: ignore[misc]
    (text,) = blocks("A kind of op", "toml")
    path = tmp_path / "gated.toml"
    path.write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    net = capture_net(Gated())
    gates = [op for op in net.graph.ops if op.kind == "mul"]
    assert [sorted(op.operands) for op in gates] == [["left", "output", "right"]]

    plan = net.plan(str(path))
    assert gates[0].name in plan.integer_ops
    realize(net.graph, plan, tmp_path / "model.onnx", opset=load_target(str(path)).opset)
    checks = compare(net.graph, plan, tmp_path / "model.onnx", net.images.split(8))
    output = gates[0].operands["output"]
    for check in itertools.chain(checks.off, checks.on if widest_weights == 8 else ()):
        assert check.wrong == 0, check
    assert {check.site for check in checks.off} >= {*gates[0].operands.values()}
    elements = len(net.images) * math.prod(net.graph.site(output).shape[1:])
    assert next(check for check in checks.off if check.site == output).compared == elements
    assert "QLinearMul" in _kernels(tmp_path / "model.onnx", tmp_path)


def _kernels(path: Path, folder: Path) -> set[str]:
    """The operators of onnxruntime's optimised graph."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}
