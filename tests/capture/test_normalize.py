"""Each rewrite on a hand-made module. Oracles: the module itself, and torch's own functions on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from capture.nets import count, graph_of, images, opened, randomize
from fewbit.capture import normalize
from fewbit.core.fx import argument, calls, constant
from fewbit.realize import float_onnx

SIZE = (3, 8, 8)
TOKENS, WIDTH = 16, 12


class Net(nn.Module):
    """Parts, and what is done with them to the images."""

    def __init__(self, does: Callable[[Net, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.does = does
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def tokens(x: Tensor) -> Tensor:
    """(b, 3, 8, 8) images as (b, 16, 12) tokens."""
    return x.reshape(-1, WIDTH, TOKENS).transpose(1, 2)


def heads(x: Tensor, number: int = 2) -> Tensor:
    """(b, 16, 12) tokens as (b, heads, 16, 12 / heads)."""
    return tokens(x).reshape(-1, TOKENS, number, WIDTH // number).transpose(1, 2)


def same(net: nn.Module, atol: float = 1e-5) -> GraphModule:
    """The normalized graph of a net, which gives what the net gives for batches of 1 and 3."""
    randomize(net, SIZE)
    module = normalize(opened(net))
    for batch in (1, 3):
        x = images(SIZE, batch)
        torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=atol)
    return module


def weights(module: GraphModule) -> list[Tensor]:
    """The weight of each linear and convolution, in order."""
    products = calls(module.graph, torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    return [constant(module, node.args[1]) for node in products]


# attention

seeded = torch.Generator().manual_seed(3)
SEEN = torch.rand(TOKENS, TOKENS, generator=seeded) > 0.4
SEEN.fill_diagonal_(True)
BIAS = torch.randn(2, TOKENS, TOKENS, generator=seeded)


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v), id="plain"),
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, net.seen), id="bool mask"),
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, net.bias), id="float mask"),
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), id="scale"),
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), id="causal"),
        pytest.param(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, k.mean() > q[:, :, :, :1]), id="mask of x"),
        pytest.param(
            lambda net, q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True), id="shared keys"
        ),
    ],
)
def test_attention_is_opened_into_matmul_softmax_matmul(attend):
    def does(net: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(x.roll(i, -1)) for i in range(3))
        if attend.__code__.co_consts and "mean" in attend.__code__.co_names:
            k = k + 4  # a query that sees no key is another test
        return attend(net, q, k, v)

    module = same(Net(does, seen=SEEN, bias=BIAS))
    found = count(module)
    assert found["scaled_dot_product_attention"] == 0
    assert found["matmul"] == 2
    assert found["softmax"] == 1


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_query_that_a_mask_leaves_no_key_has_zeros(real, all_of_them, tmp_path):
    """As torch gives, where a softmax of -inf alone gives NaN; in onnxruntime too."""
    seen = SEEN.clone()
    seen[: TOKENS if all_of_them else 1] = False
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~seen, float("-inf")) if real else seen
    net = Net(lambda net, x: heads(x) + F.scaled_dot_product_attention(heads(x), heads(x), heads(x), net.seen), seen=mask)
    module = same(net)
    assert count(module)["scaled_dot_product_attention"] == 0
    alike_in_onnxruntime(net, tmp_path)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {  # of heads (b, 2, 16, 6), which leave some queries no key
    "of keys": lambda x: (x.mean((1, 3)) > 0.3)[:, None, None].expand(-1, 1, TOKENS, TOKENS),
    "of queries": lambda x: x[..., :1] > 0,
    "of both": lambda x: x @ x.transpose(2, 3) > 3,
    "numbers": lambda x: torch.zeros(()).masked_fill(x @ x.transpose(2, 3) < 3, float("-inf")),
    "where": lambda x: torch.where(x @ x.transpose(2, 3) < 3, torch.tensor(float("-inf")), 0.5),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_query_that_a_mask_of_the_image_leaves_no_key_has_zeros(mask, tmp_path):
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, MASKS[mask](x))

    empty = (attend(heads(images(SIZE, 3))) == 0).all(-1)
    assert empty.any()
    assert not empty.all()
    net = Net(lambda net, x: heads(x) + attend(heads(x)))
    assert count(same(net))["scaled_dot_product_attention"] == 0
    alike_in_onnxruntime(net, tmp_path)


def test_a_mask_of_the_image_that_is_finite_is_added_and_no_more():
    net = Net(lambda net, x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), heads(x) @ heads(x).transpose(2, 3)))
    assert not {"masked_fill", "any", "gt"} & set(count(same(net)))


def alike_in_onnxruntime(net: nn.Module, folder: Path) -> None:
    x, path = torch.randn(1, *SIZE), folder / "float.onnx"
    float_onnx(graph_of(Mixed(net)), path, opset=18)
    session = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], Mixed(net)(x), atol=1e-5)


class Mixed(nn.Module):
    """A convolution in front of a net, as a graph needs a layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.net = nn.Conv2d(3, 3, 1), net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.conv(x))


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda x: torch.ones(TOKENS, TOKENS, dtype=torch.bool), id="constant"),
        pytest.param(lambda x: torch.zeros(TOKENS, TOKENS), id="zeros"),
        pytest.param(lambda x: (torch.arange(x.shape[0]) >= 0)[:, None, None, None].expand(-1, 1, 1, TOKENS), id="counter"),
        pytest.param(lambda x: torch.arange(TOKENS).expand(x.shape[0], 1, 1, TOKENS) >= 0, id="token counter"),
    ],
)
def test_a_mask_that_hides_nothing_is_dropped(mask):
    net = Net(lambda net, x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), mask(x)))
    found = count(same(net))
    assert found["softmax"] == 1
    assert not {"masked_fill", "add", "logical_not", "ge", "arange"} & set(found)


def test_a_counter_that_starts_below_the_bound_still_masks():
    net = Net(
        lambda net, x: F.scaled_dot_product_attention(
            heads(x), heads(x), heads(x), torch.arange(TOKENS).expand(x.shape[0], 1, 1, TOKENS) >= 3
        )
    )
    assert count(same(net))["softmax"] == 1


# batch norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_behind_a_convolution_goes_into_its_weights(bias, affine):
    net = Net(lambda net, x: net.bn(net.conv(x)), conv=nn.Conv2d(3, 6, 3, bias=bias), bn=nn.BatchNorm2d(6, affine=affine))
    assert count(same(net)) == {"conv2d": 1}


SETTINGS = [  # kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, on 8 x 7
    (3, 2, 1, True, True, None),
    (3, 2, 0, True, True, None),
    (3, 2, 1, True, False, None),
    (3, 2, 1, False, True, None),
    (2, 2, 0, False, True, None),
    ((3, 2), (2, 3), (1, 0), True, True, None),
    ((2, 4), (3, 3), (1, 2), True, True, None),
    (2, 3, 1, True, True, None),
    (3, 2, 1, True, True, 7),
    (3, 3, 0, False, True, 5),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_average_is_written_so_that_every_runtime_divides_alike(setting):
    """Values against torch. A window divides by what is in it, or the runtimes' integer kernels count what hangs over."""
    module = same(Net(lambda net, x: F.avg_pool2d(x[:, :, :, :7], *setting)))
    node = next(iter(calls(module.graph, torch.ops.aten.avg_pool2d.default)))
    ceil, counted, *divisor = node.args[4:]
    assert not divisor
    assert not (ceil and counted)
    if setting[3:] in ((False, True, None), (True, False, None)):  # nothing to fix
        assert count(module).keys() == {"slice", "avg_pool2d"}


CHANNELS = 6
PRODUCTS = {
    "convolution": lambda: nn.Conv2d(3, CHANNELS, 3, bias=False),
    "depthwise": lambda: nn.Conv2d(3, CHANNELS, 3, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(3, CHANNELS, 3, 2, 1, groups=3),
    "linear": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, CHANNELS), nn.Unflatten(2, (CHANNELS, 1))),
}
ARITHMETIC = {  # y and the four tensors of a batch norm, each (6, 1, 1)
    "factor and summand": lambda y, w, b, m, v: y * (w / (v + 1e-5).sqrt()) + (b - m * w / (v + 1e-5).sqrt()),
    "constants first": lambda y, w, b, m, v: b + w * y,
    "as it is defined": lambda y, w, b, m, v: (y - m) / torch.sqrt(v + 1e-5) * w + b,
    "subtracted from": lambda y, w, b, m, v: b - y * w,
    "negated": lambda y, w, b, m, v: -(y * w),
    "views": lambda y, w, b, m, v: y * w.flatten().view(1, -1, 1, 1) + b.flatten()[None, :, None, None],
    "spread over the batch": lambda y, w, b, m, v: y * w.expand_as(y) + b.expand(y.shape[0], -1, -1, -1),
    "addcmul": lambda y, w, b, m, v: torch.addcmul(b, y, w, value=2),
    "alpha": lambda y, w, b, m, v: torch.sub(y, b, alpha=3),
    "in place": lambda y, w, b, m, v: y.mul_(w).add_(b),
}


@pytest.mark.parametrize("form", ARITHMETIC)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_batch_norm_written_as_arithmetic_goes_into_the_product(product, form):
    draws = [torch.rand(CHANNELS, 1, 1, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(4)]
    net = Net(lambda net, x: ARITHMETIC[form](net.product(x), *draws).relu(), product=PRODUCTS[product]())
    if product == "linear":  # its channels are dimension 2
        net.does = lambda net, x: ARITHMETIC[form](net.product(x).transpose(1, 2), *draws).relu()
    found = count(same(net))
    number = {"neg"} if product == "linear" else set()  # one number for all channels stays behind a linear
    assert not set(found) & ({"mul", "div", "add", "sub", "rsub", "neg", "addcmul", "expand"} - number)
    assert sum(found[name] for name in ("conv2d", "conv_transpose2d", "linear")) == 1


@pytest.mark.parametrize(
    "does",
    [
        pytest.param(lambda y: y * torch.linspace(1, 2, y.shape[-1]), id="columns"),
        pytest.param(lambda y: torch.ones(6, 1, 1) / (y.abs() + 1), id="divided by it"),
        pytest.param(lambda y: (z := y * torch.full((6, 1, 1), 2.0)) + z.relu() + y, id="read twice"),
    ],
)
def test_arithmetic_that_is_not_of_channels_alone_stays(does):
    found = count(same(Net(lambda net, x: does(net.conv(x)), conv=nn.Conv2d(3, 6, 3))))
    assert set(found) & {"mul", "div"}


def test_one_number_for_all_channels_goes_into_a_convolution_and_stays_behind_a_linear():
    assert count(same(Net(lambda net, x: 1 - (2 * net.conv(x) + 0.5) / 3, conv=nn.Conv2d(3, 6, 3)))) == {"conv2d": 1}
    assert count(same(Net(lambda net, x: net.fc(tokens(x)) * 0.5, fc=nn.Linear(12, 4))))["mul"] == 1


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (2, 5)])
@pytest.mark.parametrize("words", [("same", 1), ("same", 2), ("valid", 1)])
def test_padding_given_as_a_word_becomes_numbers(words, size):
    """torch's own convolution is the oracle; what is more on one side stands before it."""
    conv = nn.Conv2d(3, 6, size, padding=words[0], dilation=words[1])
    module = same(Net(lambda net, x: net.conv(x), conv=conv))
    node = next(iter(calls(module.graph, torch.ops.aten.conv2d.default)))
    total = [words[1] * (k - 1) * (words[0] == "same") for k in size]
    assert argument(node, 4, "padding", [0, 0]) == [t // 2 for t in total]
    assert count(module)["pad"] == any(t % 2 for t in total)


def test_padding_given_as_a_word_becomes_numbers_in_one_dimension_too():
    net = Net(lambda net, x: net.conv(x.flatten(2)), conv=nn.Conv1d(3, 6, 4, padding="same", groups=3))
    assert count(same(net))["conv1d"] == 1


def test_batch_norm_behind_a_grouped_one_dimensional_convolution_goes_into_its_weights():
    net = Net(lambda net, x: net.bn(net.conv(x.flatten(2))), conv=nn.Conv1d(3, 6, 5, groups=3), bn=nn.BatchNorm1d(6))
    found = count(same(net))
    assert found["conv1d"] == 1
    assert not {"batch_norm", "mul", "add"} & set(found)


LINEAR_NORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "flat": lambda net, x: net.bn(net.fc(tokens(x).mean(1))),
    "tokens flattened and back": lambda net, x: net.bn((y := net.fc(tokens(x))).flatten(0, 1)).reshape_as(y),
    "channels moved": lambda net, x: net.bn(net.fc(tokens(x)).transpose(1, 2)),
    "channels moved and unflattened": lambda net, x: net.bn(net.fc(tokens(x)).permute(0, 2, 1).unflatten(2, (4, 4)).flatten(2)),
}


@pytest.mark.parametrize("place", LINEAR_NORMS)
def test_batch_norm_behind_a_linear_goes_into_its_weights(place):
    net = Net(LINEAR_NORMS[place], fc=nn.Linear(WIDTH, 6, bias=False), bn=nn.BatchNorm1d(6))
    found = count(same(net))
    assert found["linear"] == 1
    assert not {"batch_norm", "mul", "add", "reshape_as"} & set(found)


UNFOLDABLE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "alone": lambda net, x: net.bn(x.flatten(2)),
    "read twice": lambda net, x: net.bn(y := net.conv(x)) + y.relu(),
    "a view read twice": lambda net, x: net.bn(y := net.conv(x).flatten(2)) + y.relu(),
    "a step between": lambda net, x: net.bn(net.conv(x).relu()),
    "tokens as channels": lambda net, x: net.bn(net.fc(x.reshape(-1, 3, 64))),
    "channels merged": lambda net, x: net.bn(net.conv(x).reshape(-1, 3, 108)),
}


@pytest.mark.parametrize("place", UNFOLDABLE)
def test_batch_norm_elsewhere_becomes_a_multiplication_and_an_addition(place):
    channels = nn.Conv2d(3, 9, 3)
    norms = {"read twice": nn.BatchNorm2d(9), "a step between": nn.BatchNorm2d(9), "a view read twice": nn.BatchNorm1d(9)}
    norm = norms.get(place, nn.BatchNorm1d(3))
    found = count(same(Net(UNFOLDABLE[place], conv=channels, fc=nn.Linear(64, 3), bn=norm)))
    assert found["batch_norm"] == 0
    assert found["mul"] == 1
    assert found["add"] == (2 if "read twice" in place else 1)


@pytest.mark.parametrize("kept", [False, True])
def test_normalization_over_the_batch_itself_is_left_alone(kept):
    def does(net: Net, x: Tensor) -> Tensor:
        return F.batch_norm(net.conv(x), *((net.mean, net.var) if kept else (None, None)), training=True)

    net = Net(does, conv=nn.Conv2d(3, 4, 3), mean=torch.zeros(4), var=torch.ones(4))
    assert count(normalize(opened(net)))["batch_norm"] == 1


def test_weights_that_two_convolutions_share_are_folded_for_one_of_them_only():
    net = Net(lambda net, x: net.bn(net.conv(x)) + net.conv(x.flip(-1)), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    first, second = weights(same(net))
    assert not torch.equal(first, second)


# channel scales


CHANNEL_SCALES: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda net, x: net.fc(tokens(x)) * net.gamma, (6,)),
    "scale first": (lambda net, x: net.gamma * net.fc(tokens(x)), (6,)),
    "leading ones": (lambda net, x: net.fc(tokens(x)) * net.gamma, (1, 1, 6)),
    "convolution": (lambda net, x: net.conv(x) * net.gamma, (6, 1, 1)),
    "convolution with a batch": (lambda net, x: net.conv(x) * net.gamma.view(1, -1, 1, 1), (6,)),
    "in place": (lambda net, x: net.fc(tokens(x)).mul_(net.gamma), (6,)),
    "image as tokens": (lambda net, x: net.conv(x).flatten(2).transpose(1, 2) * net.gamma, (6,)),
}


@pytest.mark.parametrize("place", CHANNEL_SCALES)
def test_a_scale_per_output_channel_goes_into_the_weights(place):
    does, shape = CHANNEL_SCALES[place]
    found = count(same(Net(does, fc=nn.Linear(WIDTH, 6), conv=nn.Conv2d(3, 6, 3), gamma=torch.rand(shape) + 0.5)))
    assert found["mul"] == 0


OTHER_SCALES: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[int, ...]]] = {
    "per token": (lambda net, x: net.fc(tokens(x)) * net.gamma, (TOKENS, 1)),
    "per column": (lambda net, x: net.conv(x) * net.gamma, (6,)),
    "per token and channel": (lambda net, x: net.fc(tokens(x)) * net.gamma, (TOKENS, TOKENS)),
    "read twice": (lambda net, x: (y := net.fc(tokens(x))) * net.gamma + y.relu(), (TOKENS,)),
    "one number": (lambda net, x: net.fc(tokens(x)) * net.gamma, (1,)),
    "per row, of as many as channels": (lambda net, x: net.conv(x).unflatten(1, (2, 3)) * net.gamma, (6, 1)),
    "behind a step": (lambda net, x: net.fc(tokens(x)).relu() * net.gamma, (TOKENS,)),
}


@pytest.mark.parametrize("place", OTHER_SCALES)
def test_any_other_scale_stays(place):
    """The linear has as many channels as there are tokens, the convolution as many as columns: sizes prove nothing."""
    does, shape = OTHER_SCALES[place]
    parts = {"fc": nn.Linear(WIDTH, TOKENS), "conv": nn.Conv2d(3, 6, 3), "gamma": torch.rand(shape) + 0.5}
    assert count(same(Net(does, **parts)))["mul"] == 1


def test_scales_that_follow_each_other_are_all_folded():
    """Convolution, batch norm, LayerScale: EfficientFormer's."""
    net = Net(
        lambda net, x: x.mean(1, keepdim=True) + F.pad(net.bn(net.conv(x)) * net.gamma, (1, 1, 1, 1)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        gamma=torch.rand(6, 1, 1) + 0.5,
    )
    found = count(same(net))
    assert found["mul"] == 0
    assert found["add"] == 1


def test_a_product_of_a_constant_and_turned_rows_is_what_it_was():
    """Its channels are the rows of the constant: an ONNX Gemm with transA, and the Transpose behind it."""
    left, shift = torch.randn(3, 5), torch.randn(5, 1)
    net = Net(lambda net, x: (F.linear(net.left.t(), x.mean((2, 3))) + net.shift).t(), left=left, shift=shift)
    same(net)


def test_folding_leaves_the_tensors_of_the_module_alone():
    net = Net(lambda net, x: net.bn(net.conv(x)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    before = {k: v.clone() for k, v in randomize(net, SIZE).state_dict().items()}
    normalize(opened(net))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_dropout_is_gone_and_a_residual_addition_stays():
    net = Net(lambda net, x: x + net.drop(net.conv(x)), conv=nn.Conv2d(3, 3, 3, padding=1), drop=nn.Dropout(0.5))
    assert count(graph_of(randomize(net, SIZE)).module) == {"conv2d": 1, "add": 1}
