"""A recipe as a tuple of passes, also of a user's own. Oracles: the calls that were made, the recipe's parts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from bench.ablations import ABLATIONS

from fewbit.choose import Context, Pass, Recipe, choose, parse_bits
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.choose import check_pass
from fewbit.choose.correct import OutputBias
from fewbit.choose.recipe import Checked
from fewbit.core.grid import QParams
from fewbit.core.plan import PassLog, Plan
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.simulate import simulate
from fewbit.realize import load_plan, save_plan
from fewbit.recipes import MSE, RECIPES

VNNI = "ort-x86-vnni"


@dataclass(frozen=True)
class Wider:
    """A user's pass: every free activation with a scale that is wider by a factor, outside of all registries."""

    factor: float = 1.5

    def __call__(self, plan: Plan, context: Context) -> Plan:
        builder, rows = PlanBuilder(plan, context), []
        for choice in plan.choices.values():
            if choice.role != "weight" and choice.is_free:
                qparams = QParams(choice.qparams.scale * self.factor, choice.qparams.zero)
                builder.set(replace(choice, qparams=qparams, method=repr(self)))
                rows.append({"site": choice.site})
        return builder.plan(PassLog("wider", repr(self), tuple(rows), {"factor": self.factor}))


@dataclass(frozen=True)
class Watched:
    """A pass that says that it has worked, and may refuse to."""

    worked: Callable[[], None]
    refuses: bool = False

    def check(self, context: Context) -> None:
        if self.refuses:
            raise FewbitError("not on this target")

    def __call__(self, plan: Plan, context: Context) -> Plan:
        self.worked()
        return plan


def test_a_pass_of_ones_own_runs_and_its_log_is_in_the_plan_and_in_its_file(conv_net, tmp_path):
    own = Wider(1.25)
    assert isinstance(own, Pass)
    plain, plan = (choose(conv_net.context(VNNI), Recipe("", passes)) for passes in ((MSE,), (MSE, own)))
    (log,) = plan.logs("wider")
    assert plan.log == (log,)
    assert log.settings == "Wider(factor=1.25)"
    assert log.summary == {"factor": 1.25}
    free = [name for name, c in plain.choices.items() if c.role != "weight" and c.is_free]
    assert [row["site"] for row in log.rows] == free
    for name, choice in plan.choices.items():
        factor = 1.25 if name in free or name == "head:input" else 1.0  # which holds codes of the pooling
        assert torch.equal(choice.qparams.scale, plain.choices[name].qparams.scale * factor)
    stem = plan.choices["stem:input"].qparams.scale * plan.choices["stem:weight"].qparams.scale
    assert torch.equal(plan.biases["stem"].integer.qparams.scale, stem)
    assert repr(own) in plan.settings
    save_plan(conv_net.graph, plan, tmp_path)
    assert load_plan(conv_net.graph, tmp_path).log == plan.log
    with torch.no_grad():
        assert not torch.equal(*(simulate(conv_net.graph, p)(conv_net.images) for p in (plain, plan)))


def test_passes_run_in_order_each_on_the_plan_of_the_one_before(conv_net):
    context = conv_net.context(VNNI, bits=parse_bits(4))
    together = choose(context, Recipe("", (MSE, OutputBias(), Wider())))
    plan = context.start()
    for one_pass in (MSE, OutputBias(), Wider()):
        plan = one_pass(plan, context)
    assert [log.name for log in together.log] == ["output bias", "wider"]
    assert together.log == plan.log
    assert list(together.choices) == list(plan.choices)
    assert all(torch.equal(together.biases[op].values, bias.values) for op, bias in plan.biases.items())


@pytest.mark.parametrize("place", [0, 1])
def test_a_pass_refuses_before_the_first_pass_works(conv_net, place):
    worked = []
    passes = [Watched(lambda: worked.append("first"))]
    passes.insert(place, Watched(lambda: worked.append("refusing"), refuses=True))
    assert isinstance(passes[0], Checked)
    with pytest.raises(FewbitError, match="not on this target"):
        choose(conv_net.context(VNNI), Recipe("", tuple(passes)))
    assert worked == []


@pytest.mark.parametrize("name", ["liu2021", "easyquant", "fast", "aciq", "fdda", "liu2021-module"])
def test_what_a_recipe_needs_is_said_before_its_ranges_are_chosen(conv_net, name):
    worked, recipe = [], ABLATIONS[name]
    watched = replace(recipe, passes=(Watched(lambda: worked.append(name)), *recipe.passes))
    said = "^no images to fine-tune on" if name == "fdda" else f"^recipe {name} needs calibration images"
    with pytest.raises(BadImages, match=f"{said}; a few .*: --images DIR"):
        choose(conv_net.context(VNNI, name, images=(), sampled=None), watched)
    assert worked == []


@pytest.mark.parametrize("name", ["liu2021", "easyquant"])
def test_a_search_of_one_scale_is_refused_before_ranges_of_channels_are_chosen(conv_net, name):
    worked = []
    with pytest.raises(FewbitError, match="has one for each channel"):
        choose(
            conv_net.context("ort-x86-channel", name), Recipe("", (Watched(lambda: worked.append(name)), *RECIPES[name].passes))
        )
    assert worked == []


def test_a_pass_without_a_check_is_not_asked(conv_net):
    assert not isinstance(Wider(), Checked)
    assert check_pass(Wider(), conv_net.context(VNNI)) is None
