"""A depth for each pixel: δ1 and AbsRel with depth maps, pixels near the float model's without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewbit.core.task import Json, Outputs, OutputScore, Rating, Scored, Signature, Task
from fewbit.errors import BadImages
from fewbit.task.folder import kind_of, read_array
from fewbit.task.interval import of_mean
from fewbit.task.maps import Map, maps, one_map
from fewbit.task.paint import side
from fewbit.task.telling import Range, by_truth, no_better
from fewbit.task.tensors import rate_by_output

NEAR = 0.05  # of the range of depths in an image: how near two are that agree
BINS = 50  # of logarithms of depths between 1 and DELTA
FITTED = 2  # numbers of an image that `relative` fits: a scale and a shift
DELTA = 1.25  # the ratio of two depths up to which they count as equal (Eigen et al. 2014)


@dataclass(frozen=True)
class Depth(Task):
    """A depth for each pixel: output number `index` is (b, h, w) or (b, 1, h, w); `relative`: the inverse of a depth, up to a
    scale and a shift, which are fitted for each image (Ranftl et al. 2020, eq. 4).
    """

    index: int
    relative: bool = False
    name: ClassVar[str] = "depth"
    distance: ClassVar[str] = "relative error"
    classes = None

    @property
    def spec(self) -> str:
        return f"{self.name}:relative" if self.relative else self.name

    @staticmethod
    def of(model: Signature, variant: str = "") -> Depth:
        index, _ = one_map(model.outputs, (1,), "a map (batch, height, width) or (batch, 1, height, width)")
        return Depth(index, variant == "relative")

    def values(self, outputs: Outputs, size: tuple[int, int] | None = None) -> Tensor:
        """(b, h, w), enlarged to a size."""
        y = outputs[self.index].double().flatten(0, -3)
        return y if size is None else F.interpolate(y[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """The absolute error by the mean of the exact depths, mean over pixels."""
        x, y = self.values(exact), self.values(outputs)
        return ((x - y).abs().mean((1, 2)) / x.abs().mean((1, 2)).clamp_min(1e-30)).sum()

    def read(self, path: Path, images: Scored) -> list[Map]:
        """Depth maps: .npy in the model's unit, or PNG in thousandths of it; 0 where nobody knows. Raises BadImages, also where
        no map has enough depths at the pixels that the model sees.
        """
        found = maps(path, images, (".npy", ".png"), "depth maps", palette=False)
        for one in found:
            self._check_kind(one.path)
            if not np.isfinite(array := read_array(one.path).astype(np.float64)).all() or array.min() < 0:
                raise BadImages(f"{one.path} holds no depths: all have to be finite numbers, 0 (unknown) or more. Fix it.")
        if not any(self.is_told(seen(one, one.placement.size)) for one in found):
            raise BadImages(
                f"--annotations {path}: none of the {len(found)} depth maps has {self.enough} at the pixels that the model "
                "sees (what lies outside of its crop, or between the pixels that a smaller picture has, is not looked at). "
                "Give denser maps, keep more of each picture (--crop-pct 1, --resize squash), or leave --annotations out."
            )
        return found

    def _check_kind(self, path: Path) -> None:
        """Raise BadImages for a file whose kind holds no depths: two numbers, or eight bits of thousandths."""
        kind = kind_of(path)
        if kind in ("bool", "1"):
            raise BadImages(f"{path} has true and false alone, and no depths. Save the depth of each pixel, as floats (.npy).")
        if kind in ("L", "P") and not self.relative:
            raise BadImages(
                f"{path} has 8 bits, and PNG is read in thousandths of the model's unit: no depth would be above 0.255. Save "
                "it with 16 bits, or as .npy in the model's unit."
            )

    def is_told(self, true: Tensor) -> bool:
        """Whether depths (h, w), 0 where nobody knows, say anything: two or less are met by any scale and shift."""
        return int((true > 0).sum()) > (FITTED if self.relative else 0)

    @property
    def enough(self) -> str:
        """What a map needs to say something, in words."""
        return f"{FITTED + 1} known depths" if self.relative else "a known depth"

    def meter(self, truth: list[Map] | None) -> Depths:
        return Depths(self, truth)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        return ("depth",), {"index": self.index, "relative": self.relative}

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The depths in colours, near ones bright."""
        values = self.values(outputs)[0]
        return side((values if self.relative else -values).numpy(), (picture.width, picture.height))


@dataclass
class Guesses:
    """The δ1 that a guess has: one depth for every pixel, the best one, of all images; where a scale and a shift are fitted, of
    each image.
    """

    relative: bool
    images: int = 0
    shares: dict[int, float] = field(default_factory=dict)  # of pixels whose logarithm is in a bin, summed over images
    fitted: float = 0.0

    def add(self, true: Tensor) -> None:
        """The depths (h, w) of an image, one above 0; 0 where nobody knows."""
        t = true[true > 0]
        self.images += 1
        if self.relative:  # a straight line fitted to the inverse depths is their mean
            self.fitted += errors_of_depth(torch.full_like(t, 1 / float((1 / t).mean())), t, relative=False)[0]
            return
        bins, counts = (t.log() / math.log(DELTA) * BINS).floor().long().unique(return_counts=True)
        for one, share in zip(bins.tolist(), (counts / len(t)).tolist(), strict=True):
            self.shares[one] = self.shares.get(one, 0.0) + share

    def best(self) -> float:
        """δ1 in percent: of one depth the share of pixels in the 2 * BINS bins around it."""
        if self.relative:
            return 100 * self.fitted / self.images
        first = min(self.shares, default=0)
        line = np.zeros(max(self.shares, default=0) - first + 1)
        line[[one - first for one in self.shares]] = list(self.shares.values())
        return 100 * float(np.convolve(line, np.ones(2 * BINS)).max()) / self.images


@dataclass
class Depths:
    """Errors of each image: pixels near the float model's, and against the truth of both models."""

    task: Depth
    truth: list[Map] | None
    near: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)  # delta1 and absolute relative error of float, then of integer
    silent: int = 0  # images whose truth says nothing
    given: Range = field(default_factory=Range)  # of the float model's depths
    guesses: Guesses = field(init=False)

    def __post_init__(self) -> None:
        self.guesses = Guesses(self.task.relative)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start, x, y = len(self.near), self.task.values(exact), self.task.values(outputs)
        self.given.add(x)
        error, spread = (x - y).abs(), (x.amax((1, 2)) - x.amin((1, 2))).clamp_min(1e-30)
        finite = error.isfinite().all(2).all(1)  # an image with numbers that are none is wrong everywhere
        near = (error <= NEAR * spread[:, None, None]).double().mean((1, 2))
        self.near += torch.where(finite, near, 0.0).tolist()
        apart = torch.where(finite, error.mean((1, 2)) / x.abs().mean((1, 2)).clamp_min(1e-30), 1.0)
        self.apart += apart.tolist()
        if self.truth is not None:
            size = self.truth[start].placement.size
            both = [self.task.values(one, size) for one in (exact, outputs)]
            for k in range(len(x)):
                true = seen(self.truth[start + k], size)
                if not self.task.is_told(true):
                    self.silent += 1
                    continue
                self.guesses.add(true)
                self.scores.append([v for y in both for v in errors_of_depth(y[k], true, self.task.relative)])
        return apart

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """δ1, the share of pixels within 25 % of the truth, mean over images whose truth says something; without truth those
        near the float model's.
        Raises BadImages where the float model gives one depth alone.
        """
        if self.given.is_one:
            every = f"The float model gives every pixel of all {len(self.near)} scored images the same depth"
            return rate_by_output(outputs, self.task.index, f"{every}, so outputs are compared.")
        near, apart = (torch.tensor(v, dtype=torch.float64) for v in (self.near, self.apart))
        measure = f"pixels within {NEAR:.0%} of the float model's range of depths"
        error = 100 * float(apart.mean())
        rows = [{"what": "relative error from the float model", "error": error, "unit": "%", "better": "less"}]
        low, high = of_mean(near)
        agreed = Rating(
            "", measure, None, None, 100 * float(near.mean()), (100 * low, 100 * high), self._said(), rows=tuple(rows)
        )
        if not self.scores:
            return agreed
        scores = torch.tensor(self.scores, dtype=torch.float64)
        delta, absrel, delta_after, absrel_after = scores.mean(0).tolist()
        more = {"what": "AbsRel", "float": absrel, "quantized": absrel_after, "unit": "", "better": "less"}
        low, high = of_mean(scores[:, 2] - scores[:, 0])
        what = "one depth for every pixel" + (" of an image" if self.task.relative else "")
        guessed = no_better("δ1", 100 * delta, self.guesses.best(), what)
        return by_truth(agreed, "δ1", 100 * delta, 100 * delta_after, (100 * low, 100 * high), rows=[more], guessed=guessed)

    def _said(self) -> str:
        if not self.silent:
            return ""
        seen, images = f"{self.task.enough} at the pixels that the model sees", len(self.near)
        if not self.scores:
            return f"None of the {images} depth maps has {seen}, so δ1 is not used."
        return f"δ1 and AbsRel are of {len(self.scores)} of {images} images: no other depth map has {seen}."


def seen(one: Map, size: tuple[int, int]) -> Tensor:
    """The depths of a file as the model's input sees them, (h, w) of `size` in the model's unit, 0 where nobody knows."""
    return one.placed(size, 0.0) / (1000 if one.path.suffix.lower() == ".png" else 1)


def errors_of_depth(y: Tensor, true: Tensor, relative: bool) -> tuple[float, float]:
    """δ1 (a share) and the absolute relative error of depths (h, w), where the truth is above 0, as it is somewhere."""
    known = true > 0
    y, t = y[known], true[known]
    if not bool(y.isfinite().all()):  # of a map that has numbers which are none
        return 0.0, 1.0
    if relative:
        columns = torch.stack([y, torch.ones_like(y)], 1)
        scale, shift = torch.linalg.lstsq(columns, (1 / t)[:, None]).solution.flatten()
        y = 1 / (scale * y + shift).clamp_min(1 / (1e3 * float(t.max())))
    y = y.clamp_min(1e-9)
    return float((torch.maximum(y / t, t / y) < DELTA).double().mean()), float(((y - t).abs() / t).mean())
