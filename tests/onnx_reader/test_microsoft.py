"""Operators of onnxruntime's optimizer and exporters, each as onnxruntime computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from onnx_reader.cases import run

LATE = np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int32)  # the second image has three tokens
RANDOM = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


NEEDED = {"num_heads", "qkv_hidden_sizes", "activation", "activation_params", "activation_alpha", "transB", "transBatchA"}
IMAGE, KERNEL, TOKENS, WIDE = drawn(2, 4, 7, 6), drawn(6, 4, 3, 3), drawn(2, 5, 8), drawn(2, 5, 12)
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "conv relu": ("FusedConv", [IMAGE, KERNEL, drawn(6)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    "conv clip": ("FusedConv", [IMAGE, KERNEL, drawn(6)], {"activation": "Clip", "activation_params": [0.0, 6.0]}),
    "conv leaky": ("FusedConv", [IMAGE, KERNEL], {"activation": "LeakyRelu", "activation_params": [0.2], "strides": [2, 1]}),
    "conv hard": ("FusedConv", [IMAGE, KERNEL], {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}),
    "conv added": ("FusedConv", [IMAGE, KERNEL, drawn(6), drawn(2, 6, 5, 4)], {"activation": "Relu"}),
    "gemm": ("FusedGemm", [drawn(3, 4), drawn(5, 4), drawn(5)], {"activation": "Relu", "transB": 1, "alpha": 0.5}),
    "gemm leaky": ("FusedGemm", [drawn(3, 4), drawn(4, 5)], {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    "matmul": ("FusedMatMul", [drawn(2, 3, 4), drawn(2, 5, 4)], {"transB": 1, "alpha": 0.25}),
    "matmul batch": ("FusedMatMul", [drawn(2, 3, 4), drawn(3, 4, 5)], {"transBatchA": 1}),
    "gelu": ("Gelu", [TOKENS], {}),
    "bias gelu": ("BiasGelu", [TOKENS, drawn(8)], {}),
    "fast gelu": ("FastGelu", [TOKENS], {}),
    "fast gelu bias": ("FastGelu", [TOKENS, drawn(8)], {}),
    "quick gelu": ("QuickGelu", [TOKENS], {"alpha": 1.702}),
    "silu": ("QuickGelu", [TOKENS], {"alpha": 1.0}),
    "skip norm": ("SkipLayerNormalization", [TOKENS, drawn(2, 5, 8), drawn(8), drawn(8), drawn(8)], {"epsilon": 1e-5}),
    "skip norm plain": ("SkipLayerNormalization", [TOKENS, drawn(2, 5, 8), drawn(8)], {"epsilon": 1e-5}),
    "skip rms": ("SkipSimplifiedLayerNormalization", [TOKENS, drawn(2, 5, 8), drawn(8)], {"epsilon": 1e-5}),
    "attention": ("Attention", [TOKENS, drawn(8, 24), drawn(24)], {"num_heads": 2}),
    "attention mask": ("Attention", [TOKENS, drawn(8, 24), drawn(24), LATE], {"num_heads": 2}),
    "attention causal": ("Attention", [TOKENS, drawn(8, 24), drawn(24)], {"num_heads": 2, "unidirectional": 1}),
    "attention sizes": ("Attention", [TOKENS, drawn(8, 32), drawn(32)], {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 16]}),
    "attention bias": ("Attention", [TOKENS, drawn(8, 24), drawn(24), None, None, drawn(2, 2, 5, 5)], {"num_heads": 2}),
    "heads": ("MultiHeadAttention", [TOKENS, drawn(2, 6, 8), drawn(2, 6, 12)], {"num_heads": 2}),
    "heads bias": ("MultiHeadAttention", [TOKENS, drawn(2, 6, 8), WIDE.repeat(2, 1)[:, :6], drawn(28)], {"num_heads": 2}),
    "heads scale": ("MultiHeadAttention", [TOKENS, drawn(2, 6, 8), drawn(2, 6, 8)], {"num_heads": 4, "scale": 0.3}),
    "grid": ("GridSample", [IMAGE, drawn(2, 3, 3, 2)], {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0}),
    "trilu": ("Trilu", [drawn(3, 4)], {"upper": 0}),
}  # fmt: skip


def one_node(
    op: str, inputs: list[Any], attributes: dict[str, Any], domain: str, outputs: int = 1, opset: int = 17
) -> ModelProto:
    """A model of one node with an output of any shape."""
    names = ["" if v is None else f"x{i}" for i, v in enumerate(inputs)]
    out = ["y", *[""] * (outputs - 2), *(["last"] if outputs > 1 else [])]
    node = helper.make_node(op, names, out, name="node", domain=domain, **attributes)
    ports = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True) if v is not None
    ]  # fmt: skip
    results = [helper.make_tensor_value_info(name, 1, None) for name in out if name]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "one", ports, results), opset_imports=opsets, ir_version=8)


def of_runtime(model: ModelProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {port.name: v for port, v in zip(session.get_inputs(), inputs, strict=True)})


@pytest.mark.parametrize("name", CASES)
def test_a_node_computes_what_onnxruntime_does(name: str) -> None:
    op, inputs, attributes = CASES[name]
    outputs = 4 if op.startswith("Skip") else 1
    model = one_node(op, inputs, attributes, "com.microsoft", outputs)
    given = [v for v in inputs if v is not None]
    _, _, found = run(model, given)
    for got, want in zip(found, of_runtime(model, given), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)  # sums in another order, tanh and erf of their own


@pytest.mark.parametrize("name", CASES)
def test_attributes_that_a_file_leaves_out_have_the_values_of_onnxruntime(name: str) -> None:
    """On small numbers, beside which the epsilon of a norm counts."""
    op, inputs, attributes = CASES[name]
    given = [v if v is None or v is LATE else v * np.float32(1e-3) for v in inputs]
    model = one_node(op, given, {n: v for n, v in attributes.items() if n in NEEDED}, "com.microsoft")
    given = [v for v in given if v is not None]
    np.testing.assert_allclose(run(model, given)[2][0], of_runtime(model, given)[0], rtol=2e-3, atol=1e-9)


UNREAD: dict[str, tuple[str, str, list[Any], dict[str, Any], str]] = {
    "rotary": ("com.microsoft", "Attention", [TOKENS, drawn(8, 24), drawn(24)], {"num_heads": 2, "do_rotary": 1}, "do_rotary"),
    "of another version": ("com.microsoft", "Gelu", [TOKENS], {"approximate": "tanh"}, "'approximate' = 'tanh'"),
    "spatial": ("", "BatchNormalization", [IMAGE, *(drawn(4) for _ in range(4))], {"spatial": 0}, "'spatial' = 0"),
    "unknown": ("", "Conv", [IMAGE, KERNEL], {"circular": [1, 1]}, r"'circular' = \[1, 1\]"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_an_attribute_that_nobody_reads_is_refused_with_its_node_and_its_value(name: str) -> None:
    domain, op, inputs, attributes, said = UNREAD[name]
    with pytest.raises(AssertionError, match=rf"{op} 'node' \(opset \d+\) .*{said}"):
        run(one_node(op, inputs, attributes, domain, opset=8), inputs)


def test_attributes_that_change_nothing_are_taken() -> None:
    """The default of an operator, and what the mode or the weight leave without a part."""
    for op, inputs, attributes, opset in (
        ("BatchNormalization", [IMAGE, drawn(4), drawn(4), drawn(4), drawn(4) ** 2], {"spatial": 1, "momentum": 0.5}, 8),
        ("Conv", [IMAGE, KERNEL], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, 17),
        ("ReduceSum", [IMAGE, np.array([1])], {"noop_with_empty_axes": 1}, 17),
        ("GlobalAveragePool", [IMAGE], {}, 17),
        ("AveragePool", [IMAGE], {"kernel_shape": [7, 6], "count_include_pad": 1}, 17),
        ("Mod", [np.arange(6, dtype=np.uint32), np.full(6, 4, np.uint32)], {"fmod": 1}, 17),
    ):
        model = one_node(op, inputs, attributes, "", opset=opset)
        if op == "Mod":
            model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT32
        np.testing.assert_allclose(run(model, inputs)[2][0], of_runtime(model, inputs)[0], rtol=1e-4, atol=1e-5, err_msg=op)
