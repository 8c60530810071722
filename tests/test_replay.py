"""Oracles: the modules themselves, run on the sampled rows; unfold; attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from fewbit.capture import capture
from fewbit.errors import BadImages
from fewbit.execute.samples import OpSample, op_samples
from fewbit.load import load_model
from fewbit.load.sizes import Sizes


def everything(net, tokens: int = 10_000, batch: int = 8, seed: int = 0):
    found = op_samples(net.graph, net.images.split(batch), [op.name for op in net.graph.ops], tokens, seed)
    return {name: sample for name, sample in found.items() if isinstance(sample, OpSample)}


def test_with_all_rows_an_op_gives_the_output_of_its_module(vit):
    block = vit.module.blocks[0]
    with torch.no_grad():
        tokens = vit.module.patch(vit.images).flatten(2).transpose(1, 2)
        expected = block.norm1(tokens)
    found = everything(vit)
    assert torch.allclose(found["blocks.0.qkv.1"].rows, expected, atol=1e-5)
    assert found["blocks.0.qkv.1"].rows is found["blocks.0.qkv.3"].rows
    assert found["head"].rows.shape == (16, 1, 16)
    assert set(found) == {op.name for op in vit.graph.ops if op.kind == "linear"}


def test_patches_of_a_convolution_are_those_of_unfold(conv_net):
    found = everything(conv_net)
    assert set(found) == {"stem", "depth", "a", "b", "head"}
    patches = F.unfold(conv_net.images, 3, padding=1).transpose(1, 2)
    assert torch.equal(found["stem"].rows, patches)


def test_wide_patches_are_kept_of_fewer_places(capture_net, monkeypatch):
    torch.manual_seed(0)
    net = capture_net(Strided())
    monkeypatch.setattr("fewbit.execute.rows.WIDE", 9)  # half of a patch of 3 channels, 3 x 2
    assert everything(net, tokens=6)["conv"].rows.shape[1] == 3
    assert everything(net, tokens=1)["conv"].rows.shape[1] == 1


class Strided(nn.Module):
    """Everything that moves a patch: stride, padding of its own on each side, dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_stride_padding_and_dilation_of_a_convolution_are_kept(capture_net):
    torch.manual_seed(0)
    net = capture_net(Strided())
    patches = F.unfold(net.images, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)).transpose(1, 2)
    assert torch.equal(everything(net)["conv"].rows, patches)


class Growing(nn.Module):
    """Two convolutions whose zeros grow with the image: an operator of its own before one, the other's own argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        high, wide = x.shape[2:]
        own = F.conv2d(x, self.weight, None, 1, [high // 8, wide // 6])
        return self.a(F.pad(x, (wide // 4, wide // 6, high // 8, high // 4))).mean((2, 3)) + own.mean((2, 3))


def test_zeros_that_are_computed_from_the_size_of_the_image_are_in_the_patches():
    torch.manual_seed(0)
    free, images = {0: Dim("batch"), 2: Dim("h", min=8, max=64), 3: Dim("w", min=8, max=64)}, torch.randn(6, 3, 16, 12)
    program = torch.export.export(Growing().eval(), (torch.zeros(2, 3, 16, 12),), dynamic_shapes=(free,))
    graph = capture(load_model(program, overrides={"input_size": (3, 16, 12)}, sizes=Sizes.ONE))
    found = op_samples(graph, images.split(4), [op.name for op in graph.ops], 10_000)
    (one, two) = (sample.rows for sample in found.values())
    assert torch.equal(one, F.unfold(images, 3, padding=2).transpose(1, 2))
    assert torch.equal(two, F.unfold(F.pad(images, (3, 2, 2, 4)), 3).transpose(1, 2))


@pytest.mark.parametrize("net", ["vit", "conv_net"])
def test_samples_are_the_same_whatever_the_batches_are(request, net):
    net = request.getfixturevalue(net)
    a, b = everything(net, 5, 8), everything(net, 5, 3)
    for name, sample in a.items():
        assert sample.rows.shape[:2] in {(16, 5), (16, 1)}
        assert torch.allclose(sample.rows, b[name].rows, atol=1e-6)
        if sample.attention is not None:
            assert torch.allclose(sample.attention.x, b[name].attention.x, atol=1e-6)


def test_another_seed_draws_other_rows(vit):
    a, b = (everything(vit, 5, seed=seed)["patch"].rows for seed in (0, 1))
    assert not torch.equal(a, b)


def test_scores_of_queries_and_keys_are_the_logits_of_attention(vit):
    found = everything(vit)
    ranked = {name for name, sample in found.items() if sample.attention is not None}
    assert ranked == {"blocks.0.qkv.1", "blocks.0.qkv.2"}
    linear = vit.module.blocks[0].qkv
    with torch.no_grad():
        x = found["blocks.0.qkv.1"].attention.x
        q, k, _ = linear(x).view(4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        expected = (q @ k.transpose(-2, -1) / 8**0.5).flatten(0, 2)
        for i, part in enumerate(("blocks.0.qkv.1", "blocks.0.qkv.2")):
            w, b = linear.weight.chunk(3)[i], linear.bias.chunk(3)[i]
            output = F.linear(x, w, b)
            scores = found[part].attention.scores(torch.stack([output, output]))
            assert scores.shape == (2, 4 * 2 * 16, 16)
            assert torch.allclose(scores[1], expected, atol=1e-5)


def test_without_images_there_are_no_samples(vit):
    with pytest.raises(BadImages, match="no calibration images"):
        op_samples(vit.graph, [], ["head"])
