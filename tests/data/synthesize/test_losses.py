"""The losses of synthetic images against closed forms and slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbit.data.synthesize.losses import apart, deep_from, density, distance, distorted, patch_entropy, prefix_of, roughness
from fewbit.data.synthesize.teacher import Moments, moments_of


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moments(*pairs: tuple[list[float], list[float]]) -> Moments:
    return Moments(tuple(torch.tensor(m) for m, _ in pairs), tuple(torch.tensor(v) for _, v in pairs))


def test_moments_are_those_that_batch_norm_takes_in_training(random: torch.Generator) -> None:
    x = 3 + 2 * torch.randn(4, 5, 6, 7, generator=random)
    norm = torch.nn.BatchNorm2d(5, momentum=1.0).train()
    norm(x)
    mean, variance = moments_of(x)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance * (4 * 42) / (4 * 42 - 1), norm.running_var)  # torch keeps the unbiased one


def test_the_distance_of_two_layers_by_hand() -> None:
    found = moments(([1.0, 2.0], [1.0, 1.0]), ([0.0], [3.0]))
    wanted = moments(([0.0, 0.0], [1.0, 3.0]), ([2.0], [3.0]))
    first, second = (1 + 4) / 2 + (0 + 4) / 2, 4 + 0
    assert float(distance(found, wanted)) == (first + second) / 2
    assert float(distance(wanted, wanted)) == 0


def test_the_distance_in_units_of_spread_is_that_of_two_normal_distributions() -> None:
    """Of N(0, 4) and N(2, 9): the means are one spread of 2 apart, the spreads 3 / 2 - 1; a constant channel has eps."""
    found, wanted = moments(([2.0, 1.0], [9.0, 0.0])), moments(([0.0, 1.0], [4.0, 0.0]))
    assert float(apart(found, wanted, [0.0 + 1e-12])) == pytest.approx((1 + 0.25) / 2)
    assert float(apart(wanted, wanted, [0.1])) == 0
    off = moments(([0.0, 2.0], [4.0, 0.0]))
    assert float(apart(off, wanted, [0.25])) == pytest.approx((1 / 0.5) ** 2 / 2)
    layers = Moments(found.means * 2, found.variances * 2), Moments(wanted.means * 2, wanted.variances * 2)
    assert float(apart(*layers, [1e-12, 1e-12])) == pytest.approx((1 + 0.25) / 2)


def test_distorted_statistics_by_hand_for_two_classes() -> None:
    both = Moments((torch.tensor([[1.0, 2.0], [10.0, 20.0]]),), (torch.tensor([[1.0, 1.0], [4.0, 4.0]]),))
    for label, centre in ((0, [1.0, 2.0]), (1, [10.0, 20.0])):
        noise = torch.Generator().manual_seed(label)
        n1, n2 = torch.randn(2, generator=noise), torch.randn(2, generator=noise)
        found = distorted(both.of(label), 0.5, 1.0, torch.Generator().manual_seed(label))
        torch.testing.assert_close(found.means[0], torch.tensor(centre) + 0.5 * n1)
        torch.testing.assert_close(found.variances[0], both.variances[0][label] + n2)
        exact = distorted(both.of(label), 0.0, 0.0, torch.Generator())
        assert float(distance(exact, both.of(label))) == 0
        expected = (0.25 * n1.square()).mean() + n2.square().mean()
        torch.testing.assert_close(distance(found, both.of(label)), expected)


@pytest.mark.parametrize(("layers", "first"), [(20, 8), (27, 12), (52, 24), (53, 25), (21, 9), (1, 0), (2, 0)])
def test_deep_layers_begin_where_the_paper_has_them(layers: int, first: int) -> None:
    assert deep_from(layers) == first


def slow_density(x: Tensor, at: Tensor, h: float) -> Tensor:
    return (torch.exp(-0.5 * ((at[:, None] - x) / h) ** 2) / (h * math.sqrt(2 * math.pi))).mean(1)


def test_the_density_is_that_of_a_kernel_on_every_number(random: torch.Generator) -> None:
    x = torch.rand(2, 300, generator=random) * 2 - 1
    places, found = density(x, 401, 0.05)
    for row, numbers in zip(found, x, strict=True):
        torch.testing.assert_close(row, slow_density(numbers, places, 0.05), atol=0.01, rtol=0.01)  # linear binning
    torch.testing.assert_close(torch.trapezoid(found, places, dim=1), torch.ones(2), atol=2e-3, rtol=0)


def test_patches_that_are_all_alike_have_the_entropy_of_one_kernel() -> None:
    same = torch.ones(3, 2, 16, 8)
    expected = math.log(0.05 * math.sqrt(2 * math.pi * math.e))
    assert float(patch_entropy(same, 401, 0.05)) == pytest.approx(expected, abs=0.02)


def test_diverse_patches_have_more_entropy_than_two_kinds_and_these_more_than_one(random: torch.Generator) -> None:
    angles = math.pi * torch.rand(2, 64, generator=random)
    diverse = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    halves = torch.eye(2)[(torch.arange(64) % 2)].expand(2, 64, 2)[:, None]
    same = torch.ones(2, 1, 64, 2)
    values = [float(patch_entropy(x, 201, 0.05)) for x in (diverse, halves, same)]
    assert values[0] > values[1] + 0.5 > values[2] + 1.0


def test_patches_are_the_mean_over_heads_without_the_tokens_before_them(random: torch.Generator) -> None:
    x = torch.randn(2, 3, 17, 8, generator=random)
    assert prefix_of(17) == 1
    assert prefix_of(196) == 0
    alone = x[:, :, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(patch_entropy(x, 101, 0.1, 1), patch_entropy(alone, 101, 0.1))
    x[:, :, 0] = 100.0
    torch.testing.assert_close(patch_entropy(x, 101, 0.1, 1), patch_entropy(alone, 101, 0.1))


def test_the_gradient_of_the_entropy_spreads_similarities(random: torch.Generator) -> None:
    x = (torch.randn(1, 1, 16, 4, generator=random) * 0.1 + 1).requires_grad_()
    before = patch_entropy(x, 201, 0.05)
    (gradient,) = torch.autograd.grad(before, [x])
    assert bool(torch.isfinite(gradient).all())
    after = patch_entropy((x + 0.05 * gradient / gradient.norm()).detach(), 201, 0.05)
    assert float(after) > float(before.detach())


def test_the_roughness_of_stripes() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 1, 8, 8)  # 1 to the right and on both diagonals, 0 down
    assert float(roughness(stripes)) == pytest.approx(0.75, abs=1e-5)
    assert float(roughness(torch.ones(1, 3, 8, 8))) == pytest.approx(0, abs=1e-5)
