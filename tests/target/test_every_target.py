"""Every target by small nets: a legal plan, a file, its codes. Oracles: the rules that runtimes publish, the float file's
bytes, onnxruntime's codes, and the files of tests/golden (`pytest --rewrite-golden` writes them again)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fewbit.cli.answers import fail_on_wrong
from fewbit.errors import FewbitFailed
from fewbit.recipes import RECIPES
from fewbit.run import Run, quantize
from fewbit.stages.times import elsewhere
from fewbit.target import load_target, target_names
from fewbit.target.allowed import allowed
from fewbit.verify.compare import compare
from planning import plan_for

GOLDEN = Path(__file__).parent.parent / "golden"
NETS = ("mixed_net", "wide_vit")
AS_WRITTEN = ("tensorrt", "ort-arm64", "arm-int7", "npu-int16", "ort-x86-w4")
LIKE_OTHERS = ("openvino-x86-avx2", "openvino-x86-w4", "ort-x86-avx2", "ort-x86-block")  # other processors and widths
TWICE = {("wide_vit", name) for name in ("npu-int16", "float", "arm-int7", "tensorrt")}  # of each there is a smaller net
pytestmark = pytest.mark.filterwarnings("ignore")


class File:
    """A realized file, by who makes and who reads each value."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(str(path)).graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.maker = {name: node for node in self.graph.node for name in node.output}

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type in kinds]

    def is_dequantized(self, name: str) -> bool:
        return name in self.maker and self.maker[name].op_type == "DequantizeLinear"

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def text(self) -> str:
        """One node a line; values are numbered in order, constants given by type and shape."""
        numbers = {value.name: value.name for value in self.graph.input}
        lines = []
        for node in self.graph.node:
            read = [self._constant(name) if name in self.constants else numbers.get(name, "-") for name in node.input]
            axis = "".join(f" {a.name}={a.i}" for a in node.attribute if a.name in ("axis", "block_size"))
            for name in node.output:
                numbers[name] = name if name.endswith(".codes") else f"%{len(numbers)}"
            lines.append(f"{', '.join(numbers[name] for name in node.output)} = {node.op_type}{axis}({', '.join(read)})")
        return "\n".join(lines) + "\n"

    def _constant(self, name: str) -> str:
        found = self.constants[name]
        zero = " 0" if np.issubdtype(found.dtype, np.integer) and not found.any() else ""
        return f"{found.dtype}[{','.join(map(str, found.shape))}]{zero}"


@pytest.fixture(scope="module")
def made(realized, request):
    """The file of a net on a target, once for this module."""
    cache = {}

    def build(net: str, target: str):
        if (net, target) not in cache:
            cache[net, target] = realized(request.getfixturevalue(net), target, twin=target == "float")
        return cache[net, target]

    return build


@pytest.mark.parametrize(
    ("net", "target"),
    [
        pytest.param(net, name, marks=pytest.mark.slow if name in LIKE_OTHERS or (net, name) in TWICE else ())
        for net, name in itertools.product(NETS, target_names())
        if not name.endswith(("-channel", "-wide"))
    ],
)
def test_the_plan_is_legal_and_the_file_computes_its_codes(made, net, target):
    run, rules = made(net, target), load_target(target)
    answer = allowed(run.net.graph, rules, everything=True)
    assert set(run.plan.integer_ops) == set(answer.integer_ops)
    for name, choice in run.plan.choices.items():
        assert choice.grid in answer.sites[name].grids
    for group in answer.shared:
        assert len({(run.plan.choices[n].qparams.scale.item(), run.plan.choices[n].qparams.zero.item()) for n in group}) == 1
    if target != "float":
        assert not compare(run.net.graph, run.plan, run.path, [run.net.images], runtime=None).wrong


@pytest.mark.parametrize("net", NETS)
def test_under_float_the_graph_comes_back_unchanged(made, net):
    run = made(net, "float")
    assert not run.plan.fallbacks
    assert not File(run.path).nodes("QuantizeLinear", "DequantizeLinear")
    assert run.path.read_bytes() == run.float_path.read_bytes()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("target", AS_WRITTEN)
def test_the_file_is_the_golden_one(made, net, target, request):
    path, found = GOLDEN / f"{net}.{target}.txt", File(made(net, target).path).text()
    if request.config.getoption("--rewrite-golden"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize("net", NETS)
def test_rules_of_tensorrt(made, net):
    file = File(made(net, "tensorrt").path)
    quantizers, dequantizers = file.nodes("QuantizeLinear"), file.nodes("DequantizeLinear")
    assert quantizers
    for node in quantizers + dequantizers:  # symmetric, int8, positive steps
        zero, step = file.constants[node.input[2]], file.constants[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (step > 0).all()
    assert all(file.maker[node.input[0]].op_type == "QuantizeLinear" for node in dequantizers)  # both, on weights too
    held = [node for node in quantizers if node.input[0] in file.constants]
    assert all(file.constants[node.input[0]].dtype == np.float32 for node in held)
    for node in quantizers:  # only inputs of products and of residual additions
        (read,) = file.readers(node.output[0])
        assert {reader.op_type for reader in file.readers(read.output[0])} <= {"Conv", "MatMul", "Add"}
    for conv in file.nodes("Conv"):  # per channel on axis 0, no integer bias, 16 channels or none of it
        inner, outer = (file.is_dequantized(name) for name in conv.input[:2])
        assert inner == outer
        assert not any(file.is_dequantized(name) for name in conv.input[2:])
        if outer:
            weight = file.maker[conv.input[1]]
            assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
            shape = file.constants[file.maker[weight.input[0]].input[0]].shape
            assert shape[0] >= 16
            assert shape[1] >= 16 or shape[1] == 1
    for node in file.nodes("Add"):  # a residual's inputs agree; a bias is float
        steps = {
            float(file.constants[file.maker[name].input[1]])
            for name in node.input
            if file.is_dequantized(name) and not file.constants[file.maker[name].input[1]].ndim
        }
        both = [file.is_dequantized(name) for name in node.input]
        assert both in ([True, True], [False, False])
        assert len(steps) == any(both)
    for node in file.nodes("MatMul"):
        assert len({file.is_dequantized(name) for name in node.input}) == 1
    assert not [n for n in file.nodes("Softmax", "Concat", "MaxPool", "GlobalAveragePool") if file.is_dequantized(n.input[0])]


def test_tensorrt_gets_both_products_of_attention_and_no_small_product(made):
    run = made("wide_vit", "tensorrt")
    assert {"blocks.0.qk", "blocks.0.pv"} <= set(run.plan.integer_ops)
    refused = {fallback.site: fallback.why for fallback in run.plan.fallbacks}
    assert refused["head"] == "linear on tensorrt: outputs is 4, the kernel needs at least 16" or "rows" in refused["head"]
    assert made("mixed_net", "tensorrt").plan.fallbacks[0].why == "conv on tensorrt: inputs is 3, the kernel needs at least 16"


@pytest.mark.parametrize("net", NETS)
def test_rules_of_onnxruntime_on_arm(made, net):
    file = File(made(net, "ort-arm64").path)
    for node in file.nodes("QuantizeLinear"):
        assert file.constants[node.input[2]].dtype == np.int8
    for node in file.nodes("DequantizeLinear"):
        if node.input[0] in file.constants and file.constants[node.input[0]].dtype == np.int8:
            assert np.abs(file.constants[node.input[0]].astype(int)).max() == 127
            assert not file.constants[node.input[2]].any()
    for conv in file.nodes("Conv"):  # DQ(x), DQ(w), DQ(b) with the product of both steps, one Q behind it
        assert all(file.is_dequantized(name) for name in conv.input)
        x, w, b = (file.constants[file.maker[name].input[1]] for name in conv.input)
        np.testing.assert_allclose(b, x * w, rtol=1e-6)
        assert file.constants[file.maker[conv.input[2]].input[0]].dtype == np.int32
        after = file.readers(conv.output[0])
        assert [n.op_type for n in after] in (["QuantizeLinear"], ["Relu"], ["Clip"])
    for node in file.nodes("Softmax"):
        (write,) = file.readers(node.output[0])
        assert (float(file.constants[write.input[1]]), int(file.constants[write.input[2]])) == (2**-8, -128)


@pytest.mark.parametrize("net", NETS)
def test_steps_that_the_accelerator_shares_are_one(made, net):
    file = File(made(net, "npu-int16").path)

    def step(name: str) -> float:
        return float(file.constants[file.maker[name].input[1]])

    for node in file.nodes("Concat", "Add"):
        if all(file.is_dequantized(name) for name in node.input):
            assert len({step(name) for name in node.input}) == 1
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        assert not file.constants[node.input[2]].any()
    if net == "mixed_net":
        assert len(file.nodes("Concat")) == 1
        assert all(file.is_dequantized(name) for name in file.nodes("Concat")[0].input)


def test_no_source_names_a_target():
    source = Path(__file__).parents[2] / "src" / "fewbit"
    named = {
        (path.relative_to(source).as_posix(), name)
        for path, name in itertools.product(source.rglob("*.py"), set(target_names()) - {"float", "tensorrt"})
        if f'"{name}"' in path.read_text() or f"'{name}'" in path.read_text()
    }
    assert not named  # "tensorrt" is the name of a runtime as well


@pytest.mark.slow
def test_a_run_for_a_target_that_is_not_here_says_who_stood_in(mixed_net, tmp_path):
    result = quantize(mixed_net.module, mixed_net.images, target="tensorrt", input_size=(3, 8, 8), seconds=0.01)
    stood_in = [fallback for fallback in result.plan.fallbacks if fallback.requested == "tensorrt"]
    assert [fallback.actual for fallback in stood_in] == ["onnxruntime"]
    assert not result.checks.wrong
    assert not Run.open(result.export(tmp_path / "run")).verify().on


@pytest.mark.parametrize("flags", [frozenset(), pytest.param(frozenset({"avx2"}), marks=pytest.mark.slow)])
def test_a_run_for_a_processor_that_is_not_this_one_says_so(flags, mixed_net, monkeypatch):
    monkeypatch.setattr("fewbit.stages.times.processor_flags", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    options = {"input_size": (3, 8, 8), "seconds": 0.01}
    result = quantize(mixed_net.module, mixed_net.images, target="ort-x86-avx2", **options)
    said = [fallback.requested for fallback in result.plan.fallbacks if fallback.kind == "machine"]
    assert said == ([] if flags else ["x86_64 with avx2"])
    with pytest.raises(FewbitFailed) as failed:
        fail_on_wrong({"problems": ["3 codes differ, first at stem:output"]}, result.report)
    assert ("ort-x86-avx2 needs x86_64 with avx2" in str(failed.value)) == (not flags)


@pytest.mark.parametrize(
    ("name", "machine", "flags", "says"),
    [
        (
            "arm-int7",
            "x86_64",
            {"avx2", "avx512_vnni"},
            "onnxruntime computed the file in the kernels of another processor, {for}",
        ),
        ("arm-int7", "x86_64", {"avx2"}, "onnxruntime computed the file in the kernels of another processor, {for}"),
        ("ort-arm64", "x86_64", {"avx_vnni"}, "onnxruntime computed the file in the kernels of another processor, {for}"),
        ("ort-arm64", "x86_64", {"avx2"}, "{for}; they add two products in 16 bits, which those of {first} may saturate"),
        (
            "npu-int16",
            "x86_64",
            {"avx2", "avx512_vnni"},
            "other cannot run here: onnxruntime computed the file as written, {for}",
        ),
        ("tensorrt", "x86_64", {"avx2"}, "{for}; they add two products in 16 bits, which those of {first} may saturate"),
        ("ort-x86-vnni", "aarch64", set(), "onnxruntime computed the file in the kernels of another processor, {for}"),
        ("ort-x86-vnni", "riscv64", set(), "{for}; how they add products is not known, as no target of fewbit is for them"),
        ("ort-x86-w4", "aarch64", set(), "onnxruntime computed the file in the kernels of another processor, {for}"),
        ("openvino-x86", "x86_64", {"avx2"}, "{for}; they add two products in 16 bits, which those of {first} may saturate"),
        ("openvino-x86", "x86_64", {"avx2", "avx_vnni"}, None),
    ],
)
def test_what_another_processor_may_do_to_a_plan_is_what_its_codes_allow(name, machine, flags, says, mixed_net, monkeypatch):
    """Oracle: products counted here. 8 by 8 bits, 2 * 255 * 127 = 64,770, leave 16 bits; 7 by 7, 2 * 191 * 63 = 24,066, do not;
    VNNI and ARM add every product in 32 bits.
    """
    monkeypatch.setattr("fewbit.stages.times.processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr("platform.machine", lambda: machine)
    target = load_target(name)
    plan = plan_for(mixed_net.graph, mixed_net.stats, target, RECIPES["minmax"])
    found = elsewhere(mixed_net.graph, plan, target)
    if says is None:
        assert found == ()
        return
    (fallback,) = found
    assert fallback.macs_share == 1.0  # all of the work
    first = next(op.name for op in mixed_net.graph.ops if op.name in plan.integer_ops and op.reduction_size)
    assert fallback.why.endswith(says.replace("{for}", "for codes and accuracy").replace("{first}", first))
