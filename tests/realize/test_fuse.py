"""Fused forms against the standard nodes that they replace, both in onnxruntime."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from fewbit.capture import capture
from fewbit.choose import Bits
from fewbit.core.graph import Graph
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.realize import float_onnx, realize
from fewbit.realize.fuse import FUSIONS, fuse
from fewbit.recipes import recipe_named
from fewbit.runtimes import RUNTIMES, OnnxRuntime
from fewbit.target import load_target
from fewbit.verify import compare
from planning import plan_for

BOTH = ("matmul_bias", "multi_head_attention")
EARLY = ("quantize_before_reshape", "clip_before_quantize")


class Attention(nn.Module):
    """Four heads of 16 on 64 tokens; `form` is where the scale stands, or what keeps the attention from being one kernel."""

    def __init__(self, form: str = "query") -> None:
        super().__init__()
        self.form = form
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 192), nn.Linear(64, 8)
        self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (y.reshape(-1, 64, 4, 16).transpose(1, 2) for y in self._parts(x))
        if self.form == "flat":  # heads and images in one dimension
            q, k, v = (y.reshape(-1, 64, 16) for y in (q, k, v))
            y = ((q @ k.transpose(1, 2)).softmax(-1) @ v).reshape(-1, 4, 64, 16)
            return self.proj(y.transpose(1, 2).reshape(-1, 64, 64)).mean(1)
        if self.form in ("query", "parts", "shared"):
            scores = (q * 0.25) @ k.transpose(-2, -1)
        elif self.form == "both":
            scores = (q * 0.5) @ (k * 1.5).transpose(-2, -1)
        elif self.form == "scores":
            scores = (q @ k.transpose(-2, -1)) * 0.5
        elif self.form == "masked":
            scores = q @ k.transpose(-2, -1) + torch.ones(64, 64).tril().log()
        elif self.form == "pooled":
            return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).mean(2).flatten(1))
        else:
            scores = q @ k.transpose(-2, -1)
        if self.form == "shared":  # values are read by another as well
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 64, 64)
            return self.proj(y + v.transpose(1, 2).reshape(-1, 64, 64)).mean(1)
        y = scores.softmax(-1) @ (v * 2.0 if self.form == "values" else v)
        return self.proj(y.transpose(1, 2).reshape(-1, 64, 64)).mean(1)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts) if self.form == "parts" else self.qkv(x).chunk(3, -1)


FIVE = pytest.param(5, marks=pytest.mark.slow)


def captured(form: str) -> Graph:
    torch.manual_seed(0)
    return capture(load_model(Attention(form).eval(), overrides={"input_size": (3, 32, 32)}))


MORE_FORMS = (("query", 1), ("plain", 1), ("pooled", 0), ("values", 0))


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize(
    ("form", "fused"),
    [
        ("both", 1),
        ("scores", 1),
        ("masked", 0),
        ("flat", 0),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_FORMS),
    ],
)
def test_attention_in_one_kernel_answers_as_its_nodes_do(tmp_path: Path, form: str, fused: int) -> None:
    float_onnx(captured(form), tmp_path / "nodes.onnx", opset=20)
    model = ir.load(tmp_path / "nodes.onnx")
    fuse(model, ("multi_head_attention",))
    ir.save(model, tmp_path / "fused.onnx")
    found = kinds(tmp_path / "fused.onnx")
    assert (found["MultiHeadAttention"], found["Softmax"]) == (fused, 1 - fused)
    x = 3 * np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    nodes, one = (OnnxRuntime(tmp_path / f"{name}.onnx", threads=1).run(x)["logits"] for name in ("nodes", "fused"))
    np.testing.assert_allclose(one, nodes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, FIVE])
def test_codes_of_a_fused_file_are_those_of_the_simulation(tmp_path: Path, widest_weights: int, bits: int) -> None:
    graph, images = captured("query"), torch.randn(8, 3, 32, 32)
    target = load_target("ort-x86-vnni")
    options = {"bits": Bits(min(bits, widest_weights), bits), "keep_float": ("qk", "pv")}
    plan = plan_for(graph, observe(graph, [images]), target, recipe_named("minmax"), **options)
    realize(graph, plan, tmp_path / "model.onnx", opset=20, fuse=BOTH)
    found = kinds(tmp_path / "model.onnx")
    assert found["MultiHeadAttention"] == 1
    assert found["MatMulIntegerToFloat"] >= 2  # the joint layer of queries, keys and values, and the projection
    checks = compare(graph, plan, tmp_path / "model.onnx", [images])
    sizes = {site: math.prod(graph.site(site).shape[1:]) for site, choice in plan.choices.items() if choice.codes is None}
    for rows in (checks.off, checks.on):
        assert {row.site: row.compared for row in rows} == {site: len(images) * size for site, size in sizes.items()}
        assert sum(row.wrong for row in rows) == 0


@pytest.mark.parametrize("bits", [8, FIVE])
def test_three_products_as_one_give_the_same_numbers(tmp_path: Path, widest_weights: int, bits: int) -> None:
    graph, images = captured("parts"), torch.randn(8, 3, 32, 32)
    given = load_target("ort-x86-vnni"), recipe_named("minmax")
    plan = plan_for(graph, observe(graph, [images]), *given, bits=Bits(min(bits, widest_weights), bits))
    for name, forms in (("three", BOTH), ("one", (*BOTH, "joint_qkv"))):
        realize(graph, plan, tmp_path / f"{name}.onnx", opset=20, fuse=forms)
    three, one = (kinds(tmp_path / f"{name}.onnx")["MatMulIntegerToFloat"] for name in ("three", "one"))
    assert one == three - 2
    assert sum(row.wrong for row in compare(graph, plan, tmp_path / "one.onnx", [images]).off) == 0
    a, b = (OnnxRuntime(tmp_path / f"{name}.onnx", threads=1).run(images.numpy())["logits"] for name in ("three", "one"))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("form", "bits"),
    [pytest.param("parts", 8, marks=pytest.mark.slow), pytest.param("parts", 5, marks=pytest.mark.slow), ("query", 8)],
)
def test_layers_inside_the_kernel_of_their_attention_give_the_same_numbers(
    tmp_path: Path, widest_weights: int, form: str, bits: int
) -> None:
    graph, images = captured(form), torch.randn(8, 3, 32, 32)
    given = load_target("ort-x86-vnni"), recipe_named("minmax")
    plan = plan_for(graph, observe(graph, [images]), *given, bits=Bits(min(bits, widest_weights), bits))
    forms = (*BOTH, "joint_qkv")
    for name, more in (("two", ()), ("one", ("qattention",))):
        realize(graph, plan, tmp_path / f"{name}.onnx", opset=20, fuse=(*forms, *more))
    found = kinds(tmp_path / "one.onnx")
    assert (found["QAttention"], found["MultiHeadAttention"], found["Split"]) == (1, 0, 0)
    checks = compare(graph, plan, tmp_path / "one.onnx", [images])
    assert sum(row.wrong for row in (*checks.off, *checks.on)) == 0
    assert checks.kernels["found"] == checks.kernels["expected"]
    two, one = (OnnxRuntime(tmp_path / f"{name}.onnx", threads=1).run(images.numpy())["logits"] for name in ("two", "one"))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)  # sums in another order: a code on a boundary may differ


@pytest.mark.parametrize("form", ["scores", *(pytest.param(form, marks=pytest.mark.slow) for form in ("plain", "shared"))])
def test_an_attention_that_the_kernel_does_not_know_keeps_its_own(tmp_path: Path, widest_weights: int, form: str) -> None:
    graph, images = captured(form), torch.randn(4, 3, 32, 32)
    target, recipe = load_target("ort-x86-vnni"), recipe_named("minmax")
    plan = plan_for(graph, observe(graph, [images]), target, recipe, bits=Bits(widest_weights, 8))
    realize(graph, plan, tmp_path / "model.onnx", opset=20, fuse=target.fuse)
    found = kinds(tmp_path / "model.onnx")
    assert (found["QAttention"], found["MultiHeadAttention"]) == (0, 1)
    assert sum(row.wrong for row in compare(graph, plan, tmp_path / "model.onnx", [images]).off) == 0


def test_a_bias_of_another_shape_or_of_the_images_stays_an_addition(tmp_path: Path, widest_weights: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.table = nn.Parameter(torch.randn(3, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return (self.b(self.a(x) + self.table) + x).mean((1, 2))

    torch.manual_seed(0)
    graph = capture(load_model(Net().eval(), overrides={"input_size": (3, 32, 32)}))
    images = torch.randn(4, 3, 32, 32)
    for bits in dict.fromkeys((8, widest_weights)):  # the file of 8 bits has no additions that unpack
        given = load_target("ort-x86-vnni"), recipe_named("minmax")
        plan = plan_for(graph, observe(graph, [images]), *given, bits=Bits(bits, 8))
        realize(graph, plan, tmp_path / "model.onnx", opset=20, fuse=("matmul_bias",))
        found = kinds(tmp_path / "model.onnx")
        assert found["MatMulIntegerToFloat"] == 2
        assert bits < 8 or found["Add"] == 2
    assert sum(row.wrong for row in compare(graph, plan, tmp_path / "model.onnx", [images]).off) == 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 5])
def test_codes_made_early_and_cut_as_numbers_are_the_same(tmp_path: Path, widest_weights: int, bits: int) -> None:
    graph, images = captured("parts"), torch.randn(4, 3, 32, 32)
    target, recipe = load_target("openvino-x86"), recipe_named("minmax")
    plan = plan_for(graph, observe(graph, [images]), target, recipe, bits=Bits(min(bits, widest_weights), bits))
    sites = [f"{name}.codes" for name, choice in plan.choices.items() if choice.codes is None]
    found = {}
    for name, forms in (("late", ()), ("early", EARLY[:1]), ("numbers", EARLY)):
        realize(graph, plan, tmp_path / f"{name}.onnx", opset=20, fuse=forms)
        found[name] = OnnxRuntime(tmp_path / f"{name}.onnx", optimise=False, outputs=sites).run(images.numpy())
        assert kinds(tmp_path / f"{name}.onnx") == kinds(tmp_path / "late.onnx")
    assert found["early"]["proj:input.codes"].shape == (4, 64, 64)
    for form, key in itertools.product(("early", "numbers"), (*sites, "logits")):
        np.testing.assert_array_equal(found[form][key], found["late"][key])
    nodes = list(ir.load(tmp_path / "numbers.onnx").graph)
    quantizers = [node for node in nodes if node.op_type == "QuantizeLinear"]
    quantizer = next(node for node in quantizers if node.name == "proj:input.QuantizeLinear")
    before = quantizer.inputs[0].producer()
    assert (before if bits == 8 else before.inputs[0].producer()).op_type == "MatMul"
    assert bits == 8 or all(node.inputs[0].producer().op_type == "Clip" for node in quantizers)
    assert sum(row.wrong for row in compare(graph, plan, tmp_path / "numbers.onnx", [images], runtime=None).off) == 0


class Stacked(nn.Module):
    """Two linear layers side by side, one behind the other along `axis`, and one that reads both."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.parts, self.head = nn.ModuleList(nn.Linear(12, 8) for _ in range(2)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.stack([part(x.flatten(1)).tanh() for part in self.parts], self.axis)
        rows = self.head(parts.unsqueeze(1).transpose(1, 2).squeeze(2))
        return rows if self.axis else rows.transpose(0, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_openvino_takes_a_product_of_what_was_stacked(tmp_path: Path, axis: int) -> None:
    graph, images = capture(load_model(Stacked(axis), overrides={"input_size": (3, 2, 2)})), torch.randn(4, 3, 2, 2)
    target = load_target("openvino-x86")
    plan = plan_for(graph, observe(graph, [images]), target, recipe_named("minmax"))
    realize(graph, plan, tmp_path / "model.onnx", **target.file_format)
    checks = compare(graph, plan, tmp_path / "model.onnx", [images], runtime="openvino")
    assert "head:input" in plan.choices
    assert (list(checks.wrong), [one for one in checks.outputs if one.wrong]) == ([], [])


def test_every_fused_operator_that_a_target_may_ask_for_is_there() -> None:
    assert sorted(FUSIONS) == sorted(name for runtime in RUNTIMES.values() for name in runtime.fusions)


@pytest.mark.parametrize("zeros", [0, 3])
def test_zero_points_of_weights_are_left_out_only_where_they_are_zero(tmp_path: Path, zeros: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-60, 60, (32, 16), dtype=np.int8)
    given = {
        "step": np.float32(0.05), "middle": np.uint8(128), "weight": weight,
        "steps": rng.uniform(0.01, 0.02, 16).astype(np.float32), "zeros": np.full(16, zeros, np.int8),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["images", "step", "middle"], ["codes"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "step", "middle"], ["read"]),
        onnx.helper.make_node("DequantizeLinear", ["weight", "steps", "zeros"], ["real"], axis=1),
        onnx.helper.make_node("MatMul", ["read", "real"], ["logits"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["batch", width]) for n, width in (("images", 32), ("logits", 16))]
    graph = onnx.helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in given.items()]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "nodes.onnx")
    model = ir.load(tmp_path / "nodes.onnx")
    fuse(model, ("matmul_bias",))
    (node,) = [n for n in model.graph if n.op_type == "MatMulIntegerToFloat"]
    assert (node.inputs[5] is None) == (zeros == 0)
    ir.save(model, tmp_path / "fused.onnx")
    x = rng.standard_normal((8, 32)).astype(np.float32)
    codes = np.clip(np.rint(x / given["step"]) + 128, 0, 255)
    expected = ((codes - 128) * given["step"]) @ ((weight.astype(np.float32) - zeros) * given["steps"])
    found = OnnxRuntime(tmp_path / "fused.onnx", threads=1).run(x)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
