"""Which task a model has, how near outputs are, and what is said where a measure says nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.choose.loss import cross_entropy
from fewbit.core.task import Output
from fewbit.errors import BadImages, BadValues
from fewbit.task import Classify, Closeness, OutputScore, Tensors, recognise


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def closeness(x: Tensor, y: Tensor, batch: int = 5) -> OutputScore:
    one = Closeness("y", x.is_floating_point())
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        one.add(a, b)
    return one.score()


@pytest.mark.parametrize(
    ("outputs", "task"),
    [
        ([Output("logits", (10,))], Classify(0, 10)),
        ([Output("y", (2,))], Classify(0, 2)),
        ([Output("hidden", (7, 8)), Output("logits", (10,))], Classify(1, 10)),
        ([Output("logits", (1,))], Tensors((True,))),
        ([Output("output", (4, 8, 8))], Tensors((True,))),
        ([Output("output.0", (10,)), Output("output.1", (10,))], Tensors((True, True))),
        ([Output("output", (10,), is_real=False)], Tensors((False,))),
    ],
)
def test_a_classifier_is_recognised_by_a_list_of_logits_and_nothing_else_is_guessed(outputs, task):
    assert recognise(outputs) == task


@pytest.mark.parametrize("shape", [(40, 3), (40, 3, 4, 5), (40, 60, 3), (40, 3, 60)])
def test_correlation_and_error_are_numpys_channel_by_channel(shape):
    x = noise(*shape) * 3 + 100
    y = x + noise(*shape, seed=1)
    channels = 2 if shape == (40, 60, 3) else 1
    rows = [np.moveaxis(t.numpy().astype(np.float64), channels, 0).reshape(3, -1) for t in (x, y)]
    score = closeness(x, y)
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*rows, strict=True)])
    assert score.agreement == pytest.approx(100 * expected, abs=1e-6)
    errors = [np.sqrt(((a - b) ** 2).mean()) / a.std() for a, b in zip(*rows, strict=True)]
    assert score.relative_error == pytest.approx(np.mean(errors), rel=1e-6)
    low, high = score.interval
    assert low < score.agreement < high < low + 20


def test_the_interval_holds_the_correlation_of_all_images_95_times_in_100():
    held = 0
    for seed in range(200):
        x = noise(64, 1, seed=seed)
        score = closeness(x, 0.8 * x + 0.6 * noise(64, 1, seed=1000 + seed))  # a true correlation of 0.8
        held += score.interval[0] <= 80 <= score.interval[1]
    assert 176 <= held <= 199  # 190 are expected, and their standard deviation is 3.1


def test_a_channel_of_large_numbers_does_not_hide_what_became_of_small_ones():
    boxes, scores = 100 * noise(30, 1, 50), noise(30, 3, 50, seed=1)
    exact = torch.cat([boxes, scores], 1)
    lost = torch.cat([boxes, torch.zeros_like(scores)], 1)
    assert F.cosine_similarity(exact.flatten(), lost.flatten(), dim=0) > 0.999  # which a cosine does
    assert closeness(exact, lost).agreement == pytest.approx(25)


def test_what_is_the_same_for_every_image_counts_for_nothing():
    grid = 100 * noise(1, 4, 30).expand(30, 4, 30)  # large numbers that vary from place to place alone
    x, y = noise(30, 1), noise(30, 1, seed=1)
    assert closeness(torch.full((30, 2), 3.0), noise(30, 2)).agreement is None
    assert abs(closeness(x + 1000, y + 1000).agreement) < 40
    assert closeness(grid, grid).agreement == pytest.approx(100)


def test_integers_are_compared_for_equality():
    x = torch.arange(60).view(10, 6) % 5
    y = x.clone()
    y[:3, 0] += 1
    score = closeness(x, y)
    assert (score.agreement, score.relative_error) == (pytest.approx(95), None)
    assert closeness(torch.zeros(10, 6, dtype=torch.long), y).agreement is None


def test_a_single_image_is_judged_over_all_its_numbers():
    x, y = noise(1, 12), noise(1, 12, seed=1)
    assert closeness(x, x + y).agreement == pytest.approx(100 * np.corrcoef(x[0], (x + y)[0])[0, 1], abs=1e-5)


def test_two_numbers_correlate_whatever_they_are_and_say_nothing():
    x, y = noise(2, 12), noise(2, 12, seed=1)
    both = [t.flatten() for t in (x, x + y)]  # not channel by channel, where each has two
    assert closeness(x, x + y).agreement == pytest.approx(100 * np.corrcoef(*both)[0, 1], abs=1e-5)
    maps = [t.view(2, 3, 4) for t in (x, x + y)]  # four places of two images are eight numbers of a channel
    each = [np.corrcoef(*(t[:, c].flatten() for t in maps))[0, 1] for c in range(3)]
    assert closeness(*maps).agreement == pytest.approx(100 * np.mean(each), abs=1e-5)
    for shape in ((2, 1), (1, 2), (1, 1)):
        score = closeness(noise(*shape), noise(*shape, seed=1))
        assert (score.agreement, score.few) == (None, shape != (1, 1))
    assert closeness(x[:1].repeat(2, 1), y).agreement is None  # the same for both images, and not from channel to channel
    with pytest.raises(BadImages, match="score at least three images: --score DIR"):
        Tensors((True,)).meter(None).rating([closeness(noise(2, 1), noise(2, 1, seed=1))])


def test_numbers_that_are_none_are_not_near_anything():
    x = noise(8, 3)
    broken = x.clone()
    broken[2, 1] = torch.nan
    assert closeness(x, broken).agreement == 0
    with pytest.raises(BadValues, match="float model gives NaN for output y"):
        closeness(broken, x)
    masked = x.clone()
    masked[:, 2] = -torch.inf
    assert closeness(masked, masked).agreement == pytest.approx(100)
    assert Classify(0, 3).predict([broken]).tolist()[2] == -1


def test_kl_and_cross_entropy_are_torchs():
    task, x, y = Classify(1, 5), noise(6, 5), noise(6, 5, seed=1)
    p, q = x.double().log_softmax(1), y.double().log_softmax(1)
    assert task.divergence([y, x], [x, y]) == pytest.approx(F.kl_div(q, p, reduction="sum", log_target=True).item())
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    assert cross_entropy(y, labels) == pytest.approx(F.cross_entropy(y.double(), labels, reduction="sum").item())


def test_the_divergence_of_tensors_is_the_mean_of_errors_by_variance():
    x, y = noise(6, 5) * 7, noise(6, 5, seed=1)
    z = torch.arange(12).view(6, 2)
    expected = 6 * ((x - y).square().mean() / x.var(correction=0) + 0.25) / 2
    w = z.clone()
    w[:3, 0] = -1
    assert Tensors((True, False)).divergence([x, z], [y, w]) == pytest.approx(float(expected), rel=1e-5)


def rate(before: Tensor, after: Tensor, labels: Tensor | None, classes: int = 4):
    meter = Classify(0, classes).meter(labels)
    for x, y in zip(before.split(7), after.split(7), strict=True):
        meter.add([x], [y])
    return meter.rating([closeness(before, after)])


def test_labels_on_which_the_float_model_does_not_beat_chance_are_replaced_by_agreement():
    logits = torch.eye(4).repeat(10, 1)
    right, moved = torch.arange(4).repeat(10), (torch.arange(4).repeat(10) + 1) % 4
    assert rate(logits, logits, right).score == 100
    rating = rate(logits, logits, moved)
    assert (rating.score, rating.agreement) == (None, 100)
    assert "right for 0 of 40 labels, no better than guessing among 4 classes" in rating.why


def test_one_class_for_all_images_is_replaced_by_correlation():
    logits = noise(40, 4) + torch.tensor([100.0, 0, 0, 0])
    after = noise(40, 4, seed=1) + torch.tensor([100.0, 0, 0, 0])  # another model, and the same class
    for labels in (None, torch.zeros(40, dtype=torch.long)):
        rating = rate(logits, after, labels)
        assert rating.agreement < 40
        assert rating.agreement_measure == "correlation of y with the float model's"
        assert "all 40 scored images the same class" in rating.why


def test_what_a_tail_reads_is_compared_where_all_classes_are_the_same():
    logits, after = (noise(40, 4, seed=s) + torch.tensor([100.0, 0, 0, 0]) for s in (0, 1))
    meter = Classify(0, 4).meter(None)
    meter.add([logits], [after])
    read = replace(closeness(logits, after), inside=True)
    rows = OutputScore("z", False, 70.0, (60.0, 80.0), are_rows=True)
    rating = meter.rating([read, rows])
    assert (rating.agreement, rating.interval) == (read.agreement, read.interval)
    assert meter.rating([replace(read, agreement=None), rows]).agreement == 70
    assert Tensors((True,)).meter(None).rating([read, rows]).agreement == 70  # which the files do not give


def test_outputs_that_do_not_vary_are_refused():
    same = torch.full((8, 4), 2.0)
    with pytest.raises(BadImages, match="the same numbers for every scored image"):
        rate(same, same, None)
    with pytest.raises(BadImages, match="give other images: --score DIR"):
        Tensors((True,)).meter(None).rating([closeness(same, same)])


def test_several_outputs_are_rated_by_the_worst():
    x = noise(40, 2)
    scores = [closeness(x, x), closeness(x, noise(40, 2, seed=1)), closeness(torch.zeros(40, 1), noise(40, 1))]
    rating = Tensors((True,) * 3).meter(None).rating(scores)
    assert (rating.agreement, rating.interval) == (scores[1].agreement, scores[1].interval)
