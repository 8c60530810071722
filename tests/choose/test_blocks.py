"""Steps of blocks. Oracles: numpy with one row per block, GPTQ with a step per channel, whole multiples counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.choose import Bits
from fewbit.choose.gptq import Gptq
from fewbit.choose.moments import Moments
from fewbit.choose.ranges import MinMax, MseRange, Samples
from fewbit.core.grid import Grid, QParams, codes, fake, in_multiples, multiples_of, qparams_from_range, row_step, values
from fewbit.errors import FewbitError
from fewbit.execute.simulate import simulate

BLOCK = Grid(4, narrow=True, axis=0, group_size=16)


def weight(rows: int = 6, columns: int = 48) -> torch.Tensor:
    """Weights whose blocks have ranges of their own."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    return w * torch.rand(rows, columns // 16, generator=generator).repeat_interleave(16, 1)


def stepped(w: torch.Tensor, method: MinMax | MseRange, grid: Grid = BLOCK) -> QParams:
    found = method(Samples.of_weight(w, grid), grid)
    return QParams(found.scale.view(len(w), -1), found.zero.view(len(w), -1))


def moments(columns: int, seed: int = 0) -> Moments:
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(seed + 1))
    return Moments.of([(x, x, None)], 1, 6).centred()


def test_a_block_matrix_is_rounded_as_numpy_rounds_each_block_on_its_own():
    w = weight()
    qparams = stepped(w, MinMax())
    rows = w.numpy().reshape(-1, 16)
    step = np.abs(rows).max(1, keepdims=True) / np.float32(7)
    expected = np.clip(np.rint(rows / step), -7, 7)
    np.testing.assert_array_equal(codes(w, qparams, BLOCK).numpy(), expected.reshape(w.shape))
    np.testing.assert_array_equal(fake(w, qparams, BLOCK).numpy(), (expected * step).reshape(w.shape))
    assert torch.equal(values(codes(w, qparams, BLOCK), qparams, BLOCK), fake(w, qparams, BLOCK))


@pytest.mark.parametrize("method", [MinMax(), MseRange()])
def test_the_ranges_of_blocks_are_those_of_as_many_rows(method):
    w = weight()
    alone = Grid(4, narrow=True, axis=0)
    apart = method(Samples.of_weight(w.view(-1, 16), alone), alone)
    assert torch.equal(stepped(w, method).scale.flatten(), apart.scale)


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.8, 0.6)])
def test_gptq_of_one_block_a_row_is_that_of_a_step_per_channel(shares):
    w, seen = weight(), moments(48)
    alone, whole = Grid(4, narrow=True, axis=0), Grid(4, narrow=True, axis=0, group_size=48)
    qparams = qparams_from_range(w.amin(1), w.amax(1), alone)
    blocks = QParams(qparams.scale[:, None], qparams.zero[:, None])
    q, found = Gptq(shares=shares).rounding.solve(w, qparams, alone, seen, torch.tensor(0.0))
    p, same = Gptq(shares=shares).rounding.solve(w, blocks, whole, seen, torch.tensor(0.0))
    assert torch.equal(p, q)
    assert torch.equal(same.scale[:, 0], found.scale)


@pytest.mark.parametrize("multiples", [0, 16])
def test_gptq_by_blocks_has_less_error_than_rounding_and_than_a_step_per_channel(multiples):
    w, seen = weight(), moments(48)
    grid, alone = Grid(4, narrow=True, axis=0, group_size=16, multiples=multiples), Grid(4, narrow=True, axis=0)

    def error(v: torch.Tensor) -> float:
        return float((seen.through((v - w).double()) * (v - w)).sum())

    qparams = stepped(w, MinMax(), grid)
    q, found = Gptq().rounding.solve(w, qparams, grid, seen, torch.tensor(0.0))
    channel = qparams_from_range(w.amin(1), w.amax(1), alone)
    r, other = Gptq().rounding.solve(w, channel, alone, seen, torch.tensor(0.0))
    assert error(values(q, found, grid)) < 0.8 * error(fake(w, qparams, grid))
    assert error(values(q, found, grid)) < 0.9 * error(values(r, other, alone))


@pytest.mark.parametrize(
    "power", [torch.ones(48), torch.logspace(-2, 2, 48)[torch.arange(48) * 7 % 48]], ids=["even", "uneven"]
)
def test_without_correlations_each_block_has_the_share_that_is_best_for_it(power):
    """The squared error of each weight counts by the power of its input."""
    w, x = weight(), power.sqrt().diag()
    seen = Moments.of([(x, x, None)], 1, 6)
    method = Gptq(sweeps=0, damp=1e-9)
    qparams = stepped(w, MinMax())
    _, found = method.rounding.solve(w, qparams, BLOCK, seen, torch.tensor(0.0))
    for i, row in enumerate(w):
        for b, (part, weights) in enumerate(zip(row.split(16), power.split(16), strict=True)):
            tried = qparams.scale[i, b] * torch.tensor(method.shares)
            lost = [(((part / s).round().clamp(-7, 7) * s - part).square() * weights).sum() for s in tried]
            assert found.scale[i, b] == tried[int(torch.stack(lost).argmin())]


def test_multiples_are_whole_and_codes_times_them_are_codes_of_one_step():
    grid = Grid(4, narrow=True, axis=0, group_size=16, multiples=16)
    w = weight()
    scale = in_multiples(stepped(w, MinMax(), grid).scale, grid)
    times, step = multiples_of(scale, grid), row_step(scale, grid)
    assert torch.equal(times, times.round())
    assert times.min() >= 1
    assert torch.equal(times.amax(1), torch.full((6,), 16.0))
    assert torch.equal(in_multiples(scale, grid), scale)
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    wide = codes(w, qparams, grid) * times.repeat_interleave(16, 1)
    assert wide.abs().max() <= grid.largest == 112
    torch.testing.assert_close(wide * step[:, None], fake(w, qparams, grid), rtol=3e-7, atol=0)


def test_a_block_far_below_the_others_of_its_row_has_the_least_multiple_and_not_none():
    grid = Grid(4, narrow=True, axis=0, group_size=16, multiples=16)
    scale = torch.tensor([[1.6, 1e-6, 0.26], [1e-9, 3.2, 0.1]])
    assert multiples_of(scale, grid).tolist() == [[16, 1, 3], [1, 16, 1]]
    torch.testing.assert_close(in_multiples(scale, grid), torch.tensor([[1.6, 0.1, 0.3], [0.2, 3.2, 0.2]]))


def test_a_grid_says_what_cannot_be():
    with pytest.raises(ValueError, match="blocks are those of a symmetric weight"):
        Grid(4, group_size=16)
    assert str(BLOCK) == "s4 [-7, 7] symmetric per block of 16"


def test_weights_alone_leave_every_activation_float(wide_vit):
    plan = wide_vit.plan("ort-x86-w4", "mse", bits=Bits(4, 4))
    assert {choice.role for choice in plan.choices.values()} == {"weight"}
    assert plan.bits == "w4"
    blocks = {name: (choice.grid.group_size, tuple(choice.qparams.scale.shape)) for name, choice in plan.choices.items()}
    assert blocks["blocks.0.fc2:weight"] == (32, (32, 2))
    assert blocks["blocks.0.fc1:weight"] == (32, (64, 1))


def test_inputs_that_blocks_do_not_divide_have_a_step_per_channel_and_a_refusal(vit):
    plan = vit.plan("ort-x86-w4", bits=Bits(4, 4))
    refused = {fallback.site: (fallback.requested, fallback.actual, fallback.why) for fallback in plan.fallbacks}
    found = plan.choices["blocks.0.fc1:weight"]
    assert (found.grid.group_size, found.qparams.scale.shape) == (0, (32,))
    why = "16 inputs cannot be cut into blocks of 32"
    assert refused["blocks.0.fc1:weight"] == ("a step per block of 32", "a step per channel", why)
    assert plan.choices["blocks.0.fc2:weight"].grid.group_size == 32


def test_a_search_of_one_step_says_that_blocks_have_many(wide_vit):
    with pytest.raises(FewbitError, match="has one for each group; give another target, or --recipe minmax, mse or fast"):
        wide_vit.plan("ort-x86-block", "liu2021-similarity", bits=Bits(4, 8))
    for recipe in ("lapq", "adaround", "fdda", "liu2021-module"):
        with pytest.raises(FewbitError, match="has one for each group"):
            wide_vit.plan("ort-x86-block", recipe, bits=Bits(4, 8))


def test_eight_bits_have_a_step_per_channel_where_four_have_blocks(wide_vit):
    grids = {b: wide_vit.plan("ort-x86-block", bits=Bits(b, 8)).choices["blocks.0.fc1:weight"].grid for b in (8, 4, 3)}
    assert [(g.bits, g.group_size, g.multiples) for g in grids.values()] == [(8, 0, 0), (4, 32, 16), (3, 32, 16)]


@pytest.mark.parametrize("target", ["ort-x86-w4", "ort-x86-block"])
def test_the_closed_form_recipe_loses_less_than_the_ranges(wide_vit, target):
    exact = wide_vit.graph.module(wide_vit.images).detach()
    lost = {}
    for recipe in ("minmax", "fast"):
        plan = wide_vit.plan(target, recipe, bits=Bits(4, 8))
        lost[recipe] = float((simulate(wide_vit.graph, plan)(wide_vit.images).detach() - exact).square().mean())
    assert lost["fast"] < 0.5 * lost["minmax"]
