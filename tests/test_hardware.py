"""Oracles: every product and every partial sum written out by hand in NumPy; the float32 simulation; onnxruntime's codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench.integer_arithmetic import Hardware, held, matmul_codes, simulate_hardware, weighted_codes, wrapped
from bench.kernels.chains import chained
from torch.nn import functional as F

from fewbit.choose import Bits
from fewbit.execute.simulate import simulate, trace
from fewbit.recipes import RECIPES
from fewbit.runtimes import OnnxRuntime
from fewbit.target import load_target
from fewbit.target.spec import Accumulator
from fewbit.verify.ties import TIE
from planning import plan_for

ACCUMULATORS = (
    Accumulator(bits=16),
    Accumulator(bits=16, overflow="saturate"),
    Accumulator(bits=12),
    Accumulator(bits=12, overflow="saturate"),
    Accumulator(bits=32, chain_bits=14, chain=4),
    Accumulator(bits=32, chain_bits=14, chain=4, overflow="saturate"),
    Accumulator(bits=15, chain_bits=14, chain=4, overflow="saturate"),
    Accumulator(bits=32, pair_bits=14),
)


def by_hand(x: np.ndarray, w: np.ndarray, start: int, rule: Accumulator) -> int:
    """One sum, a product at a time, as the accumulator's fields say."""

    def register(value: int, bits: int, overflow: str) -> int:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if overflow == "saturate":
            return min(max(value, low), high)
        return (value - low) % 2**bits + low

    chain, bits, overflow = rule.chain or 1, rule.chain_bits or 64, rule.overflow
    if rule.pair_bits:
        chain, bits, overflow = 2, rule.pair_bits, "saturate"
    total = start
    for first in range(0, len(x), chain):
        part = 0
        for a, b in zip(x[first : first + chain], w[first : first + chain], strict=True):
            part = register(part + int(a) * int(b), bits, overflow)
        total = register(total + part, rule.bits, rule.overflow)
    return register(total, rule.bits, rule.overflow)


def drawn(seed: int, *shape: int, low: int = -127, high: int = 128) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("rule", ACCUMULATORS, ids=repr)
def test_a_linear_layer_sums_as_if_by_hand(rule):
    x, w, bias = drawn(0, 7, 11, low=0), drawn(1, 5, 11), drawn(2, 5, low=-3000, high=3000)
    found, lost = weighted_codes(x, w, bias, 3, rule)
    starts = bias - 3 * w.sum(1)
    expected = [[by_hand(row.numpy(), v.numpy(), int(s), rule) for v, s in zip(w, starts, strict=True)] for row in x]
    assert found.tolist() == expected
    exact = x.double() @ w.double().t() + starts
    assert lost == int((found != exact).sum()) > 0


@pytest.mark.parametrize("rule", ACCUMULATORS, ids=repr)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_sums_input_channel_row_and_column_in_order(rule, groups):
    x, w, bias, zero = drawn(3, 2, 4, 5, 5), drawn(4, 4, 4 // groups, 3, 3), drawn(5, 4), 2
    found, _ = weighted_codes(x, w, bias, zero, rule, stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=groups)
    padded = F.pad(x, (1, 1, 1, 1), value=zero).numpy()
    for b, o, i, j in np.ndindex(*found.shape):
        first = o // (4 // groups) * (4 // groups)
        patch = padded[b, first : first + 4 // groups, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1)
        row = w[o].reshape(-1).numpy()
        assert found[b, o, i, j] == by_hand(patch, row, int(bias[o]) - zero * int(row.sum()), rule)


@pytest.mark.parametrize("rule", ACCUMULATORS, ids=repr)
def test_a_product_of_two_activations_sums_as_if_by_hand(rule):
    x, y = drawn(6, 2, 3, 4, 9), drawn(7, 2, 3, 9, 5)
    found, _ = matmul_codes(x, y, rule)
    for b, h, i, j in np.ndindex(*found.shape):
        assert found[b, h, i, j] == by_hand(x[b, h, i].numpy(), y[b, h, :, j].numpy(), 0, rule)


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_chains_are_those_of_the_kernels(overflow):
    x, w = drawn(8, 6, 40), drawn(9, 3, 40)
    rule = Accumulator(bits=32, chain_bits=15, chain=8, overflow=overflow)
    found, _ = weighted_codes(x, w, torch.zeros(3), 0, rule)
    expected = chained((x[:, None] * w).numpy(), 8, 15, overflow)
    assert found.tolist() == expected.tolist()


def test_a_register_wraps_as_numpys_int16_and_saturates_at_its_ends():
    values = torch.tensor([0, 32767, 32768, -32768, -32769, 70000, -1_000_000])
    assert wrapped(values, 16).tolist() == values.numpy().astype(np.int16).tolist()
    assert held(values, 16, "saturate").tolist() == [0, 32767, 32767, -32768, -32768, 32767, -32768]


@pytest.mark.parametrize("target", ["ort-x86-vnni", "ort-arm64", "npu-int16", "tensorrt", "openvino-x86"])
@pytest.mark.parametrize("net", ["conv_net", "vit"])
def test_sums_that_fit_give_the_simulations_codes(net, target, request):
    net = request.getfixturevalue(net)
    plan, rules = net.plan(target, everything=True), load_target(target)
    module = simulate(net.graph, plan)
    _, own = trace(module, net.images)
    run = Hardware(net.graph, plan, rules).run(net.images, forced={name: found.codes for name, found in own.items()})
    assert set(run.codes) == set(own)
    assert run.overflow_share == 0
    assert len(run.overflowed) == sum(net.graph.op(name).reduction_size is not None for name in plan.integer_ops)
    for name, found in own.items():
        place = found.position - found.position.floor() - 0.5
        assert torch.equal(run.codes[name][place.abs() > TIE], found.codes[place.abs() > TIE]), name


def test_a_realized_plan_for_the_accelerator_gives_the_codes_of_its_sums(conv_net, realized):
    run = realized(conv_net, "npu-int16")
    sites = [name for name, choice in run.plan.choices.items() if choice.codes is None]
    session = OnnxRuntime(run.path, optimise=False, outputs=[f"{site}.codes" for site in sites])
    found = session.run(conv_net.images.numpy())
    got = {site: torch.from_numpy(found[f"{site}.codes"].astype(np.int32)) for site in sites}
    ours = Hardware(conv_net.graph, run.plan, load_target("npu-int16")).run(conv_net.images, forced=got)
    assert ours.overflow_share == 0
    for site in sites:
        difference = (ours.codes[site] - got[site]).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3, site


def test_without_the_overflow_step_the_simulation_is_too_optimistic(conv_net):
    target = load_target("npu-int16")
    plan = plan_for(conv_net.graph, conv_net.stats, target.with_exact_sums(), RECIPES["minmax"], bits=Bits(8, 8))
    with torch.no_grad():
        exact = conv_net.graph.module(conv_net.images)
    error = {}
    for overflow in (False, True):
        run = simulate_hardware(conv_net.graph, plan, target, conv_net.images, overflow=overflow)
        error[overflow] = float((run.output - exact).norm())
    assert error[True] > 10 * error[False]
    safe = conv_net.plan("npu-int16")
    run = simulate_hardware(conv_net.graph, safe, target, conv_net.images)
    assert run.overflow_share == 0
    assert float((run.output - exact).norm()) < error[True] / 2
