"""Oracles: one pass over everything for merges, numpy for moments and quantiles, forward hooks for what a site holds."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbit.capture import capture
from fewbit.errors import BadImages, BadValues
from fewbit.load import load_model
from fewbit.observe import Histogram, Stats, observe, refuse_extremes
from fewbit.observe.stats import HALF

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-1000, 1000, width=32)


def merged(parts: list[torch.Tensor]) -> Histogram:
    whole = Histogram()
    for part in parts:
        whole = whole.merge(Histogram.of(part))
    return whole


def samples(kind: str, n: int = 5000) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return {"gauss": x, "relu": x.relu() * 7, "negative": -x.abs() - 3, "tail": x**5, "tiny": x * 1e-39, "huge": x * 1e37}[kind]


KINDS = ["gauss", "relu", "negative", "tail", "tiny", "huge"]


@given(batches=st.lists(st.lists(st.one_of(numbers, ordinary), max_size=8), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merging_batches_in_any_order_equals_one_pass(batches, seed):
    tensors = [torch.tensor(batch, dtype=torch.float32) for batch in batches]
    whole = Histogram.of(torch.cat(tensors))
    random.Random(seed).shuffle(tensors)
    parts = merged(tensors)
    assert torch.equal(parts.counts, whole.counts)
    assert (parts.exponent, parts.count, parts.low, parts.high) == (whole.exponent, whole.count, whole.low, whole.high)
    size = sum(abs(v) for batch in batches for v in batch)  # float64 sums in another order
    assert parts.total == pytest.approx(whole.total, rel=0, abs=1e-12 * size)
    assert parts.squares == pytest.approx(whole.squares, rel=1e-12)


@given(st.lists(st.lists(numbers, max_size=5), min_size=3, max_size=3))
def test_merging_is_associative(batches):
    a, b, c = (Histogram.of(torch.tensor(batch, dtype=torch.float32)) for batch in batches)
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert torch.equal(left.counts, right.counts)
    assert (left.exponent, left.count) == (right.exponent, right.count)


@given(st.lists(st.one_of(numbers, ordinary), min_size=1, max_size=20))
def test_each_bin_counts_the_elements_between_its_edges(values):
    x = torch.tensor(values, dtype=torch.float32)
    h = Histogram.of(x)
    expected = np.zeros(2 * HALF)
    np.add.at(expected, np.floor(x.double().numpy() / h.width).astype(int) + HALF, 1)
    np.testing.assert_array_equal(h.counts.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_variance_and_extremes_are_those_of_numpy(kind):
    x = samples(kind)
    h, wide = merged(list(x.split(700))), x.double().numpy()
    assert (h.low, h.high, h.count) == (wide.min(), wide.max(), len(wide))
    assert h.mean == pytest.approx(wide.mean(), rel=1e-9)
    assert h.variance == pytest.approx(wide.var(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.25, 0.5, 0.9, 0.9999, 1.0])
def test_a_quantile_is_that_of_numpy_to_the_width_of_a_bin(kind, share):
    x = samples(kind)
    h = Histogram.of(x)
    expected = np.quantile(x.double().numpy(), share, method="inverted_cdf")
    assert abs(h.quantile(share) - expected) <= (0 if share in (0, 1) else h.width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bin_is_at_most_one_part_in_two_thousand_of_the_largest_magnitude(kind):
    x = samples(kind)
    assert x.abs().max() / HALF <= Histogram.of(x).width <= x.abs().max() * 2 / HALF


def test_zeros_are_counted_in_the_bin_of_zero_whatever_they_are_merged_with():
    zeros, ones = Histogram.of(torch.zeros(7)), Histogram.of(torch.ones(3))
    assert (zeros.count, zeros.low, zeros.high, zeros.mean, zeros.quantile(0.5)) == (7, 0, 0, 0, 0)
    both = zeros.merge(ones)
    assert both.counts[HALF] == 7
    assert both.quantile(0.5) <= both.width
    assert both.mean == pytest.approx(0.3)


def test_a_single_element_is_its_own_extremes_mean_and_median():
    h = Histogram.of(torch.tensor([[-2.5]]))
    assert (h.low, h.high, h.mean, h.variance, h.count) == (-2.5, -2.5, -2.5, 0, 1)
    assert h.quantile(0.5) == -2.5


def test_a_histogram_of_nothing_is_neutral():
    nothing, some = Histogram.of(torch.zeros(0, 3)), Histogram.of(torch.tensor([1.0, -2.0]))
    for both in (nothing.merge(some), some.merge(nothing)):
        assert torch.equal(both.counts, some.counts)
        assert (both.exponent, both.low, both.high) == (some.exponent, -2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [1, 7, 128, 100000])
def test_the_drawn_histogram_adds_up_and_covers_the_extremes(kind, bins):
    h = Histogram.of(samples(kind))
    drawn = h.to_json(bins)
    assert sum(drawn["counts"]) == h.count == h.counts.sum()
    assert len(drawn["edges"]) == len(drawn["counts"]) + 1 <= bins + 1
    assert drawn["edges"][0] <= h.low
    assert drawn["edges"][-1] >= h.high


def test_the_drawn_histogram_counts_the_elements_between_its_edges():
    x = samples("gauss")
    drawn = Histogram.of(x).to_json(20)
    expected, _ = np.histogram(x.double().numpy(), drawn["edges"])
    np.testing.assert_array_equal(drawn["counts"], expected)


def test_stats_come_back_from_their_tensors_bit_by_bit():
    stats = Stats({kind: Histogram.of(samples(kind)) for kind in KINDS} | {"zero": Histogram.of(torch.zeros(3))}, 12)
    back = Stats.from_tensors(stats.tensors())
    assert back.images == 12
    assert list(back.sites) == list(stats.sites)
    for name, h in stats.sites.items():
        assert torch.equal(back.sites[name].counts, h.counts)
        assert dataclasses.replace(back.sites[name], counts=h.counts) == h


def test_stats_of_two_runs_merge_site_by_site():
    a, b = samples("gauss"), samples("tail")
    both = Stats({"x": Histogram.of(a), "y": Histogram.of(a)}, 3).merge(Stats({"x": Histogram.of(b)}, 4))
    assert both.images == 7
    assert torch.equal(both.sites["x"].counts, Histogram.of(torch.cat([a, b])).counts)
    assert both.sites["y"].count == len(a)


def stored(stats: Stats) -> int:
    """Bytes of every tensor in the statistics."""
    fields = [getattr(h, f.name) for h in stats.sites.values() for f in dataclasses.fields(h)]
    return sum(v.numel() * v.element_size() for v in fields if isinstance(v, torch.Tensor))


def test_memory_does_not_grow_with_the_number_of_batches(vit):
    few, many = (observe(vit.graph, [vit.images[:2]] * count) for count in (1, 40))
    assert stored(few) == stored(many) == len(few.sites) * 2 * HALF * 8
    assert many.images == 40 * few.images
    assert many.sites["head:input"].count == 40 * few.sites["head:input"].count


def recorded(net, images):
    """What each Linear and Conv2d reads, by the name of its input site."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(f"{name}:input", []).append(args[0]))
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def test_observed_sites_are_what_forward_hooks_record(vit):
    oracle = recorded(vit.module, vit.images)
    assert len(oracle) == 6
    for name, x in oracle.items():
        h = vit.stats.sites[name.replace("qkv:", "qkv.1:")]
        assert h.count == x.size
        # the graph has opened the attention, so float32 rounds elsewhere
        expected = [x.min(), x.max(), x.mean(), x.var()]
        np.testing.assert_allclose([h.low, h.high, h.mean, h.variance], expected, rtol=1e-4, atol=1e-6)
        median = np.quantile(x, 0.5, method="inverted_cdf")
        assert abs(h.quantile(0.5) - median) <= h.width + 1e-5


def test_every_activation_site_is_observed_and_no_weight(vit):
    assert set(vit.stats.sites) == {site.name for site in vit.graph.sites if site.axis is None}
    assert vit.stats.images == 16


def test_only_the_named_sites_are_observed(vit):
    assert list(observe(vit.graph, [vit.images], sites=["head:input"]).sites) == ["head:input"]


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(torch.log(self.first(x)))


def test_the_site_where_nan_first_appears_is_named(capture_net):
    with pytest.raises(BadValues, match=r"^second:input and the model's answers hold NaN or infinite values"):
        capture_net(Root())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_with_nan_or_infinity_names_the_input_site(conv_net, value):
    images = conv_net.images.clone()
    images[3, 1, 2, 0] = value
    with pytest.raises(BadValues, match=r"^stem:input (holds|and the model's answers hold) NaN"):
        observe(conv_net.graph, [images])


class Padded(nn.Module):
    """Padding with minus infinity, which a pooling of maxima takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        x = nn.functional.pad(self.conv(x), (0, 1, 0, 1), value=-math.inf)
        return self.head(nn.functional.max_pool2d(x, 3, 2).mean((2, 3)))


def test_a_site_with_infinities_is_refused_only_where_it_is_quantized():
    graph = capture(load_model(Padded().eval(), overrides={"input_size": (3, 8, 8)}))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    finite = {site.name for site in graph.sites if site.axis is None} - {"maxpool:input"}
    stats = observe(graph, [x[:2], x[2:]], quantized=finite)
    assert stats.sites.keys() == finite
    with pytest.raises(BadValues, match=r"^maxpool:input holds .* Keep it float: --keep-float 'maxpool:input'\.$"):
        observe(graph, [x])


class Two(nn.Module):
    """Two answers, the second NaN where a pixel is large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x), torch.sqrt(9 - x).mean((2, 3))


def test_every_answer_of_a_model_has_to_be_finite():
    graph = capture(load_model(Two().eval(), overrides={"input_size": (3, 8, 8)}))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert observe(graph, [x]).sites.keys() == {site.name for site in graph.sites if site.axis is None}
    with pytest.raises(BadValues, match=r"^the model's answers hold NaN"):
        observe(graph, [x + 9])


def test_no_images_are_bad_images(conv_net):
    with pytest.raises(BadImages, match="no calibration images"):
        observe(conv_net.graph, [])


def test_images_of_another_size_are_bad_images(conv_net):
    with pytest.raises(BadImages, match=r"images are \(3, 9, 8\); the model takes \(3, 8, 8\)"):
        observe(conv_net.graph, [torch.zeros(1, 3, 9, 8)])


def test_of_very_many_extreme_sites_the_first_ones_are_named_and_how_many_there_are():
    """A net whose numbers fade in its depth once gave a message of two pages."""
    for count in (12, 13):
        with pytest.raises(BadValues) as found:
            refuse_extremes({f"layer{i}:output": 1e-20 for i in range(count)})
        said = str(found.value)
        assert said.count("--keep-float") == 12
        assert "--keep-float 'layer11:output'" in said
        assert said.endswith(
            "'layer11:output'." if count == 12 else " 13 sites in all: are the weights those of a trained model?"
        )
