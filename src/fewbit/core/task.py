"""What the outputs of a model mean: the base of every task, and the values that tasks give. Tasks themselves are in `task/`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from torch import Tensor

from fewbit.errors import BadImages, BadValues

Json = Any
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Output:
    """A tensor that a model returns: its name in the file, its shape for one image (without the batch), and whether it
    holds real numbers; integers (classes of pixels, indices) are compared for equality.
    """

    name: str
    shape: tuple[int, ...]
    is_real: bool = True

    @property
    def is_list(self) -> bool:
        """Whether it is a list of two or more real numbers for each image."""
        return self.is_real and len(self.shape) == 1 and self.shape[0] >= 2


@dataclass(frozen=True)
class Signature:
    """What a task is made for: the outputs of a model, (height, width) of its images, the names of its classes, if known."""

    outputs: Sequence[Output]
    size: tuple[int, int]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class OutputScore:
    """One output against the float model's.

    `agreement` is in percent, with its 95 % `interval`: the correlation (mean over channels, 0 where it is negative) of real
    numbers, equal elements of integers; None where the float model's output is the same everywhere, so that nothing can be
    said. `relative_error` is the root mean square error by the standard deviation of the float output, mean over channels;
    None for integers. `are_rows`: of an output behind a tail, the rows that both files give, mean over images. `inside`: the
    files do not give it by themselves, since a tail reads it. `few`: nothing is said, since one or two numbers correlate
    whatever they are.
    """

    name: str
    is_real: bool
    agreement: float | None
    interval: tuple[float, float] | None = None
    relative_error: float | None = None
    are_rows: bool = False
    inside: bool = False
    few: bool = False

    @property
    def measure(self) -> str:
        """What agrees, in words."""
        return f"{self._what} of {self.name} with the float model's"

    @property
    def _what(self) -> str:
        return "rows that both give" if self.are_rows else "correlation" if self.is_real else "equal elements"

    def to_json(self) -> dict[str, object]:
        return {
            "output": self.name,
            "measure": self._what,
            "agreement": self.agreement,
            "interval": None if self.interval is None else list(self.interval),
            "relative_error": self.relative_error,
        }


@dataclass(frozen=True)
class Rating:
    """How good the integer model is: with labels by `measure` of both models in `unit`, always by agreement of both in percent.

    More is better. `agreement_measure` says in what they agree. `interval` (95 %) is that of the difference `score` minus
    `float_score`, or of the agreement where there are no labels. `why` says why another measure than the task's first was
    taken, if one was. `float_answers` and `answers` are the classes of the images, int64 (images,), of a task that gives such.
    `rows` are further measures, by class or size: each has a `what` and numbers (`float`, `quantized`, `agreement` or `error`),
    and, where they are not percent of which more is better, a `unit` ("dB"; "" for none) and what is `better`: "less".
    """

    measure: str
    agreement_measure: str
    float_score: float | None
    score: float | None
    agreement: float
    interval: tuple[float, float]
    why: str = ""
    float_answers: Tensor | None = None
    answers: Tensor | None = None
    unit: str = "%"
    rows: tuple[Mapping[str, Json], ...] = ()


def told(row: Mapping[str, Json]) -> dict[str, Json]:
    """A row of a rating with its unit, and whether more or less is better."""
    return {"unit": "%", "better": "more", **row}


class Meter(Protocol):
    """Sums of one comparison of two models, batch by batch."""

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor | None:
        """The outputs of the float and the integer model for the next images, (b, ...) each.

        Gives how far apart the predictions are for each image (b,), 0 or more, by which the worst are found; None where the
        outputs themselves say that.
        """

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """Of all images so far; `outputs` say how near each output is."""


class Scored(Protocol):
    """The images that a task reads labels for."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def paths(self) -> tuple[str, ...]:
        """What a file that belongs to an image is found by: the path that a row of parquet has for its image, else the name."""

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture in pixels, before it is prepared."""

    def placed(self, size: tuple[int, int]) -> Placement:
        """Where a picture of a size comes to lie in the input of the model."""


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in a model's input: what stood at column x is at x * `scale[0]` + `shift[0]`, likewise rows."""

    scale: tuple[float, float]
    shift: tuple[float, float]
    size: tuple[int, int]  # (height, width) of the input


class Task(ABC):
    """What a model's outputs mean. `exact` and `outputs` are the float and the integer model's, batches (b, ...) each.

    A task of your own is a class like those in `task/`, in a file that `--task file.py:NAME` names. It has to give a `meter`;
    all else has a default.
    """

    name: ClassVar[str]
    distance: ClassVar[str] = "the task's own"  # what `divergence` is, with its unit
    classes: int | None = None  # how many classes the label of an image may name; None for a task without such labels
    names: tuple[str, ...] = ()  # of the classes, if known

    @property
    def logits(self) -> int | None:
        """The number of the output with a logit for each class of an image, (b, classes); None of a task without such.
        `--loss labels`, fine-tuning and weights by Fisher information read it.
        """
        return None

    @property
    def spec(self) -> str:
        """As `--task` takes it."""
        return self.name

    def called(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.names[index] if index < len(self.names) else f"class {index}"

    @abstractmethod
    def meter(self, truth: Any) -> Meter:
        """What compares two models; `truth` is what `read` gave, of a classifier the classes (n,), or None."""

    @abstractmethod
    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor | float:
        """How far the outputs are from exact ones, 0 or more, summed over the images of a batch: the loss of a whole model, of
        shape (). A tensor passes gradients on; a recipe that trains (`best`) needs one.
        """

    def softened(self, outputs: Outputs, temperature: float) -> Outputs:
        """The outputs with logits divided by a temperature, where the divergence is one of logits."""
        return outputs

    def read(self, path: Path, images: Scored) -> list[Any]:
        """What is known of each image, from a file or a folder. Raises BadImages for what it cannot be."""
        raise BadImages(
            f"--annotations {path}: task {self.spec} has none; leave it out, or say what the model does: --task NAME."
        )

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image | None:
        """The prediction for one image on its picture (the model's input as RGB), from outputs (1, ...); None: not drawn."""
        return None

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        """The pieces of `predict.py` (deploy/python/) that make an answer of the outputs, one of which defines `answer`, and
        the numbers that they need, as JSON. By default the answer is the outputs.
        """
        return ("numbers",), {}


def mean_divergence(task: Task, exact: Outputs, outputs: Outputs, what: str) -> float:
    """The divergence of a batch of outputs, mean over images; 0 where rounding makes it less. `what` is in integers, in words.

    Raises BadValues where it is not a finite number.
    """
    mean = float(task.divergence(exact, outputs)) / len(exact[0])
    if not math.isfinite(mean):
        raise BadValues(
            f"task {task.spec}: the divergence from the float model with {what} in integers is {mean}; a finite number is "
            "needed. Look at the numbers that the model gives, or leave that in float: --keep-float NAME."
        )
    return max(0.0, mean)
