"""Oracles: numpy.corrcoef, and a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.choose.objectives import Cosine, Pearson, RankingLoss, SquaredError
from oracles.objectives import hinge_of_all_pairs


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pearson_is_the_mean_over_images_of_what_numpy_says():
    exact, quantized = drawn(3, 50), drawn(4, 3, 50, seed=1) + drawn(3, 50)
    expected = [np.mean([np.corrcoef(exact[i], q[i])[0, 1] for i in range(3)]) for q in quantized.numpy()]
    assert Pearson()(exact, quantized).numpy() == pytest.approx(expected, abs=1e-6)


def test_pearson_stays_when_the_output_is_scaled_and_shifted():
    exact, quantized = drawn(2, 40), drawn(1, 2, 40, seed=1)
    assert torch.allclose(Pearson()(exact, 3 * quantized + 5), Pearson()(exact, quantized), atol=1e-6)
    assert torch.allclose(Pearson()(exact, (3 * exact + 5)[None]), torch.ones(1), atol=1e-6)
    assert torch.allclose(Pearson()(exact, -exact[None]), -torch.ones(1), atol=1e-6)


def test_pearson_sees_a_channel_that_is_shifted_on_its_own():
    exact = drawn(1, 10, 4)
    moved = exact + torch.tensor([0.0, 0.0, 0.0, 2.0])
    assert Pearson()(exact.flatten(1), moved.flatten(1)[None]) < 0.95


def test_a_constant_output_correlates_with_nothing():
    assert Pearson()(drawn(2, 8), torch.ones(1, 2, 8)) == 0
    assert Pearson()(torch.ones(2, 8), drawn(1, 2, 8)) == 0


def test_cosine_is_what_torch_says_and_does_not_see_scale():
    exact, quantized = drawn(3, 50), drawn(4, 3, 50, seed=1)
    expected = torch.nn.functional.cosine_similarity(exact[None], quantized, dim=2)
    assert torch.allclose(Cosine().each(exact, quantized), expected, atol=1e-6)
    assert torch.allclose(Cosine()(exact, 7 * quantized), expected.mean(1), atol=1e-6)
    assert not torch.allclose(Cosine()(exact, quantized + 1), expected.mean(1), atol=1e-2)
    assert Cosine()(exact, torch.zeros(1, 3, 50)) == 0


def test_squared_error_is_relative_to_each_image_and_sees_scale_and_shift():
    exact = drawn(3, 50)
    scale = torch.tensor([1.0, 10.0, 0.1])[:, None]
    assert torch.allclose(SquaredError()(scale * exact, 1.5 * scale * exact[None]), torch.tensor([-0.25]), atol=1e-6)
    assert SquaredError()(exact, exact[None]) == 0
    shifted = SquaredError().each(exact, (exact + 1)[None])[0]
    assert shifted.numpy() == pytest.approx([-50 / row.square().sum().item() for row in exact], rel=1e-5)


def test_an_unchanged_map_has_no_hinge_at_margin_0_and_one_at_a_wide_margin():
    exact = drawn(6, 20)
    assert RankingLoss(theta=0.0)(exact, exact[None]) == 0
    assert RankingLoss(theta=10.0)(exact, exact[None]) > 5


def test_the_hinge_grows_when_two_keys_are_swapped():
    exact = drawn(1, 12)
    swapped = exact.clone()
    first, last = exact[0].argmax(), exact[0].argmin()
    swapped[0, first], swapped[0, last] = exact[0, last], exact[0, first]
    for theta in (0.0, 0.2):
        before, after = RankingLoss(theta, pairs=1000)(exact, torch.stack([exact, swapped]))
        assert after > before + 0.01


@pytest.mark.parametrize("theta", [0.0, 0.2, 2.0])
def test_with_all_pairs_the_hinge_is_that_of_a_loop(theta):
    exact, quantized = drawn(5, 7), drawn(3, 5, 7, seed=1)
    exact[2, 3] = exact[2, 5]  # a tie
    found = RankingLoss(theta, pairs=21)(exact, quantized)
    assert found.tolist() == pytest.approx([hinge_of_all_pairs(exact, q, theta) for q in quantized], rel=1e-5)


def test_sampled_pairs_come_near_to_all_pairs_and_are_the_same_for_every_candidate():
    exact, quantized = drawn(200, 30), drawn(200, 30) + 0.5 * drawn(200, 30, seed=1)
    twice = RankingLoss()(exact, torch.stack([quantized, quantized]))
    assert twice[0] == twice[1]
    assert twice[0].item() == pytest.approx(hinge_of_all_pairs(exact, quantized, 0.2), rel=0.05)
    assert RankingLoss(seed=1)(exact, quantized[None]) != twice[0]


def test_a_row_of_ties_costs_nothing():
    assert RankingLoss()(torch.ones(2, 9), drawn(1, 2, 9)) == 0
