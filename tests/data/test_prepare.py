"""Pixels in NumPy. Oracles: torch's interpolation, Pillow's resize, and the definition of a border written out."""

from __future__ import annotations

import ast
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewbit.data import prepare
from fewbit.data.preprocess import Preprocess

MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("shape", [(40, 57), (24, 24), (7, 90), (1, 3), (200, 13)])
@pytest.mark.parametrize("size", [(24, 24), (20, 33), (1, 1)])
def test_floats_are_interpolated_as_torch_does(kind: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((3, *shape), np.float32)
    corners = None if kind == "nearest" else False
    wanted = F.interpolate(torch.from_numpy(x)[None], size, mode=MODES[kind], align_corners=corners)[0].numpy()
    found = prepare._sharp(x, size, kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6 if kind == "bicubic" else 4e-7)  # sums of 16 and of 4 products
    if kind == "nearest":
        np.testing.assert_array_equal(found, wanted)


def test_a_picture_of_the_input_s_size_is_not_touched() -> None:
    x = np.random.default_rng(0).random((3, 9, 12), np.float32)
    for kind in MODES:
        np.testing.assert_array_equal(prepare._sharp(x, (9, 12), kind), x)


def test_black_and_white_of_8_and_16_bits_are_0_and_1_and_every_step_is_a_division() -> None:
    for kind in (np.uint8, np.uint16):
        most = np.iinfo(kind).max
        steps = np.arange(most + 1, dtype=kind)
        found = prepare._unit(steps[:, None, None])
        wanted = torch.from_numpy(steps.astype(np.float32)).div(most).numpy()
        np.testing.assert_array_equal(found[0, :, 0], wanted)


@pytest.mark.parametrize("side", [64, 416, 640])
def test_a_corner_has_the_exact_size_of_the_picture_and_its_longer_side_fills_the_frame(side: int) -> None:
    """Whole fractions: 393 x (416 / 393) is 416, and 415.99... in float64."""
    how, random = Preprocess((3, side, side), resize="corner").to_json(), np.random.default_rng(0)
    for high, wide in random.integers(20, 3000, (2000, 2)).tolist():
        ratio = Fraction(side, max(high, wide))
        wanted = tuple(max(1, math.floor(n * ratio)) for n in (high, wide))
        assert prepare.resized(high, wide, how) == wanted
        assert max(wanted) == side


@pytest.mark.parametrize(("high", "wide", "where"), [(12, 24, (6, 0)), (24, 12, (0, 6))])
def test_a_letterbox_is_grey_where_the_picture_is_not(high: int, wide: int, where: tuple[int, int]) -> None:
    pixels = np.full((high, wide, 3), 255, np.uint8)
    x = prepare.prepared(pixels, Preprocess((3, 24, 24), (0.0,), (1.0,), resize="letterbox", fill=51).to_json())
    wanted = np.full((3, 24, 24), np.float32(0.2))
    wanted[:, where[0] : where[0] + high, where[1] : where[1] + wide] = 1
    np.testing.assert_array_equal(x, wanted)


def test_the_file_stands_alone() -> None:
    tree = ast.parse(Path(prepare.__file__).read_text())
    names = {one.module if isinstance(one, ast.ImportFrom) else one.names[0].name
             for one in ast.walk(tree) if isinstance(one, ast.ImportFrom | ast.Import)}  # fmt: skip
    assert {str(name).partition(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "PIL"}
