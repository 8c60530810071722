"""Oracles: nearest where nothing is correlated, brute force over 3 weights, least squares, the error itself on the rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fewbit.choose import Recipe, choose, parse_bits
from fewbit.choose.columns import factor
from fewbit.choose.gptq import Gptq
from fewbit.choose.headroom import codes_are_safe
from fewbit.choose.layer_rows import Layers, _drawn, joined
from fewbit.choose.moments import SUMS, Moments
from fewbit.choose.regression import agreement, factor_of, regressed
from fewbit.choose.wide_layers import columns_of, solved_in_parts, variances
from fewbit.core.grid import Grid, QParams, codes, fake, qparams_from_range, values
from fewbit.core.plan import Choice
from fewbit.execute.executor import Executor
from fewbit.execute.samples import op_rows
from fewbit.recipes import RECIPES
from fewbit.target import load_target
from fewbit.workers import LOCAL
from planning import context_for
from tasks import Apart

GRID = Grid(3, narrow=True, axis=0)
PLAIN = Gptq(ridges=(), shares=(1.0,), sweeps=0)
ZERO = torch.tensor(0.0)
*BEFORE, FAST = RECIPES["fast"].passes
assert isinstance(FAST, Gptq)
IN_PARTS = replace(RECIPES["fast"], passes=(*BEFORE, replace(FAST, whole=8, part=8)))


def rows(n: int = 400, c: int = 12, mix: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=generator)
    return x + mix * x @ torch.randn(c, c, generator=generator)


def moments(read: torch.Tensor, exact: torch.Tensor | None = None, groups: int = 1, outputs: int = 5) -> Moments:
    return Moments.of([(read, read if exact is None else exact, None)], groups, outputs)


def weight(o: int = 5, c: int = 12) -> tuple[torch.Tensor, QParams]:
    w = torch.randn(o, c, generator=torch.Generator().manual_seed(3))
    return w, qparams_from_range(w.amin(1), w.amax(1), GRID)


def test_moments_of_pieces_are_those_of_all_rows_and_centre_as_covariances_do():
    x, q = rows(), rows(seed=1)
    drift = rows(c=5, seed=2)
    pieces = [(q[:150], x[:150], drift[:150]), (q[150:], x[150:], drift[150:])]
    found = Moments.of(pieces, 1, 5).centred()
    both = torch.cov(torch.cat([x, q, drift], 1).T.double(), correction=0)
    torch.testing.assert_close(found.cross[0], both[:12, 12:24], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gram[0], both[12:24, 12:24], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.residual_read, both[24:, 12:24], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.read[0], q.double().mean(0))


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_without_a_target_are_the_same_but_for_what_is_not_read(groups):
    pieces = [(rows(seed=1)[part], rows()[part], rows(c=6, seed=2)[part]) for part in (slice(0, 150), slice(150, 300))]
    plain, without = (Moments.of(pieces, groups, 6, target=target) for target in (True, False))
    assert (len(without.cross), len(plain.cross)) == (0, groups)
    for one in (Moments.centred, lambda moments: moments, lambda moments: moments + moments):
        for name in ("read", "exact", "gram", "residual"):
            torch.testing.assert_close(getattr(one(without), name), getattr(one(plain), name), rtol=0, atol=0)
        assert not one(without).residual_read.any()


@pytest.mark.parametrize("groups", [1, 3])
def test_a_row_of_weight_three_counts_as_three_rows(groups):
    x, q, drift = rows(), rows(seed=1), rows(c=6, seed=2)
    weight = torch.arange(len(x)) % 4
    residual = drift if groups == 1 else None
    found = Moments.of([(q, x, residual)], groups, 6, weight.float())
    several = [v.repeat_interleave(weight, 0) for v in (q, x, drift)]
    expected = Moments.of([(several[0], several[1], several[2] if groups == 1 else None)], groups, 6)
    for one in (Moments.centred, lambda moments: moments):
        assert one(found).count == one(expected).count
        for name in SUMS:
            torch.testing.assert_close(getattr(one(found), name), getattr(one(expected), name), rtol=1e-4, atol=1e-3)


def test_weights_of_positions_are_spread_over_the_rows_that_are_cut(conv_net):
    op = conv_net.graph.op("depth")  # 4 x 4 outputs
    layers = Layers(conv_net.graph, (), conv_net.images.split(8), None)
    positions = torch.arange(16.0)
    for places in (16, 5):
        pieces = list(layers.rows(op, None, places, residual=False, positions=positions))
        for read, _, _, weights in pieces:
            assert weights.shape == read.shape[:1]
        at = torch.cat([weights for *_, weights in pieces]).long()
        first = torch.nn.functional.unfold(depth_input(conv_net), 3, stride=2).transpose(1, 2)
        image = torch.arange(len(conv_net.images)).repeat_interleave(places)
        assert torch.equal(torch.cat([read for read, *_ in pieces]), first[image, at])
        layers = Layers(conv_net.graph, (), conv_net.images.split(8), None)


def test_every_token_of_a_linear_layer_has_the_weight_of_its_position(vit):
    layers = Layers(vit.graph, (), vit.images.split(8), None)
    op = next(op for op in vit.graph.ops if op.kind == "linear" and "fc1" in op.name)
    positions = torch.arange(16.0)
    for read, _, _, weights in layers.rows(op, None, 5, residual=False, positions=positions):
        assert torch.equal(weights, positions.repeat(len(read) // 16))


def depth_input(net):
    """What the depthwise convolution of ConvNet reads, by its own layers."""
    with torch.no_grad():
        x = torch.nn.functional.relu6(net.module.stem(net.images))
    return torch.nn.functional.pad(x, (0, 1, 0, 1))


def test_covariances_keep_their_digits_where_rows_hardly_move():
    """Calibration images that are all alike, as noise is to a model: means a thousand times the spread."""
    x, q, drift = (100 + 0.1 * rows(c=c, seed=seed) for c, seed in ((12, 0), (12, 1), (5, 2)))
    found = Moments.of([(q[:150], x[:150], drift[:150]), (q[150:], x[150:], drift[150:])], 1, 5).centred()
    both = torch.cov(torch.cat([x, q, drift], 1).T.double(), correction=0)
    for value, exact in (
        (found.cross[0], both[:12, 12:24]),
        (found.gram[0], both[12:24, 12:24]),
        (found.residual_read, both[24:, 12:24]),
    ):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6)


def test_a_matrix_of_nothing_but_rounding_gets_the_diagonal_it_takes():
    h = torch.diag(torch.tensor([1.0, 1.0, -0.2], dtype=torch.float64))
    lower = factor(h, 0.003)
    added = (lower @ lower.T - h).diagonal()
    torch.testing.assert_close(added, torch.full((3,), 0.003 * 1000 * 0.6, dtype=torch.float64))
    beside = factor(torch.stack([h, 2 * torch.eye(3, dtype=torch.float64)]), 0.003)  # one that needs no more gets no more
    torch.testing.assert_close(beside[0], lower)
    torch.testing.assert_close(beside[1], (2 * 1.003) ** 0.5 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("order", [False, True])
def test_without_correlation_every_weight_goes_to_the_nearest_code(sweeps, order):
    w, qparams = weight()
    diagonal = torch.diag(torch.linspace(0.5, 4, 12, dtype=torch.float64))[None]
    plain = moments(rows()).centred()
    apart = Moments(1, plain.read, plain.exact, diagonal, diagonal, plain.residual, plain.residual_read)
    q, step = Gptq(ridges=(), shares=(1.0,), sweeps=sweeps, order=order).rounding.solve(w, qparams, GRID, apart, ZERO)
    assert torch.equal(q, codes(w, qparams, GRID))
    assert torch.equal(step.scale, qparams.scale)


@pytest.mark.parametrize("alive", [0, 6])
def test_inputs_that_are_always_zero_keep_the_nearest_codes(alive):
    w, qparams = weight()
    x = rows()
    x[:, alive:] = 0
    q, _ = Gptq(ridges=(), shares=(1.0,)).rounding.solve(w, qparams, GRID, moments(x).centred(), ZERO)
    assert torch.equal(q[:, alive:], codes(w, qparams, GRID)[:, alive:])


def test_groups_are_solved_each_on_its_own_part():
    w, _ = weight(6, 4)
    qparams = qparams_from_range(w.amin(1), w.amax(1), GRID)
    x = rows(c=12)
    whole, _ = Gptq(ridges=()).rounding.solve(w, qparams, GRID, moments(x, groups=3, outputs=6).centred(), ZERO)
    for g in range(3):
        part = QParams(qparams.scale[2 * g : 2 * g + 2], qparams.zero[2 * g : 2 * g + 2])
        alone = moments(x[:, 4 * g : 4 * g + 4], outputs=2).centred()
        found, _ = Gptq(ridges=()).rounding.solve(w[2 * g : 2 * g + 2], part, GRID, alone, ZERO)
        assert torch.equal(whole[2 * g : 2 * g + 2], found)


def error_on(x: torch.Tensor, w: torch.Tensor, q: torch.Tensor, qparams: QParams) -> float:
    lost = (x - x.mean(0)) @ (values(q, qparams, GRID) - w).T
    return float(lost.square().sum())


def test_with_correlation_each_part_lowers_the_error_of_the_output():
    x, (w, qparams) = rows(), weight()
    seen = moments(x).centred()
    errors = [error_on(x, w, codes(w, qparams, GRID), qparams)]
    for method in (PLAIN, Gptq(ridges=(), shares=(1.0,)), Gptq(ridges=())):
        errors.append(error_on(x, w, *method.rounding.solve(w, qparams, GRID, seen, ZERO)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]
    assert errors[3] < errors[1]


def test_coordinate_descent_ends_where_no_single_code_can_move_and_near_the_best_of_all():
    x = rows(c=3, mix=2.0)
    w, _ = weight(4, 3)
    qparams = qparams_from_range(w.amin(1), w.amax(1), GRID)
    seen = moments(x, outputs=4).centred()
    q, _ = Gptq(ridges=(), shares=(1.0,), sweeps=20).rounding.solve(w, qparams, GRID, seen, ZERO)
    wanted = seen.through(w.double())
    span = range(GRID.low, GRID.high + 1)
    every = torch.tensor(list(itertools.product(span, span, span)))
    all_errors = torch.stack([seen.error(wanted, every[i].expand(4, 3) * qparams.scale[:, None]) for i in range(len(every))])
    exact = (wanted * w).sum(1)
    best, own = all_errors.amin(0) + exact, seen.error(wanted, values(q, qparams, GRID)) + exact
    nearest = seen.error(wanted, values(codes(w, qparams, GRID), qparams, GRID)) + exact
    assert bool((own >= best - 1e-6).all())
    assert bool((own <= nearest + 1e-6).all())
    assert int(((own - best).abs() < 1e-6).sum()) >= 3
    for j, step in itertools.product(range(3), (-1, 1)):
        moved = q.clone()
        moved[:, j] = (moved[:, j] + step).clamp(GRID.low, GRID.high)
        assert bool((seen.error(wanted, values(moved, qparams, GRID)) + exact >= own - 1e-5).all())


def test_ridge_goes_to_least_squares_and_is_off_where_both_models_read_the_same():
    x, (w, _) = rows(2000), weight()
    q = x + 0.7 * rows(2000, seed=9, mix=0.0)
    fit, held = moments(q[:1500], x[:1500]), moments(q[1500:], x[1500:])
    share = Gptq(ridges=(1e-9,)).ridge(w, fit.centred(), held.centred())
    found = regressed(w, (fit + held).centred(), share)
    centred = q - q.mean(0)
    expected = torch.linalg.lstsq(centred, (x - x.mean(0)) @ w.T).solution.T
    assert share == 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert Gptq().ridge(w, moments(x[:1500]).centred(), moments(x[1500:]).centred()) is None


@pytest.mark.parametrize("groups", [1, 3])
def test_another_process_selects_the_same_ridge(groups):
    """Of few rows and much noise, where neither the smallest λ is the best nor the largest."""
    x, (w, _) = rows(500), weight(6, 12 // groups)
    read = x + 2.0 * rows(500, seed=9, mix=0.0)
    given = w, moments(read[:40], x[:40], groups, 6).centred(), moments(read[40:], x[40:], groups, 6).centred()
    shares = tuple(10.0**k for k in range(-6, 4))
    here, there = (Gptq(ridges=shares).ridge(*given, workers) for workers in (LOCAL, Apart()))
    assert here == there
    assert shares[0] < here < shares[-1]


def test_the_gain_of_a_weight_that_is_too_small_by_a_factor_is_the_factor():
    x, (w, _) = rows(), weight()
    seen = moments(x).centred()
    factors = torch.linspace(0.7, 1.5, 5)
    torch.testing.assert_close(factor_of(*agreement(w / factors[:, None], seen.target(w), seen)), factors, rtol=1e-5, atol=1e-5)


def test_a_gain_of_more_than_two_or_less_than_a_half_is_none():
    x, (w, _) = rows(), weight()
    seen = moments(x).centred()
    factors = torch.tensor([0.49, 0.51, 1.0, 1.99, 2.01])
    quantized = w / factors[:, None]
    found = factor_of(*agreement(quantized, seen.target(w), seen))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.51, 1.0, 1.99, 1.0]), rtol=1e-5, atol=1e-5)
    assert factor_of(*agreement(torch.zeros_like(w), seen.target(w), seen)).tolist() == [1.0] * 5
    assert factor_of(*agreement(-w, seen.target(w), seen)).tolist() == [1.0] * 5


def test_the_bias_takes_the_mean_error_on_the_rows_with_what_the_branch_before_has_lost():
    """The oracle is the layer itself, on the rows: y' = W' q + b' has the mean of y = W x + b + residual."""
    x, read, drift = rows(), rows(seed=1) + 0.3, 0.5 + rows(c=5, seed=2)
    (w, qparams), bias = weight(), torch.linspace(-1, 1, 5)
    whole = Moments.of([(read, x, drift)], 1, 5)
    choice = Choice("w", "weight", GRID, qparams, "max")
    found = Gptq(bias=True, gain=True).layer(choice, w, bias, whole, 0.1, ZERO)
    ours = read @ values(found.choice.codes.int(), found.choice.qparams, GRID).T + found.bias
    torch.testing.assert_close(ours.mean(0), (x @ w.T + bias + drift).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 1.3])
def test_no_scale_is_below_its_floor_behind_the_gain_either(share):
    x, (w, qparams) = rows(), weight()
    choice = Choice("w", "weight", GRID, qparams, "max")
    method, floor = Gptq(ridges=(), bias=True, gain=True), share * qparams.scale
    free = method.layer(choice, w, None, moments(x), None, ZERO).choice.qparams.scale
    held = method.layer(choice, w, None, moments(x), None, floor).choice.qparams.scale
    assert (free < floor).any()
    assert (held >= floor).all()


@pytest.mark.parametrize("recipe", [RECIPES["fast"], IN_PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", ["vit", "conv_net"])
def test_the_mean_error_of_each_layer_is_gone_on_what_the_quantized_model_gives_it(name, recipe, request):
    net = request.getfixturevalue(name)
    images = torch.randn(32, *net.images.shape[1:], generator=torch.Generator().manual_seed(1))  # a batch in four is held out
    context = net.context("ort-x86-vnni", "fast", bits=parse_bits(4), images=images.split(8), everything=False)
    plan = choose(context, recipe)
    overlay, exact = Executor.of(net.graph, plan), Executor(net.graph, ())
    nodes = {node.name: node for node in net.graph.module.graph.nodes}
    source = next(node for node in nodes.values() if node.op == "placeholder")
    quantized, real = {source: images}, {source: images}
    with torch.no_grad():
        overlay.run(net.graph.module.graph.nodes, quantized)
        exact.run(net.graph.module.graph.nodes, real)
    for op in net.graph.ops:
        if op.kind != "linear":
            continue
        node = nodes[op.node]
        other = joined(node)
        lost = [env[node] + (0 if other is None else env[other]) for env in (quantized, real)]
        mean = (lost[0] - lost[1]).flatten(0, -2).mean(0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=2e-5)
    (log,) = plan.logs("gptq")
    assert [*dict.fromkeys(row["op"] for row in log.rows)] == [
        op.name for op in net.graph.ops if op.name in plan.integer_ops and "weight" in op.operands
    ]


class Branches(torch.nn.Module):
    """Two branches that are added: the first layer is done before the layers of the other one have read what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(16, 16) for _ in range(3))
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x.flatten(1)[:, :16])
        first = self.a(x)
        return self.head(first + self.c(torch.relu(self.b(x))))


def test_only_the_last_of_two_branches_sees_what_is_lost_in_the_other(capture_net):
    torch.manual_seed(4)
    graph, batches = (net := capture_net(Branches())).graph, net.images.split(4)
    layers = Layers(graph, (), batches, None)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    assert joined(nodes[graph.op("a").node]) is nodes[graph.op("c").node]
    seen, linear = {}, [op for op in graph.ops if op.kind == "linear"]
    for op in linear:
        seen[op.name] = [error for _, _, error, _ in layers.rows(op, None, 5, residual=True)]
    assert [op.name for op in linear] == ["a", "b", "c", "head"]
    assert {len(errors) for errors in seen.values()} == {len(batches)}
    assert all(error is None for name in "ab" for error in seen[name])
    assert all(error is not None and not error.any() for error in seen["c"])  # nothing is quantized here


def test_rows_of_a_convolution_are_its_patches(conv_net):
    op = conv_net.graph.op("stem")
    tensor = conv_net.graph.site(op.operands["input"]).tensor
    found = op_rows(conv_net.graph, op, tensor, conv_net.images.split(8), 10_000)
    patches = torch.nn.functional.unfold(conv_net.images, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    assert found is not None
    assert torch.equal(torch.cat(list(found)), patches)


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="shares"):
        Gptq(shares=())


@pytest.mark.parametrize(("memory", "left"), [(1, ["32"]), (1 << 28, [])])
def test_images_that_there_is_no_room_for_are_refused_in_words(conv_net, monkeypatch, memory, left):
    monkeypatch.setattr("fewbit.choose.context.MEMORY", memory)
    images = torch.cat([conv_net.images] * 3).split(8)[:5]  # 4 batches are always taken
    plan = conv_net.plan("ort-x86-vnni", "fast", images=images, everything=False)
    assert [r.actual for r in plan.fallbacks if r.site == "calibration images"] == left
    assert [r.requested for r in plan.fallbacks if r.site == "calibration images"] == ["40 for the codes of weights"] * len(
        left
    )


def test_a_layer_of_many_inputs_has_more_tokens_of_an_image_at_eight_bits():
    grid = Grid(8, narrow=True, axis=0)
    choice = Choice("w", "weight", grid, qparams_from_range(-torch.ones(2), torch.ones(2), grid), "max")
    assert (
        Gptq()._for("linear", 1001, choice, None, 10).tokens == 251
    )  # 2,510 rows, the first whole tokens that are 2.5 for an input
    assert Gptq()._for("linear", 1001, choice, None, 1000).tokens == 32


def test_at_eight_bits_a_gain_is_for_convolutions():
    grid = Grid(8, narrow=True, axis=0)
    choice = Choice("w", "weight", grid, qparams_from_range(-torch.ones(2), torch.ones(2), grid), "max")
    assert [Gptq(gain=True)._for(kind, 9, choice, None, 10).gain for kind in ("linear", "conv2d")] == [False, True]


def test_at_eight_bits_the_light_settings_lose_no_more_of_a_layer_than_all_of_them():
    x = rows(2000, mix=0.4)
    w, _ = weight()
    grid = Grid(8, narrow=True, axis=0)
    whole = moments(x).centred()
    choice = Choice("w", "weight", grid, qparams_from_range(w.amin(1), w.amax(1), grid), "max")
    errors = []
    for light in (8, 9):
        method = Gptq(light=light)._for("linear", 100, choice, None, 10)
        assert bool(method.ridges) == (light == 9)
        assert method.tokens == (None if light == 9 else 32)  # of 10 images: more than 2.5 rows for each of 100 inputs
        q, qparams = method.rounding.solve(w, choice.qparams, grid, whole, ZERO)
        errors.append(whole.error(torch.zeros_like(w), values(q, qparams, grid) - w).sum())
    nearest = whole.error(torch.zeros_like(w), values(codes(w, choice.qparams, grid), choice.qparams, grid) - w).sum()
    assert errors[0] < 1.01 * errors[1]
    assert errors[0] < 0.7 * nearest


def test_layers_that_read_the_same_share_its_moments_and_find_their_own(vit, monkeypatch):
    batches, read = vit.images.split(4), []
    together, ops = Layers(vit.graph, (), batches, None), [op for op in vit.graph.ops if op.kind == "linear"]
    every = together.rows
    monkeypatch.setattr(together, "rows", lambda op, *args, **kwargs: (read.append(op), every(op, *args, **kwargs))[1])
    for op in ops:
        outputs = vit.graph.site(op.operands["weight"]).shape[0]
        found = together.moments(op, None, 5, outputs, residual=True)
        alone = Layers(vit.graph, (), batches, None).moments(op, None, 5, outputs, residual=True)
        for ours, theirs in zip(found, alone, strict=True):
            assert (ours is None) == (theirs is None)
            for name in SUMS if ours is not None else ():
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
            if ours is not None:
                ours.centre()  # in place: the next layer must not see it
    tensors = [vit.graph.site(op.operands["input"]).tensor for op in ops]
    assert len(read) == len(set(tensors)) < len(ops)  # queries, keys and values together


def test_some_rows_of_a_batch_are_the_same_rows_of_every_part():
    read = torch.arange(60.0).view(20, 3)
    found = _drawn((read, read + 100, read + 200, read[:, 0]), 7, 5)
    assert len(found[0]) == 7 == len(found[0].unique(dim=0))
    for part, shift in zip(found[1:3], (100, 200), strict=True):
        assert torch.equal(part, found[0] + shift)
    assert torch.equal(found[3], found[0][:, 0])
    assert _drawn((read, read, None, None), 20, 5)[0] is read


def test_some_of_the_images_are_every_so_many(conv_net):
    images = torch.randn(24, *conv_net.images.shape[1:], generator=torch.Generator().manual_seed(5))
    recipe = Recipe("some of them", (RECIPES["mse"].passes[0], Gptq(images=6)))
    parts = (images.split(8), images[::4].split(6), images[:6].split(6))
    found, expected, other = (choose(conv_net.context("ort-x86-vnni", images=part), recipe) for part in parts)
    codes = [[c.codes for c in plan.choices.values() if c.codes is not None] for plan in (found, expected, other)]
    assert all(map(torch.equal, codes[0], codes[1]))
    assert not all(map(torch.equal, codes[0], codes[2]))


def test_a_weight_that_keeps_its_codes_is_a_fallback(conv_net):
    context = context_for(conv_net.graph, conv_net.stats, load_target("ort-x86-avx2"), images=conv_net.images.split(8))
    start, grids = RECIPES["mse"].passes[0](context.start(), context), context.allowed.sites
    wide = {  # codes of 8 bits of which no two saturate a sum of 16, with scales that some of GPTQ's fill
        site: replace(
            choice,
            grid=grids[site].grids[0],
            codes=torch.ones_like(choice.codes),
            qparams=replace(choice.qparams, scale=choice.qparams.scale * choice.grid.largest / grids[site].grids[0].largest),
        )
        for site, choice in start.choices.items()
        if choice.role == "weight"
    }
    start = replace(start, choices={**start.choices, **wide})
    plan = Gptq()(start, context)
    assert all(codes_are_safe(context.graph, plan.choices[site], plan.choices, grids[site]) for site in wide)
    kept = {site for site, choice in wide.items() if torch.equal(plan.choices[site].codes, choice.codes)}
    said = {f.site: (f.requested, f.actual, f.why) for f in plan.fallbacks if f not in start.fallbacks}
    assert 0 < len(kept) < len(wide)
    assert said == dict.fromkeys(kept, ("GPTQ weights", "those before", "GPTQ codes can saturate 16 bits"))


class OneDimension(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.line, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(8, 8, 3), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.line(torch.relu(self.stem(x)).flatten(2)).mean(2))


def test_a_layer_of_which_no_rows_are_cut_is_a_fallback(capture_net):
    net = capture_net(OneDimension().eval())
    context = net.context("ort-x86-vnni", images=net.images.split(8))
    before = choose(context, Recipe("ranges", (RECIPES["mse"].passes[0],)))
    plan = choose(context, Recipe("both", (RECIPES["mse"].passes[0], Gptq())))
    (found,) = [f for f in plan.fallbacks if f not in before.fallbacks]
    line = net.graph.op("line")
    assert (found.site, found.actual, found.macs_share) == (line.operands["weight"], "those before", net.graph.share(line.macs))
    changed = {
        c.site for c in plan.choices.values() if c.codes is not None and not torch.equal(c.codes, before.choices[c.site].codes)
    }
    assert changed == {net.graph.op(name).operands["weight"] for name in ("stem", "head")}


def seen_of(
    read: torch.Tensor, exact: torch.Tensor, groups: int = 1, outputs: int = 6, *, held: bool = False,
    drift: torch.Tensor | None = None,
):  # fmt: skip
    """What `solved_in_parts` sees of rows; with `held` the same rows are held out."""

    def see(columns: slice = slice(None), *, residual: bool = False):
        parts = [rows.unflatten(1, (groups, -1))[:, :, columns].flatten(1) for rows in (read, exact)]
        fits = [Moments.of([(*parts, drift if residual else None)], groups, outputs) for _ in range(1 + held)]
        return fits[0], fits[1] if held else None

    return see


def apart(n: int = 300, groups: int = 1, seed: int = 0) -> torch.Tensor:
    """Rows of 24 columns in each group of which no one of the first 12 varies with one of the last."""
    columns = [rows(n, 12, seed=seed + g) for g in range(groups)]
    pairs = [(x - x.mean(0), torch.zeros_like(x)) for x in columns]
    return torch.cat([torch.cat([torch.cat([x, none], 1), torch.cat([none, x.flip(1)], 1)]) for x, none in pairs], 1)


@pytest.mark.parametrize(
    ("size", "multiples", "groups", "ridges"),
    [(0, 0, 1, ()), (0, 0, 1, (0.1,)), (0, 0, 2, ()), (4, 0, 1, ()), (4, 16, 1, ())],
    ids=["rows", "ridge", "convolution in groups", "groups of columns", "whole multiples"],
)
def test_parts_of_a_layer_that_do_not_vary_together_are_solved_as_the_whole(size, multiples, groups, ridges):
    grid = Grid(3, narrow=True, axis=0, group_size=size, multiples=multiples)
    w, bias = torch.randn(6, 24, generator=torch.Generator().manual_seed(3)), torch.linspace(-1, 1, 6)
    blocks = w.view(6, -1, size) if size else w
    qparams = qparams_from_range(blocks.amin(-1), blocks.amax(-1), grid)
    choice = Choice("w", "weight", grid, qparams, "max")
    exact = apart(groups=groups)
    read = exact + 0.3 * apart(groups=groups, seed=9) if ridges else exact
    see = seen_of(read, exact, groups, held=bool(ridges))
    method = Gptq(ridges=ridges, bias=True, gain=True, whole=12, part=12)
    whole, outside = see()
    one = method.layer(choice, w, bias, whole if outside is None else whole + outside, ridges[0] if ridges else None, ZERO)
    power = variances(read.split(50)) if size else None
    parts = solved_in_parts(method, choice, w, bias, see, power, ZERO, LOCAL)
    assert parts.ridges == (ridges * 2 if ridges else (None, None))
    assert torch.equal(parts.choice.codes, one.choice.codes)
    assert not torch.equal(one.choice.codes, codes(w, one.choice.qparams, grid).to(one.choice.codes.dtype))
    torch.testing.assert_close(parts.choice.qparams.scale, one.choice.qparams.scale)
    torch.testing.assert_close(parts.bias, one.bias)


def test_what_the_branch_before_has_lost_goes_into_the_bias_of_a_layer_in_parts_and_not_into_its_codes():
    x, read, drift = rows(), rows() + 0.3, rows()[:, :5] + 0.5
    (w, qparams), bias = weight(), torch.linspace(-1, 1, 5)
    choice, method = Choice("w", "weight", GRID, qparams, "max"), Gptq(ridges=(), bias=True, gain=True, whole=6, part=6)
    found, without = (
        solved_in_parts(method, choice, w, bias, seen_of(read, x, 1, 5, drift=d), None, ZERO, LOCAL) for d in (drift, None)
    )
    ours = read @ found.choice.real.T + found.bias
    torch.testing.assert_close(ours.mean(0), (x @ w.T + bias + drift).mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.choice.codes, without.choice.codes)
    assert torch.equal(found.choice.qparams.scale, without.choice.qparams.scale)
    torch.testing.assert_close(found.bias - without.bias, drift.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 8])
def test_parts_that_vary_together_still_lose_less_than_rounding(bits):
    grid = Grid(bits, narrow=True, axis=0)
    x, w = rows(c=24, mix=0.4), torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    choice = Choice("w", "weight", grid, qparams_from_range(w.amin(1), w.amax(1), grid), "max")
    whole = moments(x, outputs=6).centred()

    def lost(real: torch.Tensor) -> float:
        return float(whole.error(torch.zeros_like(w), real - w).sum())

    nearest, errors = lost(fake(w, choice.qparams, grid)), []
    for part in (6, 12):
        method = Gptq(bias=True, gain=True, whole=12, part=part)._for("linear", 12, choice, None, 10)
        errors.append(lost(solved_in_parts(method, choice, w, None, seen_of(x, x), None, ZERO, LOCAL).choice.real))
    assert errors[1] < errors[0] < nearest
    assert errors[1] < 0.9 * nearest


def test_a_layer_with_very_many_inputs_is_never_held_as_a_whole_and_the_log_names_it(conv_net, monkeypatch):
    held, make = [], Moments._none
    monkeypatch.setattr(Moments, "_none", lambda rows, *args: (held.append(rows.shape[2]), make(rows, *args))[1])
    method = Gptq(whole=20, part=12)
    plan = choose(conv_net.context("ort-x86-vnni", bits=parse_bits(4)), Recipe("", (RECIPES["mse"].passes[0], method)))
    assert max(held) <= method.widest(conv_net.graph) <= 20
    (log,) = plan.logs("gptq")
    assert log.summary == {"solved_in_parts": "stem (27 inputs), b (72 inputs)"}
    assert [row["part"] for row in log.rows if row["op"] == "stem"] == ["1 of 3", "2 of 3", "3 of 3"]
    assert Gptq().widest(conv_net.graph) >= 27


def test_columns_are_cut_into_few_parts_of_about_one_size_between_units():
    assert [(c.start, c.stop) for c in columns_of(25_088, 10_000)] == [(0, 8362), (8362, 16725), (16725, 25088)]
    assert [(c.start, c.stop) for c in columns_of(45, 20, 9)] == [(0, 9), (9, 27), (27, 45)]
    assert [(c.start, c.stop) for c in columns_of(50, 20, 25)] == [(0, 16), (16, 33), (33, 50)]


def test_the_variance_of_columns_keeps_its_digits_where_rows_hardly_move():
    x = 1000 + 0.1 * rows()
    torch.testing.assert_close(variances(x.split(70)), x.double().var(0, correction=0))


def test_parts_that_are_larger_than_what_is_solved_at_once_are_refused():
    with pytest.raises(ValueError, match="1 <= part <= whole"):
        Gptq(whole=10, part=20)
