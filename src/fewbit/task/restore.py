"""A picture for a picture: PSNR and SSIM against target pictures, and against the float model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from fewbit.core.task import Json, Outputs, OutputScore, Rating, Scored, Signature, Task
from fewbit.errors import BadImages
from fewbit.task.folder import beside, read_picture
from fewbit.task.interval import of_mean
from fewbit.task.maps import one_map
from fewbit.task.telling import Range, by_truth, no_better
from fewbit.task.tensors import rate_by_output


@dataclass(frozen=True)
class Restore(Task):
    """A picture for a picture: output number `index` is (b, channels, h, w) in [0, 1], of one channel perhaps (b, h, w);
    `shape` is (channels, h, w), -1 where a size is free.
    """

    index: int
    shape: tuple[int, ...]
    name: ClassVar[str] = "restore"
    distance: ClassVar[str] = "squared error by variance"
    classes = None

    @staticmethod
    def of(model: Signature, variant: str = "") -> Restore:
        index, shape = one_map(model.outputs, (1, 3), "a picture (batch, 1 or 3, height, width)")
        return Restore(index, shape if len(shape) == 3 else (1, *shape))

    def values(self, outputs: Outputs) -> Tensor:
        """The pictures (b, channels, h, w)."""
        y = outputs[self.index].float()
        return y[:, None] if y.ndim == 3 else y

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """The squared error by the variance of the exact picture."""
        x, y = (self.values(one).double() for one in (exact, outputs))
        return ((x - y).square().mean((1, 2, 3)) / x.var((1, 2, 3)).clamp_min(1e-30)).sum()

    def read(self, path: Path, images: Scored) -> list[Path]:
        """What the pictures should become: pictures of the output's size and channels, as they are seen. Raises BadImages."""
        found = beside(path, images, (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"), "targets")
        for one in found:
            target(one, self.shape)
        return found

    def meter(self, truth: list[Path] | None) -> Likeness:
        return Likeness(self, truth)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        return ("restore",), {"index": self.index}

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
    targets: list[Tensor] = field(default_factory=list)  # (2, channels) of each: means, and those of squares
    given: Range = field(default_factory=Range)  # of the float model's pictures
    shown: Range = field(default_factory=Range)  # of what a screen shows of them, which is in [0, 1]

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start, x, y = len(self.float_like), self.task.values(exact), self.task.values(outputs)
        self.given.add(x)
        self.shown.add(x.clamp(0, 1))
        for k in range(len(x)):
            peak = float(x[k].max() - x[k].min()) or 1.0
            self.float_like.append(likeness(y[k], x[k], peak))
            if self.truth is not None:
                true = target(self.truth[start + k], tuple(x[k].shape))
                self.targets.append(torch.stack([true.double().pow(n).mean((1, 2)) for n in (1, 2)]))
                self.scores.append([v for z in (x[k], y[k]) for v in likeness(z.clamp(0, 1), true, 1.0)])
        return torch.tensor([1 - ssim for ssim, _ in self.float_like[start:]])

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """PSNR in dB against the truth, mean over images; without it SSIM against the float model's picture.
        Raises BadImages where the float model gives one number alone.
        """
        if self.given.is_one:
            count = len(self.float_like)
            why = f"The float model gives every pixel of all {count} scored images the same number, so outputs are compared."
            return rate_by_output(outputs, self.task.index, why)
        like = torch.tensor(self.float_like, dtype=torch.float64)
        measure, rows = "SSIM with the float model's picture", [
            {
                "what": "PSNR of the integer model's picture against the float model's",
                "agreement": float(like[:, 1].mean()), "unit": "dB",
            }
        ]  # fmt: skip
        agreement = 100 * max(float(like[:, 0].mean()), 0.0)
        low, high = of_mean(like[:, 0])
        agreed = Rating("", measure, None, None, agreement, (100 * low, 100 * high), rows=tuple(rows))
        if not self.scores:
            return agreed
        if self.shown.is_one:
            why = (
                f"The float model's pictures have numbers from {self.given.low:.3g} to {self.given.high:.3g}, and those of "
                "pictures are from 0 to 1, so PSNR is not used. Let the model give such."
            )
            return replace(agreed, why=why)
        scores = torch.tensor(self.scores, dtype=torch.float64)
        ssim, psnr, ssim_after, psnr_after = scores.mean(0).tolist()
        interval = of_mean(scores[:, 3] - scores[:, 1])
        more = [{"what": "SSIM", "float": 100 * ssim, "quantized": 100 * ssim_after}]
        guess = psnr_of_mean(torch.stack(self.targets))
        guessed = no_better("PSNR", psnr, guess, "the mean colour of all targets", "dB")
        return by_truth(agreed, "PSNR", psnr, psnr_after, interval, unit="dB", rows=more, guessed=guessed)


def target(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A target, `shape` (channels, h, w), -1 where a size is free; numbers are 0 to 1. Raises BadImages for another."""
    array = read_picture(path, shape[0])
    if any(n not in (-1, found) for n, found in zip((*shape[1:], shape[0]), array.shape, strict=True)):
        found, needed = (
            f"{h} x {w} pixels (height x width) of {c} channel{'s' * (c > 1)}"
            for h, w, c in (array.shape, (*shape[1:], shape[0]))
        )
        raise BadImages(f"{path} is {found}, and the model gives {needed}; give such pictures, or leave --annotations out.")
    return torch.from_numpy(array).permute(2, 0, 1)


def psnr_of_mean(moments: Tensor) -> float:
    """The mean PSNR in dB, at most 100, of a picture of the mean colour of all, from the means of each and of its squares
    (images, 2, channels).
    """
    mean, square = moments.unbind(1)
    colour = mean.mean(0)
    squared = (square - 2 * colour * mean + colour.square()).mean(1)
    return float((-10 * squared.clamp_min(1e-10).log10()).mean())


def likeness(y: Tensor, x: Tensor, peak: float) -> tuple[float, float]:
    """SSIM (Wang et al. 2004) and PSNR in dB, at most 100, of a picture (c, h, w) against another with values up to `peak`."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if not bool((y.isfinite() & x.isfinite()).all()):  # of a picture that has numbers which are none
        return 0.0, 0.0
    squared = float((y.double() - x.double()).square().mean())
    decibel = min(10 * math.log10(peak * peak / squared), 100.0) if squared else 100.0
    value: Any = ssim(y[None], x[None], data_range=peak)
    return (float(value), decibel) if math.isfinite(float(value)) else (0.0, 0.0)  # squares of numbers of 1e20 have no float32
