"""Images that are learned themselves: noise that follows the model's gradient until the model sees in it what it should."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fewbit.core.device import CPU, on
from fewbit.data.synthesize.teacher import Teacher
from fewbit.files import going_on_from, write_stream

# Standard deviations of brightness and of each colour around it, in [0, 1]; ImageNet, Tiny ImageNet and CIFAR-10 are alike.
GREY, COLOUR = 0.27, 0.09


@dataclass(frozen=True)
class Inversion(ABC):
    """How images are learned; a subclass says what they are held to.

    They start as `photographic` noise. Adam with `rate` (a ramp over `warm_up` iterations, then a half cosine) for `rounds`
    times `iterations`, each image rolled by up to `jitter` of its size (a share for each round) and mirrored at random, colours
    held in [0, 1]. `batch` images at a time, each batch of its own.
    """

    iterations: int = 500
    rounds: int = 2
    warm_up: int = 100
    batch: int = 32
    rate: float = 0.2
    betas: tuple[float, float] = (0.5, 0.9)
    jitter: tuple[float, ...] = (15 / 224, 30 / 224)

    def __post_init__(self) -> None:
        if min(self.iterations, self.rounds, self.batch, self.warm_up) < 1 or len(self.jitter) < self.rounds:
            raise ValueError(f"counts of at least 1 and a jitter for each round are allowed, not {self}")

    @abstractmethod
    def refuse(self, teacher: Teacher) -> None:
        """Raise BadModel for a model that has not what images are held to."""

    @abstractmethod
    def held(self, teacher: Teacher, labels: Tensor, unit: Tensor, random: torch.Generator) -> Callable[[Tensor], Tensor]:
        """The loss of a batch of images of these classes, as a function of the images; `unit` (c, 1, 1) is black to white."""

    def shorter(self, iterations: int) -> Self:
        """The same schedule in fewer iterations."""
        return replace(self, iterations=iterations, warm_up=max(1, self.warm_up * iterations // self.iterations))

    def steps(self, count: int) -> int:
        """How often `progress` is called for so many images."""
        return -(-count // self.batch) * self.rounds * self.iterations

    def __call__(
        self,
        teacher: Teacher,
        size: tuple[int, int, int],
        classes: int,
        count: int,
        low: Tensor,
        high: Tensor,
        *,
        seed: int = 0,
        kept: Path | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> tuple[Tensor, Tensor]:
        """`count` images (count, c, h, w) and their classes (count,), with colours in [low, high], (c, 1, 1) each.

        Each batch depends on `seed` and its first image's number alone. `kept` is a file with the finished batches, from
        which a killed call resumes. Raises BadModel where the model lacks what the loss needs.
        """
        self.refuse(teacher)
        labels = spread(count, classes)
        batches: list[Tensor] = []
        if kept is not None and kept.exists():
            with going_on_from(kept) as batches:
                if not isinstance(batches, list) or any(batch.shape[1:] != size for batch in batches):
                    raise ValueError("it holds other images")
        for first in range(len(batches) * self.batch, count, self.batch):
            random = torch.Generator().manual_seed(seed * 1_000_003 + first)
            batches.append(self._batch(teacher, size, labels[first : first + self.batch], low, high, random, progress))
            if kept is not None:
                write_stream(kept, lambda file: torch.save(batches, file))
        return torch.cat(batches), labels

    def _batch(
        self, teacher: Teacher, size: tuple[int, int, int], labels: Tensor, low: Tensor, high: Tensor,
        random: torch.Generator, progress: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        labels, low, high = on((labels, low, high), teacher.device)
        images = on(photographic(len(labels), size, on(low, CPU), on(high, CPU), random), teacher.device).requires_grad_()
        optimizer = torch.optim.Adam([images], self.rate, self.betas)
        loss_of = self.held(teacher, labels, high - low, random)
        for shift in self.jitter[: self.rounds]:
            limit = max(1, round(shift * size[1]))
            for i in range(self.iterations):
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(i)
                by = int(torch.randint(-limit, limit + 1, (), generator=random))
                moved = torch.roll(images, (by, by), (2, 3))
                if torch.rand((), generator=random) > 0.5:
                    moved = moved.flip(3)
                loss = loss_of(moved)
                (images.grad,) = torch.autograd.grad(loss, [images])
                optimizer.step()
                with torch.no_grad():
                    images.copy_(images.maximum(low).minimum(high))
                progress(f"loss {float(loss.detach()):.3g}")
        return on(images.detach(), CPU)

    def _rate(self, i: int) -> float:
        if i < self.warm_up:
            return self.rate * (i + 1) / self.warm_up
        return 0.5 * self.rate * (1 + math.cos(math.pi * (i - self.warm_up) / max(1, self.iterations - self.warm_up)))


def spread(count: int, classes: int) -> Tensor:
    """The classes of `count` images: each before any comes again, and the first few far from each other as well.

    Neighbours are alike where classes are in some order (ImageNet begins with fishes and birds), so they come in the order of
    their bits read backwards (van der Corput): a half, a quarter, three quarters, ...
    """
    bits = max(1, (classes - 1).bit_length())
    order = sorted(range(classes), key=lambda label: f"{label:0{bits}b}"[::-1])
    return torch.tensor(order)[torch.arange(count) % classes]


def photographic(count: int, size: tuple[int, int, int], low: Tensor, high: Tensor, random: torch.Generator) -> Tensor:
    """Noise (count, c, h, w) with the statistics of photographs, colours in [low, high], (c, 1, 1) each.

    Amplitudes fall as 1 / frequency (Field 1987, Relations between the statistics of natural images and the response
    properties of cortical cells), and colours go together: brightness spreads `GREY` around the middle, each colour `COLOUR`
    around it.
    """
    height, width = size[1:]
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    amplitude = 1 / (down.square() + right.square()).sqrt().clamp_min(1 / max(height, width))
    amplitude = amplitude / amplitude.square().mean().sqrt()  # so that white noise keeps its variance

    def pink(channels: int) -> Tensor:
        white = torch.randn(count, channels, height, width, generator=random)
        return torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real

    colours = 0.5 + GREY * pink(1) + COLOUR * pink(size[0])
    return low + (high - low) * colours.clamp(0, 1)
