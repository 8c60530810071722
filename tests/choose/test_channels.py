"""ACIQ's widths of channels and means of weights. Oracles: the sum of the codes, brute force, closed forms, the runtime."""

from __future__ import annotations

import itertools

import pytest
import torch
from bench.module_search import ModuleSearch
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Recipe, choose, parse_bits
from fewbit.choose.aciq import AnalyticClip
from fewbit.choose.channel_bits import ChannelBits, shares
from fewbit.choose.correct import WeightMean
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.range_method import Samples, ranged
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.fx import constant
from fewbit.core.grid import Grid, QParams, codes, fake, values
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.executor import Executor
from fewbit.execute.samples import channel_samples
from fewbit.execute.simulate import simulate
from fewbit.files import pack
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES
from fewbit.target import load_target
from fewbit.verify.compare import compare
from planning import plan_for

BITS = parse_bits(4)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_channels_share_the_codes_two_to_one():
    found = shares(torch.tensor([8**0.5, 1.0]), 4)
    assert torch.allclose(found, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64) * 32, rtol=1e-6)


def test_shares_keep_the_codes_and_no_other_split_has_a_smaller_error():
    spread = torch.tensor([0.3, 1.0, 2.5])
    best = shares(spread, 3)
    assert best.sum().item() == pytest.approx(3 * 8)

    def error(b: torch.Tensor) -> float:
        return float((spread.double() ** 2 / b**2).sum())

    for moved in itertools.permutations([0.5, -0.5, 0.0]):
        assert error(best + torch.tensor(moved, dtype=torch.float64)) > error(best)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equal_spreads_have_equal_widths_and_others_the_mean_that_was_asked_for(bits):
    assert ChannelBits()(torch.full((7,), 0.2), bits, symmetric=True) == (bits,) * 7
    widths = ChannelBits()(drawn(200).exp(), bits, symmetric=False)
    assert len(set(widths)) > 1
    assert sum(widths) / 200 == pytest.approx(bits, abs=0.05)
    assert ChannelBits()(torch.zeros(5), bits, symmetric=False) == (bits,) * 5


def test_limits_hold_and_the_mean_comes_back_behind_them():
    spread = torch.cat([torch.full((50,), 1e-6), drawn(50).exp()])
    symmetric = ChannelBits()(spread, 4, symmetric=True)
    other = ChannelBits()(spread, 4, symmetric=False)
    assert min(symmetric) == 2
    assert min(other) == 0
    assert sum(symmetric) / 100 == pytest.approx(4, abs=0.1)
    assert max(ChannelBits(most=5)(spread, 4, symmetric=False)) == 5


def test_channels_of_a_grid_are_rounded_each_on_its_own_grid():
    x = drawn(2, 4, 5, 5) * 3
    widths = (0, 2, 5, 8)
    grid = Grid(8, signed=False, symmetric=False, axis=1, widths=widths)
    qparams = QParams(torch.tensor([1.0, 0.9, 0.1, 0.02]), torch.tensor([0, 1, 12, 100], dtype=torch.int32))
    whole, rounded = codes(x, qparams, grid), fake(x, qparams, grid)
    assert (whole[:, 0] == 0).all()
    assert (rounded[:, 0] == 0).all()
    for c in (1, 2, 3):
        alone, one = Grid(widths[c], signed=False, symmetric=False), QParams(qparams.scale[c], qparams.zero[c])
        assert torch.equal(whole[:, c], codes(x[:, c], one, alone))
        assert torch.equal(rounded[:, c], fake(x[:, c], one, alone))
        assert whole[:, c].max() == 2 ** widths[c] - 1
    with pytest.raises(ValueError, match="widths of channels"):
        Grid(4, axis=0, widths=(3, 5))


@pytest.mark.parametrize("method", [MinMax(), AnalyticClip()])
def test_ranges_of_channels_are_those_of_each_alone(method):
    w, widths = drawn(5, 30), (2, 4, 3, 4, 8)
    grid = Grid(8, narrow=True, axis=0, widths=widths)
    found = ranged(method, Samples.of_weight(w, grid), grid)
    for c, bits in enumerate(widths):
        alone = method(Samples.of_weight(w[c : c + 1], Grid(bits, narrow=True, axis=0)), Grid(bits, narrow=True, axis=0))
        assert found.scale[c] == alone.scale[0]


def test_a_channel_is_sampled_at_the_places_of_each_image(conv_net, vit):
    for net, site, axis in ((conv_net, "stem:output", 1), (vit, "blocks.0.fc1:input", 2)):
        found = channel_samples(net.graph, net.images.split(5), {site: axis}, places=10_000)[site]
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            Executor(net.graph)(net.images, {net.graph.site(site).tensor: seen.append})
        whole = seen[0].movedim(axis, 0).flatten(1)
        assert torch.allclose(found.values.sort(1).values, whole.sort(1).values, atol=1e-5)
        few = channel_samples(net.graph, net.images.split(5), {site: axis}, places=2)[site]
        assert few.values.shape[1] == 2 * len(net.images)
        assert torch.allclose(few.low, whole.amin(1), atol=1e-5)
        assert torch.allclose(few.high, whole.amax(1), atol=1e-5)
        again = channel_samples(net.graph, net.images.split(16), {site: axis}, places=2)[site]
        assert torch.allclose(few.values, again.values, atol=1e-5)


def weight_of(net, name: str) -> torch.Tensor:
    tensor = net.graph.site(net.graph.op(name).operands["weight"]).tensor
    return constant(net.graph.module, next(n for n in net.graph.module.graph.nodes if n.name == tensor)).flatten(1)


def test_the_mean_of_each_channel_comes_back():
    w, grid = drawn(6, 40) + 0.3, Grid(3, narrow=True, axis=0)
    q = fake(w, MinMax()(Samples.of_weight(w, grid), grid), grid)
    assert (q.mean(1) - w.mean(1)).abs().max() > 1e-3
    assert torch.allclose(q.mean(1) + WeightMean().offset(w, q), w.mean(1), atol=1e-6)
    ratio = WeightMean(variance=True).ratio(w, q)
    corrected = q * ratio[:, None] + WeightMean(variance=True).offset(w, q * ratio[:, None])[:, None]
    assert torch.allclose(corrected.mean(1), w.mean(1), atol=1e-6)
    assert torch.allclose(corrected.std(1), w.std(1), rtol=1e-5)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_the_bias_holds_what_the_offset_of_the_weight_would_add(request, name, variance):
    net = request.getfixturevalue(name)
    ranges, target = Ranges(channel_bits=ChannelBits()), load_target("openvino-x86")  # its biases are float
    plain, plan = (
        plan_for(net.graph, net.stats, target, Recipe("", passes), bits=BITS, sampled=net.samples)
        for passes in ((ranges,), (ranges, WeightMean(variance)))
    )
    checked, moved = 0, 0.0
    for op in (net.graph.op(n) for n in net.rows):
        rows, w = net.rows[op.name].rows.flatten(0, 1), weight_of(net, op.name)
        choice = plan.choices[op.operands["weight"]]
        q = values(choice.codes.to(torch.int32), choice.qparams, choice.grid).flatten(1)
        assert torch.equal(choice.codes, plain.choices[choice.site].codes)
        exact = q + (w.mean(1) - q.mean(1))[:, None]  # the paper's weight, which no integer kernel can hold
        groups = rows.shape[1] // w.shape[1]
        paper, ours = (F.conv1d(rows[..., None], m[..., None], groups=groups)[..., 0].mean(0) for m in (exact, q))
        bias = constant_bias(net, op)
        step = plan.choices[op.operands["input"]].qparams.scale * choice.qparams.scale  # where a kernel adds in int32
        within = (0.5 * step if op.operands.get("output", "") in plan.choices else 0) + 2e-4
        assert ((ours + plan.biases[op.name].values - paper - bias).abs() <= within).all()
        moved = max(moved, (ours - paper).abs().max().item())
        checked += 1
        if variance:
            assert torch.allclose(q.std(1), w.std(1), rtol=1e-3)
    assert checked == len(plan.biases) >= 4
    assert moved > 5e-3


def constant_bias(net, op) -> torch.Tensor:
    if "bias" not in op.operands:
        return torch.zeros(net.graph.site(op.operands["weight"]).shape[0])
    tensor = net.graph.site(op.operands["bias"]).tensor
    return constant(net.graph.module, next(n for n in net.graph.module.graph.nodes if n.name == tensor))


FAST = ("conv_net", "ort-x86-channel", "w4a8"), ("vit", "ort", "4"), ("vit", "ort-x86-channel", "w8a4")
CASES = itertools.product(("conv_net", "vit"), ("ort-x86-channel", "ort"), ("4", "w4a8", "w8a4", "8"))


@pytest.mark.parametrize(
    ("name", "target", "bits"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_codes_agree_with_the_runtime_with_widths_of_channels(request, ort_target, name, target, bits, tmp_path):
    net = request.getfixturevalue(name)
    target = ort_target if target == "ort" else target
    plan = net.plan(target, "aciq", bits=parse_bits(bits))
    realize(net.graph, plan, tmp_path / "model.onnx", opset=load_target(target).opset)
    checks = compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]])
    assert checks.wrong == ()
    assert sum(check.compared for check in checks.off) > 1000
    assert not checks.wrong_outputs
    widths = {c.role: c.grid.widths for c in plan.choices.values() if c.grid.widths}
    by_channel = target == "ort-x86-channel"
    assert ("weight" in widths) == (bits in ("4", "w4a8"))
    assert bool(set(widths) - {"weight"}) == (by_channel and bits in ("4", "w8a4"))
    refused = [r for r in plan.fallbacks if r.requested == "a width for each channel"]
    assert bool(refused) == (bits in ("4", "w8a4") and (not by_channel or name == "vit"))


class Spread(nn.Module):
    """Channels whose sizes differ a hundredfold: one step for all of them is poor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-2, 0, 16)[:, None, None, None]
            self.a.bias *= torch.logspace(-2, 0, 16)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))


def test_the_packed_plan_has_the_bits_of_each_channel_and_comes_back(capture_net, tmp_path):
    torch.manual_seed(0)
    net = capture_net(Spread())
    plan = net.plan("ort-x86-channel", "aciq", bits=BITS)
    save_plan(net.graph, plan, tmp_path)
    back = load_plan(net.graph, tmp_path)
    assert dict(back.choices).keys() == dict(plan.choices).keys()
    for site, choice in plan.choices.items():
        other = back.choices[site]
        assert other.grid == choice.grid
        assert other.qparams == choice.qparams
        assert (other.codes is None) == (choice.codes is None)
        assert choice.codes is None or torch.equal(other.codes, choice.codes)
    with torch.no_grad():
        assert torch.equal(*(simulate(net.graph, p)(net.images) for p in (plan, back)))
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "plan.safetensors")
    some = next(c for c in plan.choices.values() if c.role == "weight" and len(set(c.grid.widths)) > 1)
    row = some.codes[0].numel()
    groups = [row * some.grid.widths.count(b) * b for b in set(some.grid.widths)]
    assert stored[f"{some.site}.codes"].numel() == sum(-(-n // 8) for n in groups)
    assert stored[f"{some.site}.codes"].numel() < pack(some.codes, some.grid.bits, some.grid.low).numel()


def test_a_recipe_that_searches_one_step_is_refused_where_channels_have_their_own(conv_net):
    with pytest.raises(FewbitError, match=r"ort-x86-channel has one for each channel; .*aciq"):
        conv_net.plan("ort-x86-channel", "liu2021", bits=BITS)
    with pytest.raises(BadImages, match="needs calibration images"):
        conv_net.plan("ort-x86-channel", "minmax", images=())
    for search in (OutputSearch(), ModuleSearch()):
        recipe = Recipe("", (*RECIPES["aciq"].passes, search))
        with pytest.raises(ValueError, match="one width for a tensor"):
            choose(conv_net.context("ort-x86-vnni", bits=BITS), recipe)


def test_clipping_and_widths_of_channels_each_bring_the_outputs_nearer(capture_net):
    torch.manual_seed(0)
    net = capture_net(Spread())
    with torch.no_grad():
        exact = net.module(net.images)

    def error(ranges: Ranges) -> float:
        plan = choose(net.context("ort-x86-channel", bits=parse_bits("w8a3"), everything=False), Recipe("", (ranges,)))
        with torch.no_grad():
            return float((simulate(net.graph, plan)(net.images) - exact).square().mean())

    naive, widths = Ranges(), Ranges(channel_bits=ChannelBits())
    clipped, both = Ranges(AnalyticClip()), Ranges(AnalyticClip(), channel_bits=ChannelBits())
    assert error(widths) < error(naive)
    assert error(clipped) < error(naive)
    assert error(both) < error(clipped)
