"""The reader against the node tests of the onnx package, which hold the operators' definition as numbers."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fewbit.load import load_model
from fewbit.load.contexts import quiet
from fewbit.load.program import graph_module
from fewbit.onnx_reader.file import OLDEST
from fewbit.onnx_reader.operators import CONTROL, STANDARD
from onnx_reader.cases import array, check, is_taken, node_tests, run
from onnx_reader.test_microsoft import drawn, of_runtime, one_node

DOCS = Path(__file__).parents[2] / "docs" / "onnx.md"
# what a test wants that fewbit has no use for, by a part of its name
LEFT_OUT = {
    "FLOAT8|FLOAT4|INT4|INT2": "a type of 8, 4 or 2 bits",
    "BFLOAT16_to_FLOAT$|cast.*_to_BFLOAT16": "",
    "training": "training",
    "string": "text",
    "float64_to_int64|int64_to_float64": "the bits of a float64, which is computed in float32",
    "col2im_5d": "blocks of three dimensions",
    "lstm_with_peepholes": "weights from the cell to its gates, which torch has not",
    "roialign_mode_max": "the largest sample of a box",
    "resize_downsample_scales_(linear|cubic)_align_corners": "a size that is not a whole number; onnxruntime 1.32 fails it",
}


def reason_to_fail(name: str) -> str:
    return next((reason for part, reason in LEFT_OUT.items() if reason and re.search(part, name)), "")


def test_one_test_of_each_operator_passes() -> None:
    failed, names = {}, set()
    for name, case in node_tests(one_each=True).items():
        if is_taken(case.model):
            names |= {node.op_type for node in case.model.graph.node}
            try:
                check(case)
            except AssertionError as error:
                failed[name] = str(error).strip().splitlines()[0]
    assert {name: text for name, text in failed.items() if not reason_to_fail(name)} == {}
    assert len(names) > 130


POOLS = {
    "max": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max up": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "max uneven": ("MaxPool", {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0], "dilations": [2, 1]}),
    "max same": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "mean": ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "mean counted": ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    "mean up": ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    "mean uneven": ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "mean whole": ("AveragePool", {"kernel_shape": [7, 6]}),
    "lp": ("LpPool", {"kernel_shape": [2, 2], "p": 2, "strides": [2, 1]}),
}

for how, op in itertools.product(("SAME_UPPER", "SAME_LOWER"), ("MaxPool", "AveragePool", "LpPool")):
    for steps in ([1, 1], [2, 1], [3, 2]):
        window = {"kernel_shape": [3, 2], "dilations": [2, 3], "strides": steps, "auto_pad": how}
        POOLS[f"{op} {how} {steps}"] = op, window


@pytest.mark.parametrize("name", POOLS)
def test_a_pooling_computes_what_onnxruntime_does(name: str) -> None:
    op, attributes = POOLS[name]
    images = [drawn(2, 4, 7, 6)]
    model = one_node(op, images, attributes, "", opset=19)
    np.testing.assert_allclose(run(model, images)[2][0], of_runtime(model, images)[0], rtol=1e-4, atol=1e-6)


SLOPES = {  # the image, often as wide as it has channels, and the slopes
    "of the width": ((2, 4, 5, 4), (4,)),
    "of the channels": ((2, 4, 5, 4), (4, 1, 1)),
    "of the channels, with a batch": ((2, 4, 5, 4), (1, 4, 1, 1)),
    "one": ((2, 4, 5, 4), (1,)),
    "of the images": ((4, 4, 5, 4), (4, 1, 1, 1)),
    "of the height": ((2, 4, 4, 5), (4, 1)),
    "of two dimensions": ((2, 4), (4,)),
    "of tokens": ((2, 4, 4), (4,)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_spread_as_onnxruntime_spreads_them(name: str) -> None:
    shape, slopes = SLOPES[name]
    inputs = [drawn(*shape), drawn(*slopes)]
    model = one_node("PRelu", inputs, {}, "")
    np.testing.assert_allclose(run(model, inputs)[2][0], of_runtime(model, inputs)[0], rtol=1e-6)


TRANSPOSED = [
    {"strides": [2, 2], "output_shape": [14, 12]},
    {"strides": [2, 2], "output_shape": [14, 12], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "output_shape": [14, 12], "auto_pad": "SAME_LOWER"},
    {"strides": [2, 2], "output_shape": [13, 11], "output_padding": [1, 1]},
    {"strides": [2, 3], "output_shape": [16, 19]},
    {"strides": [4, 4], "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("attributes", TRANSPOSED, ids=str)
def test_a_transposed_convolution_pads_as_onnxruntime_does(attributes: dict[str, object]) -> None:
    inputs = [drawn(2, 3, 7, 6), drawn(3, 4, 3, 3), drawn(4)]
    model = one_node("ConvTranspose", inputs, attributes, "", opset=17)
    want = of_runtime(model, inputs)[0]
    np.testing.assert_allclose(run(model, inputs)[2][0], want, rtol=1e-4, atol=1e-5)


RULES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric", "tf_half_pixel_for_nn"]
SIZES = {"scales": (0.7, 1.3), "tiny": (0.1, 2.5), "twice": (2.0, 0.6), "whole": (8 / 7, 2.1)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_resize_by_any_scale_computes_what_onnxruntime_does(mode: str, rule: str) -> None:
    """Scales that make no whole size, and places in the middle between two pixels, for every way to round them."""
    images = [drawn(1, 2, 10, 7)]
    ways = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"] if mode == "nearest" else [""]
    for (down, across), way in itertools.product(SIZES.values(), ways):
        attributes = {"mode": mode, "coordinate_transformation_mode": rule} | ({"nearest_mode": way} if way else {})
        node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "resize", **attributes)
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", (1, 2, 10, 7)), ("y", None))
        ]
        scales = numpy_helper.from_array(np.array([1, 1, down, across], dtype=np.float32), "scales")
        graph = helper.make_graph([node], "net", ends[:1], ends[1:], [scales])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        got, want = run(model, images)[2][0], of_runtime(model, images)[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=f"{down} {across} {way}")


@pytest.mark.slow
def test_the_node_tests_pass_and_the_table_says_how_many() -> None:
    passed, total, failed, exported = defaultdict(int), defaultdict(int), {}, {}
    cases = node_tests()
    for name, case in cases.items():
        if not is_taken(case.model):
            continue
        whole = cases.get(re.sub(r"_expanded.*", "", name), case)  # the same test with the operator written out
        ops = {node.op_type for node in whole.model.graph.node}
        op = next(iter(ops)) if len(ops) == 1 else "If" if "If" in ops else ""
        op = op if op in {*STANDARD, *CONTROL} else ""  # one that is not taken, written out
        total[op] += 1
        try:
            check(case)
            passed[op] += 1
            if op not in exported:
                exported[op] = traced(case)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    rows = [row(op, passed[op], total[op]) for op in sorted(total) if op]
    text = "\n".join(["| operator | opsets | tests passed |", "|---|---|---|", *rows])
    print(text)
    assert {name: why for name, why in failed.items() if not reason_to_fail(name)} == {}
    assert {op: why for op, why in exported.items() if why and op not in UNTRACED} == {}
    assert len(rows) >= 120
    assert text in DOCS.read_text(encoding="utf-8")
    assert {*STANDARD, *CONTROL} - set(total) <= WITHOUT_TEST


UNTRACED: dict[str, str] = {}
WITHOUT_TEST = {"SimplifiedLayerNormalization", "GlobalLpPool"}


def row(op: str, passed: int, total: int) -> str:
    first = min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == "")
    return f"| {op} | {max(first, OLDEST)} to {onnx.defs.onnx_opset_version()} | {passed} of {total} |"


def traced(case: object) -> str:
    """Nothing, or what torch.export says of the module of a test."""
    inputs = [array(i) for i in case.data_sets[0][0]]  # type: ignore[attr-defined]
    module, tensors, found = run(case.model, inputs)  # type: ignore[attr-defined]
    if not tensors:
        return ""
    try:
        with quiet(), torch.no_grad():
            again = torch.export.export(module, tuple(tensors)).module()(*tensors)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    for one, other in zip(found, again.values(), strict=True):
        np.testing.assert_allclose(other.numpy(), one, rtol=1e-5, atol=1e-6)
    return ""


assert onnxruntime


@pytest.mark.parametrize("free", [False, True], ids=["fixed size", "any size"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_resize_that_crops_computes_what_onnxruntime_does(mode: str, free: bool, tmp_path: Path) -> None:
    """With a batch that is free, which it leaves as it is."""
    size = ["h", "w"] if free else [8, 8]
    node = helper.make_node(
        "Resize", ["x", "roi", "scales"], ["y"], "crop", mode=mode, coordinate_transformation_mode="tf_crop_and_resize"
    )
    stored = {"roi": [0, 0, 0.1, -0.2, 1, 1, 0.9, 0.7], "scales": [1, 1, 2, 1.5]}
    graph = helper.make_graph(
        [node, helper.make_node("Conv", ["y", "v"], ["z"], "last")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, *size])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 4, None, None])],
        [helper.make_tensor(name, TensorProto.FLOAT, (len(values),), values) for name, values in stored.items()]
        + [numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32), "v")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    loaded = load_model(str(path), overrides={"input_size": (3, 8, 8)})
    x = torch.rand(3, 3, 8, 8)
    want = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(graph_module(loaded.program)(x))[0]
    assert loaded.batch is None
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
