"""Operators that sample maps elsewhere than at their pixels: Resize, Upsample, GridSample, RoiAlign."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.onnx_reader.values import Known, Node, Registry, Value, known, numbers, tensor

TORCH_MODES = {3: {"linear": "linear"}, 4: {"linear": "bilinear", "cubic": "bicubic"}, 5: {"linear": "trilinear"}}
ALIGNED = {"align_corners": True, "half_pixel": False}


def resize(node: Node, x: Value, *rest: Value) -> Tensor:
    x = tensor(x)
    roi, scales, wanted = _arguments(node, rest)
    axes = [a % x.ndim for a in node.get("axes") or range(x.ndim)]
    if not all(isinstance(n, int) for n in x.shape[2:]):
        return _of_any_size(node, x, axes, scales, wanted)
    steps = dict.fromkeys(range(x.ndim), 1.0)
    size = dict(enumerate(x.shape))
    if wanted is not None:
        target = dict(zip(axes, numbers(wanted, "sizes"), strict=True))
        target = {a: n for a, n in target.items() if isinstance(n, int) and isinstance(x.shape[a], int)}  # not the batch
        if node.batch is not None and target.get(0) == node.batch:
            del target[0]
        steps |= {a: n / x.shape[a] for a, n in target.items()}
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            one = (min if policy == "not_larger" else max)(steps[a] for a in target)
            steps |= dict.fromkeys(target, one)
            target = {a: math.floor(one * x.shape[a] + 0.5) for a in target}
        size |= target
    else:
        steps |= {a: float(s) for a, s in zip(axes, numbers(scales, "scales"), strict=True)}
        size |= {a: _enlarged(x.shape[a], s) for a, s in steps.items() if s != 1}
    boxes = dict.fromkeys(range(x.ndim), (0.0, 1.0))
    crops = node.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops and roi is not None:
        ends = numbers(roi, "roi")
        boxes |= {a: (float(ends[i]), float(ends[i + len(axes)])) for i, a in enumerate(axes)}
    moved = [a for a in range(x.ndim) if steps[a] != 1]  # as onnxruntime, which crops no axis that it does not resize
    if not all(isinstance(x.shape[a], int) for a in moved):
        raise ValueError("it crops or resizes the batch, whose size is free; height, width and channels are allowed")
    same = [a for a in moved if size[a] == x.shape[a]]
    if same and crops and node.get("antialias", 0):
        raise ValueError(
            "it crops with antialias and scales that leave a size as it is; onnxruntime has no clear rule for that"
        )
    if len(same) == len(moved) or node.get("antialias", 0):
        moved = [a for a in moved if a not in same]  # as onnxruntime, which copies maps whose size stays
    return _resized(node, x, {a: (steps[a], size[a], boxes[a]) for a in moved})


def _enlarged(n: Any, step: float) -> Any:
    """The size of a map as onnxruntime rounds it down: of a product in float32, where 10 times 0.7 is 7."""
    return int(np.float32(n) * np.float32(step)) if isinstance(n, int) else math.floor(n * step)


def _arguments(node: Node, rest: tuple[Value, ...]) -> tuple[Value, Value, Value]:
    """roi, scales and sizes, wherever an opset has them."""
    if node.op == "Upsample" or node.opset == 10:
        given = rest[0] if rest else known(np.array(node.get("scales"), dtype=np.float32))
        return None, given, None
    roi, scales, wanted = (*rest, None, None, None)[:3]
    if isinstance(scales, Known) and not scales.array.size:
        scales = None
    return roi, scales, None if scales is not None else wanted


def _of_any_size(node: Node, x: Tensor, axes: list[int], scales: Value, wanted: Value) -> Tensor:
    """A map whose height or width is free, where torch has the same rule for all sizes."""
    mode, where, rounding = _rule(node)
    given = dict(zip(axes, numbers(scales if wanted is None else wanted, "size"), strict=True))
    spatial = range(2, x.ndim)
    steps = None if wanted is not None else [float(str(np.float32(given.get(a, 1.0)))) for a in spatial]  # 0.7, not 0.69999999
    if steps and any(math.floor(n * step) != _enlarged(n, step) for step in steps for n in range(1, 2048)):
        raise ValueError(f"torch does not round down sizes by {', '.join(map(str, steps))} as onnxruntime does")
    whole = steps is not None and all(step.is_integer() for step in steps) and where == "half_pixel"
    if mode == "nearest":
        floor = rounding == "floor" or (rounding == "simple" and steps is not None and min(steps) >= 1)
        even = (where == "asymmetric" and floor) or (whole and rounding.startswith("round"))
        same, aligned = "nearest" if even else None, None
    else:
        same, aligned = TORCH_MODES.get(x.ndim, {}).get(mode), ALIGNED.get(where.replace("pytorch_", ""))
    stretched = node.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if same is None or _is_special(node) or not stretched or (same != "nearest" and aligned is None):
        raise ValueError(f"torch does not resize maps of any size by {mode}, {where}")
    size = None if wanted is None else [given.get(a, x.shape[a]) for a in spatial]
    return F.interpolate(x, size, steps, same, aligned)


def _rule(node: Node) -> tuple[str, str, str]:
    """How a node interpolates, where its pixels lie, and how it rounds to the nearest."""
    if node.op == "Upsample" or node.opset == 10:
        return node.get("mode", "nearest"), "asymmetric", "simple"
    where, how = node.get("coordinate_transformation_mode", "half_pixel"), node.get("nearest_mode", "round_prefer_floor")
    return node.get("mode", "nearest"), where, how


def _is_special(node: Node) -> bool:
    """Whether a node weighs pixels in a way that torch's `interpolate` does not have."""
    return bool(node.get("antialias", 0) or node.get("exclude_outside", 0) or node.get("cubic_coeff_a", -0.75) != -0.75)


def _resized(node: Node, x: Tensor, moved: dict[int, tuple[float, Any, tuple[float, float]]]) -> Tensor:
    mode, where, rounding = _rule(node)
    if mode == "nearest":
        return _nearest(node, x, moved, where, rounding)
    plain = where.replace("pytorch_", "") if all(n > 1 for _, n, _ in moved.values()) else where
    mode_of_torch = TORCH_MODES.get(x.ndim, {}).get(mode)
    exact = plain == "align_corners" or all(math.isclose(x.shape[a] * s, n, rel_tol=1e-6) for a, (s, n, _) in moved.items())
    if mode_of_torch and plain in ALIGNED and not _is_special(node) and exact and moved and set(moved) <= set(range(2, x.ndim)):
        size = [moved[a][1] if a in moved else x.shape[a] for a in range(2, x.ndim)]
        return F.interpolate(x, size, mode=mode_of_torch, align_corners=ALIGNED[plain])
    for axis, (step, n, box) in moved.items():
        matrix, outside = _weights(node, x.shape[axis], n, step, box, where, mode)
        turned = x.movedim(axis, -1) @ torch.tensor(matrix.T.tolist())
        if outside.any():
            turned = turned.masked_fill(torch.tensor(outside.tolist()), node.get("extrapolation_value", 0.0))
        x = turned.movedim(-1, axis)
    return x


def _places(n: int, size: int, step: float, box: tuple[float, float], where: str) -> np.ndarray:
    """Where each new pixel lies among the old ones: onnxruntime's rule, in its float32, which decides what is nearest.

    Where `step * n` is not a whole number, onnx.reference (1.23) puts pixels elsewhere than onnxruntime (1.32): it counts from
    the end of the larger map that was not rounded down, and a single pixel of pytorch_half_pixel lies at -0.5, not at 0.
    """
    one = np.float32
    i, scale = np.arange(size, dtype=one), one(step)
    if where == "align_corners":
        return i * one(n - 1) / one(size - 1) if size > 1 else 0 * i
    if where == "asymmetric":
        return i / scale
    if where == "tf_crop_and_resize":
        start, end = map(one, box)
        if size == 1:
            return 0 * i + one(0.5) * (start + end) * one(n - 1)
        return start * one(n - 1) + i * (end - start) * one(n - 1) / one(size - 1)
    if where == "tf_half_pixel_for_nn":
        return (i + one(0.5)) / scale
    if where == "pytorch_half_pixel" and size == 1:
        return 0 * i
    if where == "half_pixel_symmetric":
        shift = one(n / 2) * (one(1) - one(size) / (scale * one(n)))
        return (shift + (i.astype(np.float64) + 0.5) / scale - 0.5).astype(one)
    return (i + one(0.5)) / scale - one(0.5)


def _weights(
    node: Node, n: int, size: int, step: float, box: tuple[float, float], where: str, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (new, old) that makes new pixels of old ones, and which new ones lie outside of the box."""
    places = _places(n, size, step, box, where)
    shrink = min(step, 1.0) if node.get("antialias", 0) else 1.0
    a, reach = node.get("cubic_coeff_a", -0.75), math.ceil((2 if mode == "cubic" else 1) / shrink) + 1

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        if mode == "linear":
            return np.clip(1 - x, 0, None)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        return np.where(x <= 1, near, np.where(x < 2, a * (((x - 5) * x + 8) * x - 4), 0.0))

    matrix = np.zeros((size, n))
    for row, place in enumerate(places):
        near = np.arange(math.floor(place) - reach, math.floor(place) + reach + 1)
        values = kernel((near - place) * shrink)
        if node.get("exclude_outside", 0):
            values = values * ((near >= 0) & (near < n))
        if node.get("exclude_outside", 0) or node.get("antialias", 0):
            values = values / values.sum()
        np.add.at(matrix[row], np.clip(near, 0, n - 1), values)
    outside = (places < 0) | (places > n - 1) if where == "tf_crop_and_resize" else np.zeros(size, dtype=bool)
    return matrix.astype(np.float32), outside


def _halves(towards: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """To the nearest pixel, and from the middle between two `towards` one; onnxruntime takes 1e-6 around it for the middle."""
    return lambda x: np.where(np.abs(x - np.floor(x) - 0.5) < 1e-6, towards(x), np.floor(x + 0.5))


ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": _halves(np.floor),
    "round_prefer_ceil": _halves(np.ceil),
}


def _rounding(how: str, step: float) -> Callable[[np.ndarray], np.ndarray]:
    """How places become pixels; before opset 11, smaller maps take the next pixel and larger ones the last."""
    return ROUND[how if how != "simple" else "ceil" if step < 1 else "floor"]


def _is_that_of_torch(rows: np.ndarray, n: int, mode: str) -> bool:
    """Whether torch's `interpolate` takes these pixels, and a Resize made of it, however the place of a pixel is rounded."""
    i, size, shift = np.arange(len(rows)), len(rows), 0.5 if mode == "nearest-exact" else 0.0
    kinds: tuple[Any, ...] = np.float32, np.float64
    places = [(i + shift).astype(kind) * (kind(n) / kind(size)) for kind in kinds]
    places += [_places(n, size, size / n, (0.0, 1.0), "asymmetric")] if mode == "nearest" else []
    return all((np.clip(np.floor(found), 0, n - 1) == rows).all() for found in places)


def _nearest(node: Node, x: Tensor, moved: dict[int, Any], where: str, how: str) -> Tensor:
    rows, outside = {}, {}
    for axis, (step, size, box) in moved.items():
        places, n = _places(x.shape[axis], size, step, box, where), x.shape[axis]
        rows[axis] = np.clip(_rounding(how, step)(places.astype(np.float64)), 0, n - 1).astype(np.int64)
        outside[axis] = (places < 0) | (places > n - 1) if where == "tf_crop_and_resize" else np.zeros(size, dtype=bool)
    if moved and x.ndim in (3, 4, 5) and set(moved) <= set(range(2, x.ndim)):
        size = [moved[a][1] if a in moved else x.shape[a] for a in range(2, x.ndim)]
        for mode in ("nearest", "nearest-exact"):
            same = all(_is_that_of_torch(r, x.shape[a], mode) for a, r in rows.items())
            if same and not any(o.any() for o in outside.values()):
                return F.interpolate(x, size, mode=mode)
    for axis, places in rows.items():
        x = x.index_select(axis, torch.tensor(places.tolist()))
        if outside[axis].any():
            hidden = torch.tensor(outside[axis].tolist()).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            x = x.masked_fill(hidden, node.get("extrapolation_value", 0.0))
    return x


GRID_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


def grid_sample(node: Node, x: Value, grid: Value) -> Tensor:
    images, grids = tensor(x).shape[0], tensor(grid).shape[0]
    if isinstance(grid, Known) and isinstance(images, int) and images != grids:
        if bool((grid.array != grid.array[:1]).any()):
            raise ValueError(
                f"its stored grid has another part for each of {grids} images, so what an image gives depends on its place in "
                "the batch. Export the model for one image"
            )
        raise ValueError(
            f"its stored grid is for {grids} images, and it gets {images}. Fix the batch of the file at {grids}: python -m "
            f"onnxruntime.tools.make_dynamic_shape_fixed --dim_param BATCH --dim_value {grids} IN.onnx OUT.onnx, with the name "
            "that the batch has in the file for BATCH"
        )
    mode, padding = GRID_MODES[node.get("mode", "linear")], node.get("padding_mode", "zeros")
    return F.grid_sample(tensor(x), tensor(grid), mode, padding, bool(node.get("align_corners", 0)))


def affine_grid(node: Node, theta: Value, size: Value) -> Tensor:
    return F.affine_grid(tensor(theta), numbers(size, "size"), bool(node.get("align_corners", 0)))


def roi_align(node: Node, x: Value, rois: Value, images: Value) -> Tensor:
    from torchvision.ops import roi_align as align

    if node.get("mode", "avg") != "avg":
        raise ValueError("it takes the largest of its samples, and torch their mean alone")
    boxes = torch.cat([tensor(images).float()[:, None], tensor(rois)], 1)
    size = node.get("output_height", 1), node.get("output_width", 1)
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    half = node.get("coordinate_transformation_mode", default) == "half_pixel"
    return align(tensor(x), boxes, size, node.get("spatial_scale", 1.0), node.get("sampling_ratio", 0) or -1, half)


RESIZE: Registry = {
    "AffineGrid": affine_grid,
    "GridSample": grid_sample,
    "Resize": resize,
    "RoiAlign": roi_align,
    "Upsample": resize,
}
