"""Images from batch-norm statistics: Zhong et al. 2022, Fine-grained Data Distribution Alignment (2109.04186)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.core.device import CPU, on
from fewbit.data.synthesize.generator import ImageGenerator, generator_of
from fewbit.data.synthesize.losses import deep_from, distance, distorted
from fewbit.data.synthesize.teacher import Moments, Seen, Teacher, refuse_without_norms
from fewbit.errors import BadImages
from fewbit.files import going_on_from, write_stream


@dataclass(frozen=True)
class Centres:
    """Statistics of each class's calibration images, (classes, channels) for each batch norm.

    `known` (classes,) says which classes have an image, `right` those whose images the model gives their class.
    """

    moments: Moments
    known: Tensor
    right: Tensor

    def classes(self, *, trusted: bool) -> list[int]:
        """Classes with a centre; of these the ones that are right, if there are any."""
        right = self.right.nonzero().flatten().tolist()
        return right if trusted and right else self.known.nonzero().flatten().tolist()


def centres_of(teacher: Teacher, images: Iterable[Tensor], labels: Tensor | None, classes: int) -> Centres:
    """The centres from images that come one by one (1, c, h, w). Of several of a class the mean is taken.

    Without labels (n,) the model's own answers are the classes. Raises BadImages for a label that is not a class.
    """
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise BadImages(f"labels go from {int(labels.min())} to {int(labels.max())}; the model has {classes} classes.")
    sums: tuple[list[Tensor], list[Tensor]] | None = None
    counts, wrong = torch.zeros(classes), torch.zeros(classes, dtype=torch.bool)
    with torch.no_grad():
        for i, image in enumerate(images):
            response = on(teacher(image), CPU)
            answer = int(response.logits.argmax(1))
            label = answer if labels is None else int(labels[i])
            pairs = (response.moments.means, response.moments.variances)
            if sums is None:
                sums = ([torch.zeros(classes, len(m)) for m in pairs[0]], [torch.zeros(classes, len(m)) for m in pairs[0]])
            for totals, values in zip(sums, pairs, strict=True):
                for total, value in zip(totals, values, strict=True):
                    total[label] += value
            counts[label] += 1
            wrong[label] |= label != answer
    if sums is None:
        raise BadImages("no calibration images; the centres of classes need one of each class, or of some.")
    means, variances = (tuple(total / counts.clamp_min(1)[:, None] for total in totals) for totals in sums)
    return Centres(Moments(means, variances), counts > 0, (counts > 0) & ~wrong)


@dataclass(frozen=True)
class Fdda:
    """A class-conditional generator, trained so that the batch-norm inputs of its images match the running statistics.

        L = ce · (CE(G(z, y), y) + CE(G(z, c), c)) + bns · L_BNS + distorted · L_D + centralized · L_C

    L_BNS holds a batch of all classes to the running statistics; L_C and L_D hold a batch of one class c, in the deep half of
    the layers, to those of the class's calibration images, as they are and with noise of `mean_noise` and `variance_noise`.
    Classes are drawn from all that have an image in the first `trusting` epochs, then from those that the model gets right.
    Without calibration images the loss is CE + bns · L_BNS. Adam with `rate`, times `drop` at the epochs `drops`. Images are
    drawn at the end of every epoch behind the first `warm_up`, equally many each. Defaults are the paper's.
    """

    epochs: int = 400
    iterations: int = 200
    warm_up: int = 50
    trusting: int = 5
    batch: int = 16
    rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    drops: tuple[int, ...] = (100, 200, 300)
    drop: float = 0.1
    ce: float = 0.5
    bns: float = 0.2
    distorted: float = 0.9
    centralized: float = 0.01
    mean_noise: float = 0.5
    variance_noise: float = 1.0
    latent: int = 100
    channels: int = 128

    def __post_init__(self) -> None:
        if min(self.epochs, self.iterations) < 1 or not 0 <= self.warm_up < self.epochs or self.batch < 2:
            raise ValueError(f"epochs > warm_up >= 0, iterations >= 1 and batch >= 2 are allowed, not {self}")

    def shorter(self, epochs: int, iterations: int) -> Fdda:
        """The same schedule in fewer steps, with numbers of epochs scaled in proportion."""

        def part(n: int) -> int:
            return n * epochs // self.epochs

        drops = tuple(part(n) for n in self.drops)
        return replace(
            self, epochs=epochs, iterations=iterations, warm_up=part(self.warm_up), trusting=part(self.trusting), drops=drops
        )

    def __call__(
        self,
        teacher: Teacher,
        size: tuple[int, int, int],
        classes: int,
        count: int,
        centres: Centres | None = None,
        *,
        seed: int = 0,
        kept: Path | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> tuple[Tensor, Tensor]:
        """`count` images (count, c, h, w) and their classes (count,). `progress` is told of every epoch.

        `kept` is a checkpoint file, written after each epoch, from which a killed call resumes. Raises BadModel for a model
        without batch norm.
        """
        refuse_without_norms(teacher)
        state, centres = _State(self, size, classes, seed, teacher.device), on(centres, teacher.device)
        if kept is not None and kept.exists():
            state.load(kept)
        for epoch in range(state.epoch, self.epochs):
            state.rate(self.rate * self.drop ** sum(epoch >= at for at in self.drops))
            loss = math.nan
            for _ in range(self.iterations):
                loss = self._step(state, teacher, centres, epoch)
            state.epoch = epoch + 1
            state.draw(self._due(epoch, count) - len(state.labels))
            progress(f"loss {loss:.3g}")
            if kept is not None:
                state.save(kept)
        return torch.cat(state.images), torch.tensor(state.labels)

    def loss(self, response: Seen, labels: Tensor, running: Moments) -> Tensor:
        """The loss of images of all classes, without centres."""
        return F.cross_entropy(response.logits, labels) + self.bns * distance(response.moments, running)

    def loss_of_class(self, response: Seen, label: int, centre: Moments, generator: torch.Generator) -> Tensor:
        """The additional loss of images of one class with centres, including cross-entropy."""
        first = deep_from(len(centre))
        moments, target = response.moments.from_layer(first), centre.from_layer(first)
        noisy = distorted(target, self.mean_noise, self.variance_noise, generator)
        ce = F.cross_entropy(response.logits, torch.full((len(response.logits),), label, device=response.logits.device))
        return self.ce * ce + self.distorted * distance(moments, noisy) + self.centralized * distance(moments, target)

    def _step(self, state: _State, teacher: Teacher, centres: Centres | None, epoch: int) -> float:
        """One step of the generator; the loss before it."""
        labels = torch.randint(state.classes, (self.batch,), generator=state.random).to(teacher.device)
        response = teacher(state.generate(labels))
        if centres is None:
            loss = self.loss(response, labels, teacher.running)
        else:
            candidates = centres.classes(trusted=epoch >= self.trusting)
            label = candidates[int(torch.randint(len(candidates), (), generator=state.random))]
            response_of_class = teacher(state.generate(torch.full((self.batch,), label)))
            loss = self.ce * F.cross_entropy(response.logits, labels) + self.bns * distance(response.moments, teacher.running)
            loss = loss + self.loss_of_class(response_of_class, label, centres.moments.of(label), state.random)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        return float(loss.detach())

    def _due(self, epoch: int, count: int) -> int:
        """How many images have been drawn after an epoch."""
        return max(epoch + 1 - self.warm_up, 0) * count // (self.epochs - self.warm_up)


class _State:
    """Everything that changes while a generator is trained."""

    def __init__(self, settings: Fdda, size: tuple[int, int, int], classes: int, seed: int, device: torch.device) -> None:
        self.device = device
        self.settings, self.classes = settings, classes
        self.generator: ImageGenerator = generator_of(size, classes, settings.latent, settings.channels, seed).to(device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), settings.rate, settings.betas)
        self.random = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.images: list[Tensor] = []
        self.labels: list[int] = []

    def rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def generate(self, labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), self.generator.latent, generator=self.random)
        return self.generator(noise.to(self.device), labels.to(self.device))  # type: ignore[no-any-return]

    def draw(self, count: int) -> None:
        """Generate and store `count` more images, the classes in turn; surplus images of the last batch are dropped."""
        while count > 0:
            batch = self.settings.batch
            labels = (torch.arange(batch) + len(self.labels)) % self.classes
            with torch.no_grad():
                images = self.generate(labels)[: min(count, batch)]
            self.images.append(on(images, CPU))
            self.labels += labels[: len(images)].tolist()
            count -= len(images)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "generator": on(self.generator.state_dict(), CPU),
            "optimizer": on(self.optimizer.state_dict(), CPU),
            "random": self.random.get_state(),
            "epoch": self.epoch,
            "images": self.images,
            "labels": self.labels,
        }
        write_stream(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        with going_on_from(path) as state:
            self.generator.load_state_dict(state["generator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.random.set_state(state["random"])
            self.epoch, self.images, self.labels = state["epoch"], state["images"], state["labels"]
