"""Oracles: onnx.reference and onnxruntime for codes and values, closed forms for steps, float64 for biases."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from fewbit.core.grid import TINY, Grid, QParams, codes, fake, qparams_from_range, safe_terms, values

U8, S8 = Grid(8, signed=False, symmetric=False), Grid(8, symmetric=False)
finite = st.floats(-(2.0**100), 2.0**100, width=32)
grids = st.builds(Grid, bits=st.integers(2, 8), signed=st.booleans(), narrow=st.booleans(), symmetric=st.booleans())


def qparams(scale: float | list[float], zero: int | list[int] = 0) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))


def onnx_model(kind: str, grid: Grid, a: QParams) -> onnx.ModelProto:
    """A model of one QuantizeLinear or DequantizeLinear; scale and zero point are constants."""
    container = np.int8 if grid.signed else np.uint8
    code, real = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(container)), onnx.TensorProto.FLOAT
    given_type, found_type = (real, code) if kind == "QuantizeLinear" else (code, real)
    attributes = {} if grid.axis is None else {"axis": grid.axis}
    body = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, ["x", "scale", "zero"], ["y"], **attributes)],
        "one",
        [onnx.helper.make_tensor_value_info("x", given_type, None)],
        [onnx.helper.make_tensor_value_info("y", found_type, None)],
        [
            onnx.numpy_helper.from_array(a.scale.numpy(), "scale"),
            onnx.numpy_helper.from_array(a.zero.numpy().astype(container), "zero"),
        ],
    )
    return onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def run_both(kind: str, grid: Grid, a: QParams, x: np.ndarray) -> list[np.ndarray]:
    model = onnx_model(kind, grid, a)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [ReferenceEvaluator(model).run(None, {"x": x})[0], session.run(None, {"x": x})[0]]


def with_ties(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Random numbers beyond both ends, then every half step from -300 to 300."""
    noise = torch.randn(rows, 999, generator=torch.Generator().manual_seed(1)) * 90
    halves = torch.arange(-300, 300).add(0.5).expand(rows, -1)
    return torch.cat([noise, halves], 1) * scale.view(-1, 1)


@pytest.mark.parametrize("scale", [0.0625, 0.1, 3e-5, 41.7])
@pytest.mark.parametrize(("grid", "zero"), [(U8, 0), (U8, 128), (U8, 255), (S8, 0), (S8, -7), (S8, 127)])
def test_codes_are_those_of_onnx_and_onnxruntime_also_on_ties(grid, zero, scale):
    a = qparams(scale, zero)
    x = with_ties(a.scale, 1)
    for theirs in run_both("QuantizeLinear", grid, a, x.numpy()):
        np.testing.assert_array_equal(codes(x, a, grid).numpy(), theirs)


@pytest.mark.parametrize("signed", [False, True])
def test_codes_per_channel_are_those_of_onnx_and_onnxruntime(signed):
    grid = Grid(8, signed=signed, symmetric=False, axis=0)
    a = qparams([0.1, 0.25, 7.0], [3, 100, 0])
    x = with_ties(a.scale, 3)
    for theirs in run_both("QuantizeLinear", grid, a, x.numpy()):
        np.testing.assert_array_equal(codes(x, a, grid).numpy(), theirs)


@pytest.mark.parametrize(("grid", "zero"), [(U8, 0), (U8, 131), (S8, -7)])
def test_values_are_those_of_onnx_and_onnxruntime(grid, zero):
    a, q = qparams(0.1, zero), torch.arange(grid.low, grid.high + 1)
    for theirs in run_both("DequantizeLinear", grid, a, q.to(grid.container).numpy()):
        np.testing.assert_array_equal(values(q.to(torch.int32), a, grid).numpy(), theirs)


@given(grid=grids, low=finite, high=finite, seed=st.integers(0, 99))
def test_fake_is_the_values_of_the_codes_and_doing_it_twice_changes_nothing(grid, low, high, seed):
    a = qparams_from_range(torch.tensor(min(low, high)), torch.tensor(max(low, high)), grid)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * (abs(low) + abs(high))
    once = fake(x, a, grid)
    assert torch.equal(once, values(codes(x, a, grid), a, grid))
    assert torch.equal(once, fake(once, a, grid))


@given(grid=grids, low=st.floats(-100, 0, width=32), high=st.floats(0.0625, 100, width=32))
def test_inside_of_the_range_of_the_codes_the_error_is_at_most_half_a_step(grid, low, high):
    a = qparams_from_range(torch.tensor(low), torch.tensor(high), grid)
    ends = values(torch.tensor([grid.low, grid.high], dtype=torch.int32), a, grid)
    x = torch.linspace(ends[0].item(), ends[1].item(), 1001)
    # x / scale is rounded in float32, and is at most 255: 2 ** -17 of a step
    assert (fake(x, a, grid) - x).abs().max() <= a.scale * (0.5 + 2**-16)


@given(grid=grids, low=finite, high=finite)
def test_the_codes_cover_the_range_to_half_a_step_at_either_end(grid, low, high):
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    a = qparams_from_range(torch.tensor(low), torch.tensor(high), grid)
    x = torch.tensor([low, high])
    assert ((fake(x, a, grid) - x).abs() <= a.scale * (0.5 + 2**-16)).all()


@given(grid=grids, scale=st.builds(math.ldexp, st.floats(1, 2, width=32), st.integers(-20, 20)), seed=st.integers(0, 99))
def test_scaling_input_and_step_by_four_leaves_the_codes_unchanged(grid, scale, seed):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * 50
    a = qparams(scale, (grid.low + grid.high) // 2)
    assert torch.equal(codes(x, a, grid), codes(4 * x, QParams(4 * a.scale, a.zero), grid))


@given(grid=grids, low=finite, high=finite)
def test_zero_is_always_a_code_and_stands_for_itself(grid, low, high):
    a = qparams_from_range(torch.tensor(min(low, high)), torch.tensor(max(low, high)), grid)
    assert grid.low <= a.zero <= grid.high
    assert codes(torch.zeros(1), a, grid) == a.zero
    assert fake(torch.zeros(1), a, grid) == 0


@pytest.mark.parametrize(
    ("grid", "low", "high", "scale", "zero"),
    [
        (U8, 0.0, 0.0, TINY, 0),
        (S8, 0.0, 0.0, TINY, -128),
        (Grid(8), 0.0, 0.0, TINY, 0),
        (U8, 1.0, 3.0, 3 / 255, 0),
        (S8, 1.0, 3.0, 3 / 255, -128),
        (U8, -3.0, -1.0, 3 / 255, 255),
        (S8, -3.0, -1.0, 3 / 255, 127),
        (U8, -1.0, 3.0, 4 / 255, 64),
        (Grid(8), -1.0, 3.0, 3 / 127, 0),
        (Grid(8, narrow=True), -4.0, 3.0, 4 / 127, 0),
        (Grid(8, signed=False), -1.0, 3.0, 3 / 127, 128),
        (Grid(4, narrow=True), -14.0, 3.0, 2.0, 0),
        (U8, -1e38, 2e38, 3e38 / 255, 85),
        (U8, -1.7e38, 3.4e38, 5.1e38 / 255, 85),
        (Grid(8), 0.0, 3.4e38, 3.4e38 / 127, 0),
    ],
)
def test_a_range_becomes_the_step_and_zero_point_of_the_closed_form(grid, low, high, scale, zero):
    a = qparams_from_range(torch.tensor(low), torch.tensor(high), grid)
    assert a.scale.item() == pytest.approx(scale, rel=2**-22)
    assert a.zero.item() == zero
    assert (a.scale.dtype, a.zero.dtype) == (torch.float32, torch.int32)


def test_ranges_of_many_channels_are_each_what_they_are_alone():
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([2.0, 0.0, -1.0])
    together = qparams_from_range(low, high, U8)
    for i in range(3):
        alone = qparams_from_range(low[i], high[i], U8)
        assert (together.scale[i], together.zero[i]) == (alone.scale, alone.zero)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_step_that_is_not_finite_and_positive_is_refused(scale):
    with pytest.raises(ValueError, match="finite and > 0"):
        qparams(scale)


@pytest.mark.parametrize(
    ("activation", "weight", "terms"),
    [
        (Grid(8, narrow=True), Grid(8, narrow=True), 2),  # 127 * 127
        (Grid(7, narrow=True), Grid(7, narrow=True), 8),  # 63 * 63
        (Grid(8, signed=False), Grid(8), 1),  # 255 * 128
        (Grid(8, signed=False), Grid(7), 2),  # 255 * 64
    ],
)
def test_safe_terms_of_sixteen_bits_are_those_of_the_style_guide(activation, weight, terms):
    assert safe_terms(16, activation, weight) == terms


@given(bits=st.integers(8, 32), a=grids, w=grids)
def test_one_more_term_than_safe_can_overflow_and_no_fewer(bits, a, w):
    worst, terms = a.largest * w.largest, safe_terms(bits, a, w)
    assert terms * worst < 2 ** (bits - 1) <= (terms + 1) * worst


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [(Grid(8), -128, 127), (Grid(8, narrow=True), -127, 127), (Grid(4, narrow=True), -7, 7), (U8, 0, 255), (Grid(2), -2, 1)],
)
def test_narrow_drops_the_lowest_code_alone(grid, low, high):
    assert (grid.low, grid.high) == (low, high)
    x = torch.tensor([-1e9, 1e9])
    assert codes(x, qparams(1.0), grid).tolist() == [low, high]


@pytest.mark.parametrize("bits", [0, 33])
def test_a_grid_of_no_bits_or_more_than_32_is_refused(bits):
    with pytest.raises(ValueError, match="1 to 32 bits"):
        Grid(bits)


def test_the_codes_of_a_bias_are_those_of_a_float64_computation():
    grid = Grid(32, axis=0)
    b = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100
    scale = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 1e-6 + 1e-8
    expected = np.rint(b.numpy().astype(np.float64) / scale.numpy().astype(np.float64)).clip(-(2**31), 2**31 - 1)
    found = codes(b, QParams(scale, torch.zeros(2000, dtype=torch.int32)), grid)
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.int64))
    assert (found.abs() > 2**24).any()  # float32 would not hold these
