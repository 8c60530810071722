"""Tiny nets, captured once a session. Shapes in annotations are checked here, and nowhere in use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from torch import Tensor, nn
from torch.nn import functional as F

CHECKED = [
    "fewbit.core.grid",
    "fewbit.observe",
    "fewbit.choose.gptq",
    "fewbit.choose.soft_codes",
    "fewbit.choose.objectives",
    "fewbit.choose.correct",
    "fewbit.execute.samples",
    "fewbit.choose.ranges",
    "fewbit.choose.output_search",
    "fewbit.choose.aciq",
    "fewbit.choose.entropy_range",
    "fewbit.choose.range_method",
    "fewbit.choose.output_scores",
    "fewbit.execute.simulate",
    "fewbit.choose.sensitivity",
]
install_import_hook(CHECKED, "beartype.beartype")  # before the first import of fewbit

from bench.ablations import ABLATIONS  # noqa: E402

from fewbit.capture import capture  # noqa: E402
from fewbit.choose import Context, choose  # noqa: E402
from fewbit.core.graph import Graph  # noqa: E402
from fewbit.core.plan import Plan  # noqa: E402
from fewbit.execute.samples import OpSample, PairSample, op_samples  # noqa: E402
from fewbit.load import load_model  # noqa: E402
from fewbit.observe import Stats, observe  # noqa: E402
from fewbit.realize import float_onnx, realize  # noqa: E402
from fewbit.target import load_target  # noqa: E402
from fewbit.target.load import processor_flags  # noqa: E402
from planning import context_for  # noqa: E402

gc.freeze()  # torch alone is two million objects, and torch.onnx makes the collector look through them again and again
gc.set_threshold(100_000, 50, 50)

settings.register_profile("fewbit", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("fewbit")

SIZE = (3, 8, 8)


class ConvNet(nn.Module):
    """Convolution and relu6, zero padding on two sides, depthwise, a residual addition, pooling, a flat head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.relu(self.depth(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """A convolution into 16 tokens of width 16, one block with two heads, the mean token, a flat head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.Sequential(Block(16, 2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


@pytest.fixture(autouse=True)
def one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start no fresh processes to measure how long a file loads, which tests/verify/test_bench.py tries."""
    if "fresh_processes" not in request.node.keywords:
        monkeypatch.setattr(import_module("fewbit.verify.bench"), "_load", lambda *_: (0.0, 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the files of tests/golden again")


class Mixed(nn.Module):
    """Convolutions of 16 channels and more: a pooling of maxima and a convolution joined, an inverted bottleneck with a
    residual addition, a global pooling, a flat head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.widen, self.depth = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.narrow, self.head = nn.Conv2d(48, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.max_pool2d(x, 3, 1, 1), self.side(x)], 1)
        x = x + self.narrow(F.relu6(self.depth(F.relu6(self.widen(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideVit(nn.Module):
    """One block of width 32 with two heads of 16 on 16 tokens: sizes that every target has kernels for."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 32, 2, 2), nn.Sequential(Block(32, 2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


@dataclass(frozen=True)
class Captured:
    """A module, its graph, images (16, 3, 8, 8) and what was observed on them."""

    module: nn.Module
    graph: Graph
    images: Tensor
    stats: Stats

    def context(self, target: str, name: str = "", **options: object) -> Context:
        """What passes read, everything in integers; 16 rows of each image are sampled."""
        options = {"everything": True, "images": self.images.split(8), "sampled": self.samples, **options}
        return context_for(self.graph, self.stats, load_target(target), name=name, **options)

    def plan(self, target: str, recipe: str = "minmax", **options: object) -> Plan:
        return choose(self.context(target, recipe, **options), ABLATIONS[recipe])

    @cached_property
    def samples(self) -> Mapping[str, OpSample | PairSample]:
        return op_samples(self.graph, self.images.split(8), [op.name for op in self.graph.ops], tokens=16)

    @cached_property
    def rows(self) -> Mapping[str, OpSample]:
        """The samples of ops with a weight."""
        return {name: sample for name, sample in self.samples.items() if isinstance(sample, OpSample)}


@dataclass(frozen=True)
class Realized:
    """A plan and its ONNX file; the float twin where it was asked for."""

    net: Captured
    plan: Plan
    path: Path
    float_path: Path


def captured(net: nn.Module, seed: int = 0) -> Captured:
    """Capture a net whose weights have been drawn, and observe it on 16 images drawn with `seed`."""
    graph = capture(load_model(net.eval(), overrides={"input_size": SIZE}))
    images = torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(seed))
    return Captured(net, graph, images, observe(graph, images.split(8)))


@pytest.fixture(scope="session")
def capture_net() -> Callable[[nn.Module], Captured]:
    return captured


@pytest.fixture(scope="session")
def conv_net() -> Captured:
    torch.manual_seed(0)
    return captured(ConvNet())


@pytest.fixture(scope="session")
def vit() -> Captured:
    torch.manual_seed(0)
    return captured(Vit())


@pytest.fixture(scope="session")
def mixed_net() -> Captured:
    torch.manual_seed(0)
    return captured(Mixed())


@pytest.fixture(scope="session")
def wide_vit() -> Captured:
    torch.manual_seed(0)
    return captured(WideVit())


@pytest.fixture(scope="session")
def ort_target() -> str:
    """The onnxruntime target whose sums are exact on this machine: no VNNI, no 8-bit weights."""
    flags = processor_flags()
    if not flags & {"avx512_vnni", "avx_vnni", "avx2"}:
        pytest.skip("needs an x86 processor with AVX2")
    return "ort-x86-vnni" if flags & {"avx512_vnni", "avx_vnni"} else "ort-x86-avx2"


@pytest.fixture(scope="session")
def widest_weights(ort_target: str) -> int:
    """The bits of weights up to which sums are exact on this machine whatever the codes are."""
    return 8 if ort_target == "ort-x86-vnni" else 7


@pytest.fixture(scope="session")
def openvino_target(ort_target: str) -> str:
    """The same of openvino."""
    return "openvino-x86" if ort_target == "ort-x86-vnni" else "openvino-x86-avx2"


@pytest.fixture(scope="session")
def realized(ort_target: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Realized]:
    """Realize a net on a target (that of the machine where none is given); `options` are those of choose."""

    def build(net: Captured, target: str = ort_target, *, twin: bool = False, **options: object) -> Realized:
        folder = tmp_path_factory.mktemp("run")
        plan, opset = net.plan(target, **options), load_target(target).opset
        kept = load_target(target).weights == "float"
        realize(net.graph, plan, folder / "model.onnx", opset=opset, float_weights=kept)
        if twin:
            float_onnx(net.graph, folder / "float.onnx", opset=opset)
        return Realized(net, plan, folder / "model.onnx", folder / "float.onnx")

    return build


@pytest.fixture(scope="session")
def realized_conv_net(conv_net: Captured, realized: Callable[..., Realized]) -> Realized:
    return realized(conv_net, twin=True)


@pytest.fixture(scope="session")
def realized_vit(vit: Captured, realized: Callable[..., Realized]) -> Realized:
    return realized(vit, twin=True, everything=True)
