"""One step for parts of a concatenation. Oracle: each part quantized by brute force under the step of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.choose.parts import suffering
from fewbit.core.grid import Grid, fake, qparams_from_range
from fewbit.execute.simulate import simulate


class Joined(nn.Module):
    """Boxes and scores of one stem, joined; `behind` reads the whole, or a part of it."""

    def __init__(self, wide: float, behind: str) -> None:
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.whole, self.part, self.behind = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), behind
        with torch.no_grad():
            self.boxes.weight.mul_(wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = torch.cat([self.boxes(x), self.scores(x)], 1)
        if self.behind == "whole":
            return self.whole(y.relu())
        if self.behind == "part":
            return self.part(y[:, 4:])
        y = y.flatten(2)
        return torch.cat([y[:, :4], y[:, 4:].sigmoid()], 1)


@pytest.fixture(scope="module")
def nets(capture_net):
    torch.manual_seed(0)
    cases = [(300.0, ""), (300.0, "part"), (300.0, "whole"), (2.0, "")]
    return {case: capture_net(Joined(*case)) for case in cases}


@pytest.mark.parametrize("behind", ["", "part"])
def test_a_concatenation_of_unlike_parts_stays_float_where_no_product_reads_the_whole(nets, ort_target, behind):
    plan = nets[300.0, behind].plan(ort_target)
    assert "concat" not in plan.integer_ops
    (said,) = (f for f in plan.fallbacks if f.site == "concat")
    assert said.actual == "float"
    assert "scores:output" in said.why


def test_each_part_keeps_the_error_of_a_step_of_its_own(nets, ort_target):
    net = nets[300.0, ""]
    plan = net.plan(ort_target)
    with torch.no_grad():
        scores = torch.logit(simulate(net.graph, plan)(net.images)[:, 4:].double())
        exact = torch.logit(net.module(net.images)[:, 4:].double())
    assert (scores - exact).std() < 0.05 * exact.std()  # 8 bits in each of three layers


def test_parts_alike_are_joined_in_integers(nets, ort_target):
    plan = nets[2.0, ""].plan(ort_target)
    assert "concat" in plan.integer_ops
    assert not plan.fallbacks


def test_a_product_that_needs_one_step_has_it_and_the_plan_says_which_part_suffers(nets, ort_target):
    net = nets[300.0, "whole"]
    plan = net.plan(ort_target)
    assert "concat" in plan.integer_ops
    (said,) = (f for f in plan.fallbacks if f.site == "concat")
    assert (said.requested, said.macs_share) == ("a step for each part", net.graph.op("whole").macs / net.graph.macs)
    assert "scores:output" in said.why
    assert "whole" in said.actual


def test_the_error_of_a_part_is_that_of_brute_force(nets):
    net, grid = nets[300.0, ""], Grid(8, signed=False, symmetric=False)
    why = suffering(net.graph.op("concat"), grid, net.stats)
    with torch.no_grad():
        x = net.module.stem(net.images).relu()
        scores, whole = net.module.scores(x), torch.cat([net.module.boxes(x), net.module.scores(x)], 1)
    qparams = qparams_from_range(whole.min()[None], whole.max()[None], grid)
    error = fake(scores, qparams, grid) - scores
    found = float(why.split("error of ")[1].split(" %")[0])
    assert found == pytest.approx(
        100 * float(error.square().mean().sqrt() / scores.std()), rel=0.05
    )  # a histogram's bins, a whole per cent
