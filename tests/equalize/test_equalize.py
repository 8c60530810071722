"""Oracles: the function itself on random images, constructed channels whose best scale is known, a closed form."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.capture.residual import conv_pairs
from fewbit.capture.structure import heads, norms
from fewbit.core.grid import Grid, fake, qparams_from_range
from fewbit.equalize import Equalize, replaced
from fewbit.equalize.cross_layer import balanced
from fewbit.equalize.equalize import _Work
from fewbit.equalize.migrate import STRENGTHS, balanced_keys, migrated, rows_of, scales, step_of
from fewbit.equalize.replaced import same_function
from fewbit.equalize.samples import Extremes, sample_tensors
from fewbit.execute.executor import Executor
from fewbit.target import load_target
from fewbit.target.allowed import allowed

ACTIVATION, WEIGHT = Grid(4, signed=False, symmetric=False), Grid(4, narrow=True, axis=0)


def grids(net, bits: int = 4) -> dict[str, Grid]:
    return allowed(net.graph, load_target("ort-x86-vnni"), weight_bits=bits, activation_bits=bits, everything=True).grids


def uneven(module: nn.Module) -> nn.Module:
    """Layer norms and biases whose channels differ a lot, as those of trained transformers do."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.copy_(torch.rand(part.weight.shape, generator=generator) * 4 + 0.1)
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator) * 2)
            elif isinstance(part, nn.Linear):
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def net(capture_net, vit):
    return capture_net(uneven(copy.deepcopy(vit.module)))


class Plain(nn.Module):
    """Two convolutions with a ReLU between, a depthwise one behind a ReLU6, and a third behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.b(F.relu(self.a(x))))
        return self.d(F.relu(self.c(x))).mean((2, 3))


@pytest.fixture(scope="module")
def plain(capture_net):
    torch.manual_seed(1)
    module = Plain()
    with torch.no_grad():
        for layer in (module.a, module.c):
            layer.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
    return capture_net(module)


@pytest.mark.parametrize("name", ["net", "plain"])
def test_the_float_function_is_the_same_and_something_has_moved(name, request):
    given = request.getfixturevalue(name)
    found = Equalize()(given.graph, given.images.split(8), grids(given))
    assert same_function(given.graph, found.graph, seed=7) < 1e-4
    moved = [row for row in found.record if row["moved"]]
    assert {row["kind"] for row in moved} == ({"norm", "value", "key", "probabilities"} if name == "net" else {"convolution"})
    assert all(row["after"] <= row["before"] for row in found.record)
    assert found.constants
    again = replaced(given.graph, found.constants)
    assert same_function(found.graph, again) == 0


class Sequences(nn.Module):
    """Two convolutions of one dimension with a ReLU between, and a depthwise one behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x.flatten(2))))))


def test_convolutions_of_one_dimension_are_equalized_too(capture_net):
    torch.manual_seed(1)
    module = Sequences()
    with torch.no_grad():
        for layer in (module.a, module.b):
            layer.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1))
    given = capture_net(module)
    found = Equalize()(given.graph, given.images.split(8), grids(given))
    assert [row["op"] for row in found.record if row["moved"]] == ["a", "b"]
    assert same_function(given.graph, found.graph, seed=7) < 1e-4


@pytest.mark.parametrize("dims", [1, 2])
def test_extremes_and_mean_squares_are_those_of_each_channel_whatever_the_number_of_dimensions(capture_net, dims):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = (nn.Conv1d, nn.Conv2d)[dims - 1](3, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(2) if dims == 1 else x)

    given = capture_net(Net())
    with torch.no_grad():
        rows = given.module(given.images).transpose(0, 1).flatten(1)
    seen = sample_tensors(given.graph, given.images.split(4), [], 8, [given.graph.ops[0].node])[1][given.graph.ops[0].node]
    torch.testing.assert_close([seen.low, seen.high, seen.squares], [rows.amin(1), rows.amax(1), rows.square().mean(1)])
    for k, (low, high) in enumerate(seen.halves):  # every other image
        half = given.module(given.images[k::2]).transpose(0, 1).flatten(1)
        torch.testing.assert_close([low, high], [half.amin(1), half.amax(1)])
        assert seen.count == half.shape[1]


def test_values_that_are_the_same_everywhere_are_left_alone(capture_net, vit):
    """As in a detector's first attention, which reads queries of zeros: only its bias is left."""
    module = uneven(copy.deepcopy(vit.module))
    with torch.no_grad():
        module.blocks[0].qkv.weight[32:] = 0
    given = capture_net(module)
    found = Equalize()(given.graph, given.images.split(8), grids(given))
    assert {row["kind"] for row in found.record} == {"norm", "key", "probabilities"}


class ChannelsLast(nn.Module):
    """Blocks of maps with channels last, as Swin's and ConvNeXt's are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return (x + self.fc2(F.gelu(self.fc1(self.norm(x))))).mean((1, 2))


def test_maps_with_channels_last_have_their_norms_equalized(capture_net):
    torch.manual_seed(2)
    given = capture_net(uneven(ChannelsLast()))
    found = Equalize()(given.graph, given.images.split(8), grids(given))
    (row,) = [row for row in found.record if row["kind"] == "norm"]
    assert row["moved"]
    assert row["after"] < row["before"]
    assert same_function(given.graph, found.graph, seed=7) < 1e-4


def test_what_is_found_in_a_transformer_and_in_a_convolutional_net(net, plain):
    assert [[op.name for op in norm.layers] for norm in norms(net.graph)] == [
        ["blocks.0.qkv.3", "blocks.0.qkv.2", "blocks.0.qkv.1"],
        ["blocks.0.fc1"],
        ["head"],
    ]
    (found,) = heads(net.graph)
    assert [op and op.name for op in (found.value, found.behind, found.query, found.key)] == [
        "blocks.0.qkv.3",
        "blocks.0.proj",
        "blocks.0.qkv.1",
        "blocks.0.qkv.2",
    ]
    assert [(p.first.name, p.second.name) for p in conv_pairs(plain.graph)] == [("a", "b"), ("c", "d")]  # not across the ReLU6


def test_of_maps_more_images_are_looked_at_than_of_rows_and_of_few_rows_as_many_as_give_enough(net, plain):
    def asked(given, rows):
        return Equalize(rows=rows).images(given.graph, grids(given))

    tokens = net.graph.site(net.graph.op("blocks.0.fc1").operands["input"]).shape[1]
    assert asked(plain, 1024) == 512
    assert [asked(net, rows) for rows in (64 * tokens, 100 * tokens - 1, 10_000 * tokens)] == [64, 100, 512]


def known(low, high, squares):
    """What is known of channels whose halves have the same extremes."""
    return Extremes(low, high, squares, ((low, high), (low, high)), 1)


@pytest.mark.parametrize("rows", [32, 100_000])
def test_channels_are_evened_where_enough_numbers_say_how_far_they_reach(rows):
    """The best of all strengths on numbers that nobody has seen: by brute force, with the ranges of the seen ones."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-0.3, 0, 64)

    def drawn(n):
        return torch.empty(n, 64).exponential_(generator=generator) * spread

    x, new, w = drawn(rows), drawn(20_000), torch.randn(16, 64, 1, 1, generator=generator)
    halves = tuple((x[k::2].amin(0), x[k::2].amax(0)) for k in range(2))
    grid, steps = Grid(8, signed=False), Grid(8, axis=0, symmetric=True)
    seen = Extremes(x.amin(0), x.amax(0), x.square().mean(0), halves, rows // 2)
    found = balanced(seen, w, grid, steps)

    def lost(scale):
        quantized = fake(new / scale, qparams_from_range((x / scale).amin().clamp_max(0), (x / scale).amax(), grid), grid)
        return float(((quantized * scale - new) @ w.flatten(1).T).square().mean())

    strengths = (None, *STRENGTHS)
    losses = {s: lost(torch.ones(64) if s is None else scales(seen.high, s)) for s in strengths}
    assert losses[found.strength] <= 1.1 * min(losses.values())
    if rows == 32:
        assert losses[1.0] > 1.5 * losses[found.strength]  # what the extremes of all images alone would choose


def test_few_rows_do_not_judge_their_own_ranges():
    """A layer norm with one row for each image: on new rows nothing is lost against leaving it alone."""
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 96, generator=generator) * torch.logspace(-0.2, 0, 96) for n in (48, 4000))
    w = torch.randn(32, 96, generator=generator)
    grid, steps = Grid(8, signed=False), Grid(8, axis=0, symmetric=True)

    def lost(move):
        lower, heavier = (new - move.shift) / move.scale, w * move.scale
        quantized = step_of((x - move.shift) / move.scale, grid, lower)
        off = quantized @ rows_of(heavier, steps).T - (lower @ heavier.T)
        return float((off - off.mean(0)).square().mean())

    free, held = (migrated(x, w, grid, steps, few=few) for few in (False, True))
    alone = migrated(x, w, grid, steps, (), shift=False)
    assert lost(held) <= 1.05 * lost(alone)
    assert lost(free) > 1.2 * lost(held)


def test_one_place_that_would_change_the_function_is_left_out_and_the_others_are_as_they_were(net, monkeypatch):
    whole, multiply = Equalize()(net.graph, net.images.split(8), grids(net)), _Work._multiply

    def wrong(self, op, move):
        factor = 1.5 if op.name == "head" else 1.0
        return {name: factor * value for name, value in multiply(self, op, move).items()}

    monkeypatch.setattr(_Work, "_multiply", wrong)
    found = Equalize()(net.graph, net.images.split(8), grids(net))
    assert [row["op"] for row in found.record if not row["moved"]] == ["head"]
    assert same_function(net.graph, found.graph, seed=7) < 1e-4
    assert found.constants.keys() < whole.constants.keys()
    assert all(torch.equal(found.constants[name], whole.constants[name]) for name in found.constants)


def test_a_rewrite_that_would_change_the_function_is_left_out_and_says_so(net, monkeypatch):
    monkeypatch.setattr("fewbit.equalize.equalize.TOLERANCE", -1.0)
    found = Equalize()(net.graph, net.images.split(8), grids(net))
    assert not found.constants
    assert not any(row["moved"] or row["shift"] for row in found.record)


def test_sites_without_a_grid_stay_as_they_are(net):
    assert Equalize()(net.graph, net.images.split(8), {}).record == ()


def test_at_full_strength_each_channel_of_a_layer_norm_is_in_the_middle_and_reaches_as_far_as_the_others(net):
    found = Equalize(values=False, keys=False, probabilities=False, strengths=(1.0,))(
        net.graph, net.images.split(8), grids(net)
    )
    inside = list(norms(net.graph))[:-1]  # the last has one row for each image: too few
    assert [(row["op"], row["strength"]) for row in found.record][:-1] == [(n.layers[0].name, 1.0) for n in inside]
    nodes = found.graph.module.graph.nodes
    values = {next(node for node in nodes if node.op == "placeholder"): net.images}
    with torch.no_grad():
        Executor(found.graph, ()).run(nodes, values)
    for norm in list(norms(found.graph))[:-1]:
        x = values[norm.node].flatten(0, -2)
        torch.testing.assert_close(x.amax(0), x.max().expand(16), rtol=1e-5, atol=0)
        torch.testing.assert_close(x.amin(0), -x.max().expand(16), rtol=1e-5, atol=0)


def test_uneven_channels_are_scaled_fully_and_even_ones_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(512, 16, generator=generator) * 2 - 1
    w = torch.randn(8, 16, generator=generator)
    sizes = torch.logspace(-2, 0, 16)
    found = migrated(even * sizes, w / sizes, ACTIVATION, WEIGHT)
    assert found.strength == 1.0
    assert found.after < 0.2 * found.before
    torch.testing.assert_close(found.scale, sizes / sizes.log().mean().exp(), rtol=0.02, atol=0)
    corners = torch.cat([even, torch.ones(1, 16), -torch.ones(1, 16)])
    alone = migrated(corners, w, ACTIVATION, WEIGHT)
    assert alone.strength is None
    assert alone.scale.tolist() == [1.0] * 16
    assert not alone.shift.any()
    assert alone.after == alone.before
    shifted = migrated(corners + torch.linspace(-20, 20, 16), w, ACTIVATION, WEIGHT)
    torch.testing.assert_close(shifted.shift, torch.linspace(-20, 20, 16), rtol=0, atol=1e-4)
    assert shifted.after < 0.05 * shifted.before


def test_scales_have_a_geometric_mean_of_one():
    reach = torch.tensor([0.1, 1.0, 7.0])
    for strength in (0.25, 1.0):
        found = scales(reach, strength)
        torch.testing.assert_close(found.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[2] / found[0], torch.tensor(70.0**strength))


def test_the_error_of_a_layer_is_that_of_its_quantized_output_without_its_mean():
    """Brute force: every share of the range of what is read and of each row of the weight."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(64, 6, generator=generator) ** 3  # far from even, so that rounding has a mean
    w = torch.randn(5, 6, generator=generator)

    def nearest(v, grid):
        tried = [fake(v, qparams_from_range(v.min() * s, v.max() * s, grid), grid) for s in (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
        return min(tried, key=lambda q: float((q - v).square().sum()))

    lost = nearest(x, ACTIVATION) @ torch.stack([nearest(row, replace(WEIGHT, axis=None)) for row in w]).T - x @ w.T
    assert float(lost.mean(0).abs().max()) > 0.01
    found = migrated(x, w, ACTIVATION, WEIGHT, strengths=(), shift=False)
    assert found.before == pytest.approx(float(lost.var(0, correction=0).mean()), rel=1e-4)


def test_at_full_strength_queries_and_keys_have_the_same_range_in_each_channel_of_a_head():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(100, 6, generator=generator) * torch.logspace(-a, a, 6) for a in (0.5, -1))
    found = balanced_keys(q, k, (1.0,))
    ranges = (q * found.scale).abs().amax(0) / (k / found.scale).abs().amax(0)
    torch.testing.assert_close(ranges, ranges.mean().expand(6))
    half = balanced_keys(q, k, (0.5,))
    torch.testing.assert_close(half.scale, found.scale.sqrt())
    assert found.after < balanced_keys(q, k, (None,)).after


@pytest.mark.parametrize("groups", [1, 4])
def test_the_error_between_two_convolutions_is_the_sum_over_every_product(groups):
    """A loop: an input's rounding times its weight and a weight's rounding times its input, each uniform over its step."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 4 // groups, 3, 2, generator=generator)
    low, high, squares = (
        -torch.rand(4, generator=generator),
        3 * torch.rand(4, generator=generator),
        torch.tensor([1, 2, 0.5, 4]),
    )
    found = balanced(known(low, high, squares), w, ACTIVATION, WEIGHT)
    for scale, expected in ((torch.ones(4), found.before), (found.scale, found.after)):
        step = (max((high / scale).tolist()) - min((low / scale).tolist())) / 15
        error = 0.0
        for o in range(4):
            read = [o] if groups == 4 else range(4)
            heavier = {(c, k): w[o, i].flatten()[k] * scale[c] for i, c in enumerate(read) for k in range(6)}
            own = max(abs(float(v)) for v in heavier.values()) / 7
            error += sum(step**2 * float(v) ** 2 + own**2 * float(squares[c] / scale[c] ** 2) for (c, _), v in heavier.items())
        assert expected == pytest.approx(error / 12, rel=1e-5)


def test_a_depthwise_layer_takes_all_of_the_range_for_its_weights_lose_nothing():
    low, high = torch.zeros(6), torch.logspace(-2, 0, 6)
    w = (1 / high).view(6, 1, 1, 1) * torch.ones(6, 1, 3, 3)
    found = balanced(known(low, high, high**2 / 3), w, ACTIVATION, WEIGHT)
    assert found.strength == 1.0
    assert found.after < 0.5 * found.before


def test_a_depthwise_layer_with_several_outputs_of_each_channel_is_equalized(capture_net):
    """Outputs in pairs that are the same lose twice what one loses; the function is the same."""
    torch.manual_seed(1)
    a, b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, groups=8)
    with torch.no_grad():
        a.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
    given = capture_net(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Conv2d(16, 4, 1)))
    found = Equalize(channels=False)(given.graph, given.images.split(8), grids(given))
    assert [row["op"] for row in found.record if row["moved"]] == ["0", "2"]
    assert same_function(given.graph, found.graph, seed=7) < 1e-4
    low, high, w = torch.zeros(8), torch.logspace(-1, 1, 8), torch.randn(8, 1, 3, 3)
    once = balanced(known(low, high, high**2 / 3), w, ACTIVATION, WEIGHT)
    twice = balanced(known(low, high, high**2 / 3), w.repeat_interleave(2, 0), ACTIVATION, WEIGHT)
    torch.testing.assert_close(twice.scale, once.scale)
    assert twice.after == pytest.approx(2 * once.after, rel=1e-5)
    assert twice.before == pytest.approx(2 * once.before, rel=1e-5)
