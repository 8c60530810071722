"""Whole models with drawn weights: the graph computes what the model computes, and every product in it was found.

Oracles: the model itself, torch's flop counter, the calls that an image reaches, closed forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from capture.nets import assert_same_function, count, graph_of, images, randomize
from fewbit.capture import capture
from fewbit.core.graph import Graph
from fewbit.load import load_model

SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_SWIN = {"img_size": 32, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}


@dataclass(frozen=True)
class Case:
    """A model, the side of its images, how many attention layers it has."""

    build: Callable[[], nn.Module]
    side: int
    attention: int = 0


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def hf_dinov2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, image_size=32, patch_size=8))


CASES = {
    "vit": Case(timm_model("vit_tiny_patch16_224", **SMALL_VIT), 32, attention=2),
    "deit": Case(timm_model("deit_tiny_distilled_patch16_224", **SMALL_VIT), 32, attention=2),
    "deit3": Case(timm_model("deit3_small_patch16_224", **SMALL_VIT), 32, attention=2),
    "swin": Case(timm_model("swin_tiny_patch4_window7_224", **SMALL_SWIN), 32, attention=4),
    "swinv2": Case(timm_model("swinv2_tiny_window8_256", **SMALL_SWIN), 32, attention=4),
    "beit": Case(timm_model("beit_base_patch16_224", **SMALL_VIT), 32, attention=2),
    "eva02": Case(timm_model("eva02_tiny_patch14_224", **SMALL_VIT), 32, attention=2),
    "clip": Case(timm_model("vit_base_patch32_clip_224", **SMALL_VIT), 32, attention=2),
    "mobilevit": Case(timm_model("mobilevit_xxs"), 64, attention=9),
    "efficientformer": Case(timm_model("efficientformer_l1", depths=(1, 1, 1, 2), num_vit=1), 224, attention=1),
    "levit": Case(timm_model("levit_128s", depth=(1, 1, 1)), 224, attention=5),
    "efficientnet_lite0": Case(timm_model("efficientnet_lite0"), 64),
    "resnet18": Case(timm_model("resnet18"), 64),
    "mobilenetv2": Case(timm_model("mobilenetv2_050"), 64),
    "torchvision vit": Case(lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 32, attention=2),
    "hf vit": Case(hf_vit, 32, attention=2),
    "hf dinov2": Case(hf_dinov2, 32, attention=2),
}
BIG = {
    "vit_small": Case(timm_model("vit_small_patch16_224"), 224, attention=12),
    "swin_tiny": Case(timm_model("swin_tiny_patch4_window7_224"), 224, attention=12),
    "swinv2_tiny": Case(timm_model("swinv2_tiny_window8_256"), 256, attention=12),
    "levit_128s": Case(timm_model("levit_128s"), 224, attention=11),
    "efficientformer_l1": Case(timm_model("efficientformer_l1"), 224, attention=1),
    "resnet50": Case(timm_model("resnet50"), 224),
}
ALL = [pytest.param(name, marks=pytest.mark.slow if name in (*BIG, "mobilevit", "levit") else ()) for name in (*CASES, *BIG)]


@cache
def captured(name: str) -> tuple[nn.Module, Graph]:
    """The model and its graph, which computes the same: graph_of has compared them for batches of 1 and 3."""
    case = {**CASES, **BIG}[name]
    torch.manual_seed(0)
    size = (3, case.side, case.side)
    net = randomize(case.build(), size)
    return net, graph_of(net, size)


class LayerCalls(TorchFunctionMode):
    """The input and the flops of every call of linear, conv1d and conv2d, by a module or a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, int]] = []

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.linear, F.conv1d, F.conv2d):
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            self.inputs.append((x.clone(), 2 * x.numel() // weight.shape[1] * weight.numel()))
        elif function is F.multi_head_attention_forward:  # the calls in it are not seen: one before, one after
            self.inputs += [(args[0].clone(), 0)] * 2
        return function(*args, **(kwargs or {}))


def layer_calls(net: nn.Module, size: tuple[int, int, int]) -> list[tuple[bool, int]]:
    """For each call of linear and convolution: whether its input depends on the image, and its flops (of a linear)."""
    one, other = LayerCalls(), LayerCalls()
    for calls, seed in ((one, 1), (other, 2)):
        with torch.no_grad(), calls:
            net(images(size, 1, seed))
    return [(not torch.equal(a, b), flops) for (a, flops), (b, _) in zip(one.inputs, other.inputs, strict=True)]


@pytest.fixture(autouse=True)
def no_fast_path():
    """nn.MultiheadAttention in eval mode is one call without a name, which no oracle here can look into."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ALL)
def test_the_graph_computes_what_the_model_computes(name):
    captured(name)


@pytest.mark.parametrize("name", ALL)
def test_every_linear_and_convolution_is_an_op_with_input_and_weight(name):
    net, graph = captured(name)
    found = [op for op in graph.ops if op.kind in ("linear", "conv", "depthwise")]
    joint = sum(op.name.endswith(".qkv.3") for op in found)  # one layer has become three ops
    assert len(found) - 2 * joint == sum(sees for sees, _ in layer_calls(net, graph.input_shape)) > 0
    sites = {site.name: site for site in graph.sites}
    for op in found:
        assert {"input", "weight"} <= set(op.operands)
        assert sites[op.operands["weight"]].role == "weight"
        assert (op.name, "input") in sites[op.operands["input"]].readers


@pytest.mark.parametrize("name", ALL)
def test_every_attention_layer_has_its_four_operands(name):
    _, graph = captured(name)
    products = [op for op in graph.ops if op.kind == "matmul"]
    expected = {**CASES, **BIG}[name].attention
    assert sum(set(op.operands) == {"query", "key"} for op in products) == expected
    assert sum(set(op.operands) == {"probs", "value"} for op in products) == expected
    assert len(products) == 2 * expected
    assert sum(site.role == "probs" for site in graph.sites) == expected


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_that_a_rewrite_should_have_opened_or_dropped(name):
    _, graph = captured(name)
    left = set(count(graph.module))
    assert not left & {"scaled_dot_product_attention", "batch_norm", "dropout", "dropout_", "einsum", "addmm", "view"}
    assert not {op for op in left if op.endswith("_")}


@pytest.mark.parametrize("name", ALL)
def test_names_are_unique_and_readers_are_ops(name):
    net, graph = captured(name)
    for names in ([op.name for op in graph.ops], [site.name for site in graph.sites]):
        assert len(names) == len(set(names))
    ops = {op.name: op for op in graph.ops}
    for site in graph.sites:
        assert all(ops[op].operands[operand] == site.name for op, operand in site.readers)
    modules = {name for name, _ in net.named_modules()}
    made = re.compile(
        r"\.?\b(qk|pv|add|avgpool|concat|maxpool)?(\.\d+)?$"
    )  # what is added to the path of the module that does it
    assert all(op.name in modules or made.sub("", op.name, count=1) in modules for op in graph.ops)


@pytest.mark.parametrize("name", ALL)
def test_macs_are_half_of_what_torch_counts_as_flops(name):
    net, graph = captured(name)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(images(graph.input_shape, 1))
    # SwinV2 computes its position bias by two linears from a table of offsets: a constant in the graph
    constant = sum(flops for sees, flops in layer_calls(net, graph.input_shape) if not sees)
    assert 2 * graph.macs == counter.get_total_flops() - constant


def test_macs_of_a_vit_are_the_closed_form():
    _, graph = captured("vit")
    tokens, width, heads, depth = (32 // 8) ** 2 + 1, 48, 3, 2
    patches = (tokens - 1) * width * 3 * 8 * 8
    attention = 2 * heads * tokens * tokens * (width // heads)
    block = tokens * width * (3 * width + width + 2 * 4 * width) + attention
    assert graph.macs == patches + depth * block + width * 10


def test_macs_of_a_resnet_are_the_closed_form():
    _, graph = captured("resnet18")
    total, side = (64 // 2) ** 2 * 64 * 3 * 7 * 7, 64 // 4
    for stage, width in enumerate((64, 128, 256, 512)):
        before = width if stage == 0 else width // 2
        side = side if stage == 0 else side // 2
        first = width * before * 9 + (width * before if stage else 0)  # and the 1 x 1 shortcut
        total += side**2 * (first + 3 * width * width * 9)
    assert graph.macs == total + 512 * 10


def test_sites_of_a_vit_are_named_after_its_modules():
    _, graph = captured("vit")
    names = {site.name for site in graph.sites}
    assert {"patch_embed.proj:weight", "blocks.1.attn.qkv.1:input", "blocks.0.mlp.fc2:weight", "head:weight"} <= names
    assert {"blocks.0.attn.qk:query", "blocks.0.attn.qk:key"} <= names
    assert {"blocks.1.attn.pv:probs", "blocks.1.attn.pv:value"} <= names


def test_an_exported_file_gives_the_same_graph_as_the_module(tmp_path: Path):
    net, expected = captured("vit")
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (images((3, 32, 32), 2),), dynamic_shapes=shapes), tmp_path / "net.pt2")
    graph = capture(load_model(str(tmp_path / "net.pt2")))
    assert graph.ops == expected.ops
    assert graph.sites == expected.sites
    x = images((3, 32, 32), 3)
    assert torch.equal(graph.module(x), expected.module(x))


@pytest.mark.parametrize("name", ["vit", "resnet18", pytest.param("levit", marks=pytest.mark.slow)])
def test_a_program_decomposed_to_core_aten_has_the_same_products(name, tmp_path: Path):
    net, expected = captured(name)
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(net, (images(expected.input_shape, 2),), dynamic_shapes=shapes)
    graph = capture(load_model(program.run_decompositions()))
    assert graph.macs == expected.macs  # a joint linear layer may be one op here and three there
    assert not {"_native_batch_norm_legit_no_training", "convolution", "addmm"} & set(count(graph.module))
    assert [s.role for s in graph.sites].count("probs") == [s.role for s in expected.sites].count("probs")
    assert_same_function(net, graph.module, expected.input_shape)


def test_the_model_itself_is_left_as_it_was():
    net = randomize(CASES["resnet18"].build(), (3, 64, 64)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    capture(load_model(net, overrides={"input_size": (3, 64, 64)}))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
