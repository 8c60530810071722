"""Something for each pixel: a class (segment), a depth (depth), a picture (restore)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewbit.core.task import Output, Outputs, OutputScore, Placement, Rating, Scored, Signature, Task
from fewbit.errors import BadImages, BadModel
from fewbit.task.folder import beside, read_array, same_size
from fewbit.task.interval import bootstrap, of_mean
from fewbit.task.paint import overlaid, side

IGNORED = 255  # the class of pixels that do not count
BACKGROUNDS = ("background", "__background__", "unlabeled", "void", "n/a")
NEAR = 0.05  # of the range of depths in an image: how near two are that agree
DELTA = 1.25  # the ratio of two depths up to which they count as equal (Eigen et al. 2014)


@dataclass(frozen=True)
class Map:
    """A map of numbers in a file, and where its picture lies in the model's input."""

    path: Path
    placement: Placement

    def placed(self, size: tuple[int, int], outside: float) -> Tensor:
        """The map as the model's input sees it, (h, w) of `size`: nearest pixels, `outside` where the picture is not."""
        array = torch.from_numpy(np.ascontiguousarray(read_array(self.path)).astype(np.float64))
        rows, columns = (
            (((torch.arange(n) + 0.5) * whole / n - shift) / scale).floor().long()
            for n, whole, scale, shift in zip(
                size, self.placement.size, reversed(self.placement.scale), reversed(self.placement.shift), strict=True
            )
        )
        inside = (rows >= 0)[:, None] & (rows < len(array))[:, None] & (columns >= 0) & (columns < array.shape[1])
        found = array[rows.clamp(0, len(array) - 1)][:, columns.clamp(0, array.shape[1] - 1)]
        return torch.where(inside, found, outside)


def maps(folder: Path, images: Scored, suffixes: Sequence[str], what: str) -> list[Map]:
    """The map of each image. Raises BadImages where one is missing, or has not the size of its picture."""
    found = []
    for path, name, size in zip(beside(folder, images.names, suffixes, what), images.names, images.sizes(), strict=True):
        same_size(path, read_array(path).shape, name, size)
        found.append(Map(path, images.placed(size)))
    return found


def _one_map(outputs: Sequence[Output], channels: Sequence[int] | None, what: str) -> tuple[int, tuple[int, ...]]:
    """The number and shape of the output that is a map, of several the one named `out`, `logits` or `predicted_depth`."""
    found = [
        i for i, one in enumerate(outputs)
        if (len(one.shape) == 3 and one.is_real and (channels is None or one.shape[0] in channels)) or len(one.shape) == 2
    ]  # fmt: skip
    named = [i for i in found if outputs[i].name in ("out", "logits", "predicted_depth")] or found
    if len(named) != 1:
        raise BadModel(f"{what} is needed, one alone or named `out` or `logits`")
    return named[0], outputs[named[0]].shape


@dataclass(frozen=True)
class Segment(Task):
    """A class for each pixel: output number `index` has logits (b, classes, h, w), of one channel a foreground that begins at
    `threshold`, or the class itself (b, h, w).
    """

    index: int
    many: int
    threshold: float | None = None
    probability: bool = False
    names: tuple[str, ...] = ()
    name: ClassVar[str] = "segment"
    classes = None

    @property
    def spec(self) -> str:
        return f"{self.name}:probability" if self.probability else self.name

    @staticmethod
    def of(model: Signature, variant: str = "") -> Segment:
        index, shape = _one_map(model.outputs, None, "a map (batch, classes, height, width) or (batch, height, width)")
        channels = shape[0] if len(shape) == 3 else None
        if channels is None and model.outputs[index].is_real:
            channels = 1
        given = variant == "probability"
        threshold = (0.5 if given else 0.0) if channels == 1 else None
        return Segment(index, 2 if channels == 1 else channels or IGNORED, threshold, given, tuple(model.names))

    def _logits(self, outputs: Outputs, size: tuple[int, int] | None) -> Tensor:
        """The output as (b, channels, h, w), enlarged to a size."""
        y = outputs[self.index]
        y = y[:, None] if y.ndim == 3 else y
        if size is None or tuple(y.shape[2:]) == size:
            return y
        if not y.is_floating_point():
            return F.interpolate(y.float(), size, mode="nearest-exact").to(y.dtype)
        return F.interpolate(y.float(), size, mode="bilinear", align_corners=False)

    def predict(self, outputs: Outputs, size: tuple[int, int] | None = None) -> Tensor:
        """The class of each pixel, int64 (b, h, w)."""
        y = self._logits(outputs, size)
        if self.threshold is not None:
            return (y[:, 0] > self.threshold).long()
        return y.argmax(1) if y.shape[1] > 1 else y[:, 0].long()

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """KL divergence of the class probabilities, mean over pixels; of classes alone the share of pixels that differ."""
        x, y = (self._logits(one, None) for one in (exact, outputs))
        if not x.is_floating_point():
            return float((x != y).double().mean((1, 2, 3)).sum())
        x, y = x.double(), y.double()
        if self.probability:
            x, y = (t.clamp(1e-6, 1 - 1e-6).logit() for t in (x, y))
        if self.threshold is not None:
            x, y = (torch.cat([torch.zeros_like(t), t], 1) for t in (x, y))
        p, q = x.log_softmax(1), y.log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean((1, 2)).sum())

    def read(self, path: Path, images: Scored) -> list[Map]:
        """Masks: PNG of class numbers, 255 where a pixel does not count. Raises BadImages for other numbers or sizes."""
        found = maps(path, images, (".png",), "masks")
        for one in found:
            values = np.unique(read_array(one.path))
            if wrong := [int(v) for v in values if v != IGNORED and not 0 <= v < self.many]:
                raise BadImages(
                    f"{one.path} has class {wrong[0]}; the model has classes 0 to {self.many - 1}, and {IGNORED} is no class. "
                    "Write the masks in the model's classes."
                )
        return found

    def meter(self, truth: list[Map] | None) -> Pixels:
        return Pixels(self, truth)

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The classes as colours over the picture; class 0 stays clear where it is, or may be, the background."""
        is_class = self.threshold is None and bool(self.names) and self.names[0].lower() not in BACKGROUNDS
        classes = self.predict(outputs, (picture.height, picture.width))[0].numpy()
        return overlaid(picture, classes, None if is_class else 0)


@dataclass
class Pixels:
    """For each image and class: pixels that are right, that are given, and that are so in truth, of both models."""

    task: Segment
    truth: list[Map] | None
    same: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)  # (2 models, 3, classes)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start = len(self.same)
        before, after = (self.task.predict(one) for one in (exact, outputs))
        same = (before == after).double().mean((1, 2))
        self.same += same.tolist()
        if self.truth is not None:
            size = self.truth[start].placement.size
            both = [self.task.predict(one, size) for one in (exact, outputs)]
            for k in range(len(same)):
                mask = self.truth[start + k].placed(size, IGNORED).long()
                self.counts.append(torch.stack([_counts(y[k], mask, self.task.many) for y in both]))
        return 1 - same

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """Mean IoU over the classes that occur, of all images together; without masks the share of pixels of the same class."""
        same = torch.tensor(self.same, dtype=torch.float64)
        agreement, measure = 100 * float(same.mean()), "pixels in the class of the float model"
        if not self.counts:
            low, high = of_mean(same)
            return Rating("", measure, None, None, agreement, (100 * low, 100 * high))
        counts = torch.stack(self.counts).double()  # (n, 2, 3, classes)
        flat = counts.flatten(1)

        def change(drawn: Tensor) -> float:
            before, after = mean_iou((drawn @ flat).view(counts.shape[1:]))
            return 100 * float(after - before)

        total = counts.sum(0)
        before, after = (100 * float(x) for x in mean_iou(total))
        each = 100 * total[:, 0] / (total[:, 1] + total[:, 2] - total[:, 0])
        seen = total[0, 2].nonzero().flatten().tolist()
        rows = tuple(
            {"what": f"IoU of {self.task.called(c)}", "float": float(each[0, c]), "quantized": float(each[1, c])} for c in seen
        )
        return Rating("mIoU", measure, before, after, agreement, bootstrap(change, len(flat)), rows=rows)


def _counts(given: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(3, classes): pixels of a class in both, in `given`, in `truth`; pixels without a class do not count."""
    counted = truth != IGNORED
    g, t = given[counted], truth[counted]
    return torch.stack([torch.bincount(x, minlength=classes)[:classes] for x in (g[g == t], g, t)])


def mean_iou(counts: Tensor) -> Tensor:
    """The mean IoU of each model from its counts (models, 3, classes), over classes that occur in truth."""
    right, given, true = counts.unbind(1)
    occurs = true > 0
    iou = right / (given + true - right).clamp_min(1)
    return (iou * occurs).sum(1) / occurs.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Depth(Task):
    """A depth for each pixel: output number `index` is (b, h, w) or (b, 1, h, w); `relative`: the inverse of a depth, up to a
    scale and a shift, which are fitted for each image (Ranftl et al. 2020, eq. 4).
    """

    index: int
    relative: bool = False
    name: ClassVar[str] = "depth"
    classes = None

    @property
    def spec(self) -> str:
        return f"{self.name}:relative" if self.relative else self.name

    @staticmethod
    def of(model: Signature, variant: str = "") -> Depth:
        index, _ = _one_map(model.outputs, (1,), "a map (batch, height, width) or (batch, 1, height, width)")
        return Depth(index, variant == "relative")

    def values(self, outputs: Outputs, size: tuple[int, int] | None = None) -> Tensor:
        """(b, h, w), enlarged to a size."""
        y = outputs[self.index].double().flatten(0, -3)
        return y if size is None else F.interpolate(y[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """The absolute error by the mean of the exact depths, mean over pixels."""
        x, y = self.values(exact), self.values(outputs)
        return float(((x - y).abs().mean((1, 2)) / x.abs().mean((1, 2)).clamp_min(1e-30)).sum())

    def read(self, path: Path, images: Scored) -> list[Map]:
        """Depth maps: .npy in the model's unit, or PNG in thousandths of it; 0 where nobody knows. Raises BadImages."""
        found = maps(path, images, (".npy", ".png"), "depth maps")
        for one in found:
            if not np.isfinite(array := read_array(one.path).astype(np.float64)).all() or array.min() < 0 or not array.any():
                raise BadImages(f"{one.path} holds no depths: all have to be 0 (unknown) or more, and one above 0. Mend it.")
        return found

    def meter(self, truth: list[Map] | None) -> Depths:
        return Depths(self, truth)

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The depths in colours, near ones bright."""
        values = self.values(outputs)[0]
        return side((values if self.relative else -values).numpy(), (picture.width, picture.height))


@dataclass
class Depths:
    """Errors of each image: pixels near the float model's, and against the truth of both models."""

    task: Depth
    truth: list[Map] | None
    near: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)  # delta1 and absolute relative error of float, then of integer

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start, x, y = len(self.near), self.task.values(exact), self.task.values(outputs)
        error, spread = (x - y).abs(), (x.amax((1, 2)) - x.amin((1, 2))).clamp_min(1e-30)
        self.near += (error <= NEAR * spread[:, None, None]).double().mean((1, 2)).tolist()
        apart = error.mean((1, 2)) / x.abs().mean((1, 2)).clamp_min(1e-30)
        self.apart += apart.tolist()
        if self.truth is not None:
            size = self.truth[start].placement.size
            both = [self.task.values(one, size) for one in (exact, outputs)]
            for k in range(len(x)):
                one = self.truth[start + k]
                true = one.placed(size, 0.0) / (1000 if one.path.suffix.lower() == ".png" else 1)
                self.scores.append([v for y in both for v in errors_of_depth(y[k], true, self.task.relative)])
        return apart

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """δ1, the share of pixels within 25 % of the truth, mean over images; without truth those near the float model's."""
        near, apart = (torch.tensor(v, dtype=torch.float64) for v in (self.near, self.apart))
        measure = f"pixels within {NEAR:.0%} of the float model's range of depths"
        rows = [{"what": "relative error from the float model", "error": float(apart.mean())}]
        if not self.scores:
            low, high = of_mean(near)
            return Rating("", measure, None, None, 100 * float(near.mean()), (100 * low, 100 * high), rows=tuple(rows))
        scores = torch.tensor(self.scores, dtype=torch.float64)
        delta, absrel, delta_after, absrel_after = scores.mean(0).tolist()
        rows.append({"what": "AbsRel (less is better)", "float": absrel, "quantized": absrel_after})
        low, high = of_mean(scores[:, 2] - scores[:, 0])
        return Rating(
            "δ1", measure, 100 * delta, 100 * delta_after, 100 * float(near.mean()), (100 * low, 100 * high), rows=tuple(rows)
        )


def errors_of_depth(y: Tensor, true: Tensor, relative: bool) -> tuple[float, float]:
    """δ1 (a share) and the absolute relative error of depths (h, w), where the truth is above 0."""
    known = true > 0
    y, t = y[known], true[known]
    if relative:
        columns = torch.stack([y, torch.ones_like(y)], 1)
        scale, shift = torch.linalg.lstsq(columns, (1 / t)[:, None]).solution.flatten()
        y = 1 / (scale * y + shift).clamp_min(1 / (1e3 * float(t.max())))
    y = y.clamp_min(1e-9)
    return float((torch.maximum(y / t, t / y) < DELTA).double().mean()), float(((y - t).abs() / t).mean())


@dataclass(frozen=True)
class Restore(Task):
    """A picture for a picture: output number `index` is (b, channels, h, w) in [0, 1]."""

    index: int
    name: ClassVar[str] = "restore"
    classes = None

    @staticmethod
    def of(model: Signature, variant: str = "") -> Restore:
        index, _ = _one_map(model.outputs, (1, 3), "a picture (batch, 1 or 3, height, width)")
        return Restore(index)

    def values(self, outputs: Outputs) -> Tensor:
        """The pictures (b, channels, h, w)."""
        y = outputs[self.index].float()
        return y[:, None] if y.ndim == 3 else y

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """The squared error by the variance of the exact picture."""
        x, y = (self.values(one).double() for one in (exact, outputs))
        return float(((x - y).square().mean((1, 2, 3)) / x.var((1, 2, 3)).clamp_min(1e-30)).sum())

    def read(self, path: Path, images: Scored) -> list[Path]:
        """What the pictures should become: pictures of the output's size. Raises BadImages."""
        return beside(path, images.names, (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"), "targets")

    def meter(self, truth: list[Path] | None) -> Likeness:
        return Likeness(self, truth)

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The picture that comes out."""
        y = (255 * self.values(outputs)[0].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(y[:, :, 0] if y.shape[2] == 1 else y)


@dataclass
class Likeness:
    """SSIM and PSNR of each image: against the float model's, and of both models against the truth."""

    task: Restore
    truth: list[Path] | None
    float_like: list[tuple[float, float]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start, x, y = len(self.float_like), self.task.values(exact), self.task.values(outputs)
        for k in range(len(x)):
            peak = float(x[k].max() - x[k].min()) or 1.0
            self.float_like.append(likeness(y[k], x[k], peak))
            if self.truth is not None:
                true = self._target(self.truth[start + k], tuple(x[k].shape))
                self.scores.append([v for z in (x[k], y[k]) for v in likeness(z.clamp(0, 1), true, 1.0)])
        return torch.tensor([1 - ssim for ssim, _ in self.float_like[start:]])

    @staticmethod
    def _target(path: Path, shape: tuple[int, ...]) -> Tensor:
        array = read_array(path)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.shape != (*shape[1:], shape[0]):
            raise BadImages(
                f"{path} is {array.shape} (height, width, channels), and the model gives {shape}; give such pictures."
            )
        return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / (255 if array.dtype == np.uint8 else 65535)

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """PSNR in dB against the truth, mean over images; without it SSIM against the float model's picture."""
        like = torch.tensor(self.float_like, dtype=torch.float64)
        measure, rows = "SSIM with the float model's picture", [
            {"what": "PSNR of the integer model's picture against the float model's, dB", "agreement": float(like[:, 1].mean())}
        ]  # fmt: skip
        agreement = 100 * max(float(like[:, 0].mean()), 0.0)
        if not self.scores:
            low, high = of_mean(like[:, 0])
            return Rating("", measure, None, None, agreement, (100 * low, 100 * high), rows=tuple(rows))
        scores = torch.tensor(self.scores, dtype=torch.float64)
        ssim, psnr, ssim_after, psnr_after = scores.mean(0).tolist()
        rows.append({"what": "SSIM", "float": 100 * ssim, "quantized": 100 * ssim_after})
        interval = of_mean(scores[:, 3] - scores[:, 1])
        return Rating("PSNR", measure, psnr, psnr_after, agreement, interval, unit="dB", rows=tuple(rows))


def likeness(y: Tensor, x: Tensor, peak: float) -> tuple[float, float]:
    """SSIM (Wang et al. 2004) and PSNR in dB, at most 100, of a picture (c, h, w) against another with values up to `peak`."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    squared = float((y.double() - x.double()).square().mean())
    decibel = min(10 * math.log10(peak * peak / squared), 100.0) if squared else 100.0
    value: Any = ssim(y[None], x[None], data_range=peak)
    return float(value), decibel
