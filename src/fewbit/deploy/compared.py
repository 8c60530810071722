"""How far the answers of the float and the integer model for one picture are apart, in a sentence with a number.

"Both" is said of what was compared alone: the class of a classifier, the objects of a detector one by one, every pixel of a
map, every number of other outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from fewbit.report.words import UNIT, share
from fewbit.task.detect import SAME, SURE

Json = Any
Array = NDArray[Any]
Answers = Sequence[Mapping[str, Json]]  # of the float and of the integer model
Outputs = Sequence[Sequence[Array]]


def compared(task: Mapping[str, Json], answers: Answers, outputs: Outputs) -> str:
    """The sentence, for the answers of both models (float first) and the outputs that they were made of; `task` is task.json.
    The pieces of the program say what is compared, and where none of them is known here, all outputs are, as numbers.
    """
    for model, arrays in zip(("float", "integer"), outputs, strict=True):
        for name, y in zip(task["outputs"], arrays, strict=True):
            if y.dtype.kind == "f" and np.isnan(y).any():
                return f"Not compared: the {model} model gives NaN for output {name}."
    if task.get("task") == "embed" and "index" in task:
        return _embeddings(*(np.asarray(arrays[task["index"]], np.float64).ravel() for arrays in outputs))
    compare = next((COMPARED[piece] for piece in task["pieces"] if piece in COMPARED), None)
    return _numbers(task["outputs"], *outputs) if compare is None else compare(*answers)


def _classes(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """The likeliest class of each."""
    (x, *_), (y, *_) = before["classes"], after["classes"]
    p, q = (share(one["probability"]).replace(UNIT, " ") for one in (x, y))
    if x["index"] == y["index"]:
        return f"Both say {x['name']}: {p} and {q}."
    return f"They differ. Float: {x['name']}, {p}. Integer: {y['name']}, {q}."


def _objects(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """The objects of both, in pairs of one class and an IoU of `SAME` and more, the highest IoU first."""
    xs, ys = before["objects"], after["objects"]
    if not xs and not ys:
        return f"Both find nothing of score {SURE:g} or more."
    pairs = _pairs(xs, ys)
    how = ""
    if pairs:
        scores = max(abs(xs[i]["score"] - ys[k]["score"]) for i, k in pairs)
        how = f" (IoU {_down(min(pairs.values()), 2)} or more, scores at most {_up(scores, 2)} apart)"
    if len(pairs) == len(xs) == len(ys):
        return f"Both find {_counted(xs)}{how}."
    of_float, of_integer = ({pair[side] for pair in pairs} for side in (0, 1))
    parts = {
        "Both": [xs[i] for i in sorted(of_float)],
        "Float alone": [x for i, x in enumerate(xs) if i not in of_float],
        "Integer alone": [y for k, y in enumerate(ys) if k not in of_integer],
    }
    said = [f"{who}: {_counted(found)}{how if who == 'Both' else ''}." for who, found in parts.items() if found]
    return " ".join(["They differ.", *said])


def _pairs(xs: Sequence[Mapping[str, Json]], ys: Sequence[Mapping[str, Json]]) -> dict[tuple[int, int], float]:
    """The numbers of objects that are one of both, each in one pair at most, with their IoU."""
    if not xs or not ys:
        return {}
    near = box_iou(*(torch.tensor([one["box"] for one in found], dtype=torch.float64) for found in (xs, ys))).tolist()
    could = [(near[i][k], i, k) for i, x in enumerate(xs) for k, y in enumerate(ys) if x["name"] == y["name"]]
    pairs: dict[tuple[int, int], float] = {}
    for overlap, i, k in sorted(could, reverse=True):
        if overlap >= SAME and not any(i == a or k == b for a, b in pairs):
            pairs[i, k] = overlap
    return pairs


def _counted(found: Sequence[Mapping[str, Json]]) -> str:
    """Names of objects, the most frequent first."""
    return ", ".join(f"{count} × {name}" for name, count in Counter(one["name"] for one in found).most_common())


def _pixels(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """The class of each pixel."""
    same = before["map"] == after["map"]
    if same.all():
        return "Both give every pixel the same class."
    return f"{_down(100 * float(same.mean()), 1)} % of the pixels have the same class in both."


def _depths(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """The mean absolute difference by the mean of the float model's depths, as `task/depth.py` has it."""
    x, y = (one["map"].astype(np.float64) for one in (before, after))
    what = "inverse depths" if before["relative"] else "depths"
    if (x == y).all():
        return f"Both give the same {what} in every pixel."
    error = 100 * float(np.abs(x - y).mean() / max(np.abs(x).mean(), 1e-30))
    return f"The {what} differ by {error:.2g} % of the float model's, in the mean over pixels."


def _pictures(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """PSNR of the pictures of 8 bits that are shown."""
    x, y = (one["map"].astype(np.float64) for one in (before, after))
    if (x == y).all():
        return "Both pictures are the same in every pixel (8 bits)."
    decibel = 10 * math.log10(255**2 / float(((x - y) ** 2).mean()))
    return f"PSNR of the integer model's picture against the float model's: {decibel:.1f} dB."


def _embeddings(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Their cosine similarity."""
    if (x == y).all():
        return "Both embeddings are the same in every number."
    lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
    if not 0 < lengths < math.inf:
        return "They differ: one of the embeddings has no direction."
    return f"The cosine similarity of both embeddings is {_down(float(x @ y) / lengths, 4)}."


def _numbers(names: Sequence[str], before: Sequence[Array], after: Sequence[Array]) -> str:
    """The output that differs most: real numbers by the largest difference, as a share of the float model's largest number,
    integers by the share that differs.
    """
    worst, said = 0.0, "Both give the same numbers in every output."
    for name, x, y in zip(names, before, after, strict=True):
        if x.shape != y.shape:
            return f"They differ: output {name} is {list(x.shape)} of the float model and {list(y.shape)} of the integer model."
        if (x == y).all():
            continue
        if x.dtype.kind == "f":
            x, y = x.astype(np.float64), y.astype(np.float64)
            with np.errstate(all="ignore"):
                apart = float(np.abs(np.where(x == y, 0.0, x - y)).max())
                largest = float(np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max())
            share = apart / max(largest, 1e-300)
            what = f"The largest difference is {100 * share:.2g} % of the float model's largest number, in output {name}."
        else:
            share = float((x != y).mean())
            what = f"{_up(100 * share, 1)} % of the numbers of output {name} differ."
        if share > worst:
            worst, said = share, what
    return said


def _down(value: float, digits: int) -> str:
    """Rounded so that nothing seems more alike than it is."""
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def _up(value: float, digits: int) -> str:
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


COMPARED: Mapping[str, Callable[[Mapping[str, Json], Mapping[str, Json]], str]] = {
    "classify": _classes,
    "detect": _objects,
    "segment": _pixels,
    "depth": _depths,
    "restore": _pictures,
}
