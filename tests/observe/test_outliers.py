"""Outliers of activations. Oracles: planted channels and tokens, and the same counted in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit.capture import capture
from fewbit.load import load_model
from fewbit.observe.outliers import outliers, standing_out


class Planted(nn.Module):
    """16 tokens of width 8 in front of a linear layer; `size` multiplies them, (16, 8)."""

    def __init__(self, size: Tensor) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.register_buffer("size", size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.patch(x).flatten(2).transpose(1, 2) * self.size).mean(1)


def found(size: Tensor, images: int = 6, net: type[Planted] = Planted):
    torch.manual_seed(0)
    graph = capture(load_model(net(size).eval(), overrides={"input_size": (3, 8, 8)}))
    x = torch.randn(images, 3, 8, 8)
    name = graph.op("head").operands["input"]
    whole = next(row for row in outliers(graph, [x]) if row.site == name)
    parts = next(row for row in outliers(graph, x.split(4)) if row.site == name)
    assert whole == parts  # the order of the batches does not matter
    return whole


class TokensFirst(Planted):
    """The same net, its linear layer reading (tokens, batch, c) as in torch.nn.MultiheadAttention."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) * self.size
        return self.head(tokens.transpose(0, 1)).mean(0)


def test_nothing_stands_out_where_nothing_was_planted():
    row = found(torch.ones(16, 8))
    assert not row.any
    assert (row.channels, row.positions, row.rest_of_channels, row.rest_of_tokens) == ((), (), 1.0, 1.0)


def test_a_planted_channel_is_found():
    size = torch.ones(16, 8)
    size[:, 5] = 100.0
    row = found(size)
    assert row.channels == (5,)
    assert row.channel_ratio > 10
    assert row.rest_of_channels < 0.1
    assert row.token_share == 0  # every token has it


def test_planted_tokens_are_found():
    size = torch.ones(16, 8)
    size[3], size[11] = 100.0, 300.0
    row = found(size)
    assert set(row.positions) == {3, 11}
    assert row.token_share == pytest.approx(2 / 16)
    assert row.rest_of_tokens < 0.1
    assert row.channels == ()  # every channel has them


def test_tokens_that_come_before_the_batch_are_tokens():
    size = torch.ones(16, 8)
    size[3], size[11] = 100.0, 300.0
    row = found(size, net=TokensFirst)
    assert (set(row.positions), row.token_share) == ({3, 11}, 2 / 16)


def test_ratios_are_those_of_numpy():
    rng = np.random.default_rng(0)
    channels, tokens = rng.exponential(size=40).astype(np.float32), rng.exponential(size=(3, 50)).astype(np.float32) ** 3
    row = standing_out("a:input", torch.from_numpy(channels), torch.from_numpy(tokens), 4.0)
    middle = np.sort(channels)[(len(channels) - 1) // 2]  # torch's median is the lower of two
    far = channels > 4 * middle
    assert row.channels == tuple(np.argsort(-channels)[: min(far.sum(), 8)])
    assert row.channel_ratio == pytest.approx(channels.max() / middle)
    assert row.rest_of_channels == pytest.approx(channels[~far].max() / channels.max())
    middle = np.sort(tokens.ravel())[(tokens.size - 1) // 2]
    over = tokens > 4 * middle
    assert row.token_share == pytest.approx(over.mean())
    assert row.rest_of_tokens == pytest.approx(tokens[~over].max() / tokens.max())


def test_all_are_counted_where_few_are_listed():
    channels, tokens = torch.ones(100), torch.ones(2, 60)
    channels[3:40], tokens[0, 5:17] = torch.arange(50.0, 87), torch.arange(50.0, 62)
    tokens[1, 5] = 50.0
    row = standing_out("a:input", channels, tokens, 10.0)
    assert (row.channel_count, row.position_count) == (37, 12)
    assert row.channels == tuple(range(39, 31, -1))
    assert (row.positions[0], len(row.positions)) == (5, 8)
    assert (row.rest_of_channels, row.rest_of_tokens) == (pytest.approx(1 / 86), pytest.approx(1 / 61))


def test_maps_have_channels_and_no_tokens(conv_net):
    rows = outliers(conv_net.graph, [conv_net.images[:4]])
    assert {row.site for row in rows} >= {op.operands["input"] for op in conv_net.graph.ops if op.kind == "conv"}
    assert all(row.token_ratio is None for row in rows)
