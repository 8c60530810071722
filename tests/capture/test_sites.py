"""Names, roles and costs on hand-made modules. Oracles: closed forms, and what torch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from capture.nets import graph_of, kinds, roles
from capture.test_normalize import SIZE, TOKENS, WIDTH, Net, heads, tokens
from fewbit.capture import capture
from fewbit.load import load_model
from fewbit.target import load_target
from fewbit.target.allowed import allowed

EXPERTS = torch.randn(4, 4, 5)

# padding


def padded(pad: nn.Module, **settings: int) -> tuple[str, str]:
    """The op behind the tensor that a convolution behind a padding reads, and behind the padding."""
    net = Net(lambda net, x: net.conv(net.pad(x + 1)), pad=pad, conv=nn.Conv2d(3, 4, 3, **settings))
    graph = graph_of(net)
    read = graph.site(graph.op("conv").operands["input"]).tensor
    nodes = {node.name: node for node in graph.module.graph.nodes}
    return str(nodes[read].target).split(".")[1], nodes[graph.op("conv").node].args[0].name


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(2, 0.0)])
def test_a_padding_with_zeros_is_looked_through(pad):
    assert padded(pad)[0] == "add"


@pytest.mark.parametrize(
    "pad",
    [
        nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.5), nn.CircularPad2d(1), nn.ZeroPad2d(-1),
        nn.ZeroPad2d((1, 1, 1, -1)),
    ],
)  # fmt: skip
def test_any_other_padding_is_what_the_convolution_reads(pad):
    assert padded(pad)[0] in ("pad", "constant_pad_nd", "cat", "index", "copy", "slice_scatter")


# kinds


def test_kinds_of_convolution_follow_groups():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 1, groups=2), nn.ReLU()
    )
    graph = graph_of(net)
    assert [op.kind for op in graph.ops] == ["conv", "depthwise", "conv"]
    assert [op.reduction_size for op in graph.ops] == [27, 9, 3]
    assert [op.macs for op in graph.ops] == [64 * 6 * 27, 36 * 6 * 9, 36 * 6 * 3]


def test_an_addition_of_two_activations_is_an_op_and_any_other_is_not():
    bias = torch.randn(12)
    net = Net(lambda net, x: net.a(tokens(x)) + net.b(tokens(x)) + bias + 3, a=nn.Linear(12, 12), b=nn.Linear(12, 12))
    graph = graph_of(net)
    assert kinds(graph) == {"linear": 2, "add": 1}
    net = Net(lambda net, x: (y := net.a(tokens(x))) + y.mean(2, keepdim=True), a=nn.Linear(12, 12))
    assert kinds(graph_of(net)) == {"linear": 1}  # one of them is spread out: no runtime joins codes of two shapes


def test_an_activation_behind_a_convolution_is_its_output_when_it_alone_reads_it():
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()))
    assert graph.site(graph.op("0").operands["output"]).tensor == "hardtanh"
    net = Net(lambda net, x: (y := net.conv(x)).relu() - y, conv=nn.Conv2d(3, 4, 3))
    graph = graph_of(net)
    assert graph.site(graph.op("conv").operands["output"]).tensor == graph.op("conv").node


def test_pooling_to_one_pixel_is_an_op_and_to_more_is_not():
    assert kinds(graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)))) == {"conv": 1, "avgpool": 1}
    assert kinds(graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2)))) == {"conv": 1}


# roles


def test_roles_of_attention_come_from_the_softmax_whatever_stands_between():
    """A scale, a bias, a mask, a cast of names: the product before the softmax has a query, the one behind it probs."""

    def does(net: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(tokens(x)).unflatten(2, (2, 6)).transpose(1, 2) for part in (net.a, net.b, net.c))
        logits = (q @ k.transpose(-2, -1)) / 6**0.5 + net.bias
        logits = logits.masked_fill(net.mask, -100.0)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ tokens(x).transpose(1, 2)

    parts = {name: nn.Linear(WIDTH, WIDTH) for name in "abc"}
    mask = torch.rand(TOKENS, TOKENS) > 0.8
    graph = graph_of(Net(does, **parts, bias=torch.randn(2, TOKENS, TOKENS), mask=mask))
    found = roles(graph)
    assert [found[role] for role in ("query", "key", "probs", "value", "left", "right")] == [1, 1, 1, 1, 1, 1]
    assert [op.name for op in graph.ops if op.kind == "matmul"] == ["qk", "pv", "matmul"]
    assert graph.op("qk").macs == graph.op("pv").macs == 2 * TOKENS * TOKENS * 6
    assert graph.op("qk").reduction_size == 6
    assert graph.op("pv").reduction_size == TOKENS


def test_products_without_a_softmax_have_a_left_and_a_right():
    graph = graph_of(Net(lambda net, x: heads(x).sigmoid() @ (heads(x).relu().transpose(2, 3) @ heads(x))))
    assert roles(graph) == {"left": 2, "right": 2}


def test_a_tensor_that_three_linears_read_is_one_site_with_three_readers():
    parts = {name: nn.Linear(WIDTH, 6) for name in "abc"}
    graph = graph_of(Net(lambda net, x: torch.cat([part(t) for t in [tokens(x)] for part in net.children()], 2), **parts))
    inputs = [site for site in graph.sites if site.role == "input"]
    assert [site.readers for site in inputs] == [(("a", "input"), ("b", "input"), ("c", "input"))]


def test_sites_have_the_shape_for_one_image_and_weights_their_channel_axis():
    graph = graph_of(Net(lambda net, x: net.fc(tokens(x)), fc=nn.Linear(WIDTH, 7)))
    assert [(s.name, s.shape, s.axis) for s in graph.sites] == [
        ("fc:input", (1, TOKENS, WIDTH), None),
        ("fc:weight", (7, WIDTH), 0),
        ("fc:bias", (7,), 0),
    ]


# names


def test_a_module_that_is_called_twice_gives_two_names_and_never_that_of_another():
    """`a` is called twice and so becomes a.1 and a.2; its own child is called 2."""

    class Twice(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.add_module("2", nn.Linear(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("2")(F.linear(F.linear(x, self.weight), self.weight))

    graph = graph_of(Net(lambda net, x: net.a(tokens(x)), a=Twice()))
    assert [op.name for op in graph.ops] == ["a.1", "a.3", "a.2"]
    assert len({site.name for site in graph.sites}) == len(graph.sites)


def test_a_model_whose_own_module_is_called_inner_keeps_its_names():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 4, 3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return self.inner(x), 3

    assert [op.name for op in graph_of(Outer()).ops] == ["inner.0"]


# notes


@pytest.mark.parametrize(
    ("net", "function", "macs"),
    [
        (
            Net(lambda net, x: net.up(net.conv(x)), up=nn.ConvTranspose2d(4, 6, 2, 2, groups=2)),
            "conv_transpose2d",
            36 * 4 * 3 * 4,
        ),
        (
            Net(lambda net, x: net.conv(x).flatten(2).unsqueeze(2) @ net.w, w=torch.randn(4, 36, 36)),
            "matmul with a constant matrix for each head or expert",
            4 * 36 * 36,
        ),
        (
            Net(lambda net, x: torch.einsum("bec,ecd->bed", net.conv(x).mean(3)[:, :, None, :4].flatten(2), net.w), w=EXPERTS),
            "matmul with a constant matrix for each head or expert",
            4 * 4 * 5,
        ),
        (Net(lambda net, x: net.conv(x).flatten(2) @ net.w, w=torch.randn(36)), "matmul with a constant vector", 4 * 36),
        (
            Net(
                lambda net, x: (
                    F.conv2d(x.flatten(0, 1)[None], x.mean((2, 3)).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1))
                    + net.conv(x).mean()
                )
            ),
            "conv2d with weights that are computed",
            64 * 3 * 3,
        ),
        (Net(lambda net, x: torch.einsum("bchw,bchw->b", x, x) + net.conv(x).mean((1, 2, 3))), "einsum", 3 * 64),
        (Net(lambda net, x: net.vol(net.conv(x).unsqueeze(2)), vol=nn.Conv3d(4, 5, (1, 3, 3))), "conv3d", 5 * 16 * 4 * 9),
        (
            Net(lambda net, x: net.two(x.mean(2), x.amax(2)) + net.conv(x).mean((1, 2, 3))[:, None], two=nn.Bilinear(8, 8, 5)),
            "bilinear",
            3 * 5 * 64,
        ),
        (
            Net(
                lambda net, x: net.lstm(x.mean(2).transpose(1, 2))[0].mean((1, 2))[:, None, None, None] + net.conv(x),
                lstm=nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True),
            ),
            "lstm",
            8 * 2 * 20 * (3 + 5 + 10 + 5),
        ),
        (
            Net(
                lambda net, x: net.gru(x.mean(2).transpose(1, 2))[0].mean((1, 2))[:, None, None, None] + net.conv(x),
                gru=nn.GRU(3, 5, batch_first=True),
            ),
            "gru",
            8 * 15 * (3 + 5),
        ),
        (
            Net(
                lambda net, x: net.bend(x, net.moved(x)), bend=DeformConv2d(3, 5, 3, padding=1), moved=nn.Conv2d(3, 18, 3, 1, 1)
            ),
            "deform_conv2d",
            5 * 64 * 27,
        ),
    ],
)
def test_a_product_that_is_no_op_counts_among_the_whole_work(net, function, macs):
    """Multiply-accumulates in closed form. A target leaves it float and says so with its share of the work."""
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    graph = capture(load_model(net.eval(), overrides={"input_size": SIZE}))
    assert [(other.function, other.macs) for other in graph.float_products] == [(function, macs)]
    assert graph.macs == macs + sum(op.macs for op in graph.ops)
    (fallback,) = (f for f in allowed(graph, load_target("ort-x86-vnni")).fallbacks if function in f.why)
    assert fallback.macs_share == macs / graph.macs


def learnt_queries(net: Net, x: torch.Tensor) -> torch.Tensor:
    asked = net.first(F.scaled_dot_product_attention(net.queries, net.queries, net.queries))  # of no image
    return net.second(asked @ net.conv(x).flatten(2))


def test_what_no_input_reaches_is_no_op_and_no_work():
    """As the attention of a detector's learned queries to each other: the same for every image."""
    parts = {"queries": torch.randn(1, 4, 4), "first": nn.Linear(4, 4), "second": nn.Linear(36, 5), "conv": nn.Conv2d(3, 4, 3)}
    graph = graph_of(Net(learnt_queries, **parts))
    assert [op.name for op in graph.ops] == ["conv", "matmul", "second"]
    assert not graph.float_products
    assert graph.macs == 4 * 36 * 27 + 4 * 36 * 4 + 4 * 36 * 5
