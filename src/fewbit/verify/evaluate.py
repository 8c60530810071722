"""How good the artefact is in the runtime, beside the float twin on the same images in the same runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewbit.core.graph import Turned
from fewbit.core.inputs import ALONE, Batch, Input, count, images_of
from fewbit.core.task import Output, Outputs, Rating, Task, told
from fewbit.data.images import Images
from fewbit.errors import BadImages, BadModel, CannotRun
from fewbit.runtimes import AS_WRITTEN, Session, open_session
from fewbit.task import Closeness, OutputScore
from fewbit.task.interval import of_mean
from fewbit.verify.outputs import given_by
from fewbit.verify.tail import shared
from fewbit.workers import LOCAL, Workers

TOGETHER = 4  # batches in a task
DRAWN = 12  # images whose predictions are drawn
MORE = 4  # times as many images as before, where those say nothing


@dataclass(frozen=True)
class Score:
    """The rating of the file over `images` images, and how near each output is to the float model's.

    `errors` (images,) says for each image how far its predictions or outputs are from the float model's, to find the worst
    ones; `pictures` are those with the predictions of the float and the integer model drawn on them, by index, where the task
    draws.
    """

    runtime: str
    images: int
    task: str
    rating: Rating
    outputs: tuple[OutputScore, ...]
    errors: Tensor
    pictures: Mapping[int, tuple[Image.Image, Image.Image]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        rating = self.rating
        return {
            "task": self.task,
            "measure": rating.measure,
            "float": rating.float_score,
            "quantized": rating.score,
            "agreement": rating.agreement,
            "agreement_measure": rating.agreement_measure,
            "interval": list(rating.interval),
            "unit": rating.unit,
            "rows": [told(row) for row in rating.rows],
            "why": rating.why,
            "outputs": [output.to_json() for output in self.outputs],
            "runtime": self.runtime,
        }


LEAVE_OUT = "Leave such images out, or let the model run on any: mend it, or export it again."


def evaluate(
    float_path: Path,
    path: Path,
    images: Images,
    outputs: Sequence[Output],
    task: Task,
    *,
    inputs: Sequence[Input] = ALONE,
    inside: Sequence[str] = (),
    behind: Sequence[str] = (),
    turned: Mapping[str, Turned] | None = None,
    runtime: str = AS_WRITTEN,
    batch: int = 16,
    threads: int = 0,
    progress: Callable[[int], None] = lambda n: None,
    workers: Workers = LOCAL,
    drawn: bool = True,
) -> Score:
    """Run both models on every image, batch by batch; predictions are stored, outputs are summed up, here and in the order of
    the images, whoever ran the models.

    `inside` are those of the outputs that the files do not give by themselves, which are not rated; `behind` are the outputs of
    a tail, of which rows are counted. Those that are `turned` are called as their files call them, and rated. Predictions are
    `drawn` where the task does that.

    Raises BadImages or BadValues where the float model's outputs say nothing: NaN, or the same for every image.
    """
    closeness = [Closeness(output.name, output.is_real) for output in outputs]
    meter = task.meter(images.labels if images.truth is None else images.truth)
    names, found = [output.name for output in outputs], list[Tensor]()
    called = {name: one.name for name, one in (turned or {}).items()}
    same = {name: _Rows(name) for name in behind if name not in called.values()}
    files = _Files((float_path, path), runtime, threads, tuple(inputs), (*names, *same), tuple(inside))
    for done, given in workers.each(partial(_run, files, images, batch), len(images), TOGETHER * batch):
        both = [values[: len(names)] for values in given]
        each = [one.add(exact, actual) for one, exact, actual in zip(closeness, *both, strict=True)]
        apart = meter.add(*both)
        found.append(torch.stack(each).amax(0) if apart is None else apart)
        for rows, exact, actual in zip(same.values(), *(values[len(names) :] for values in given), strict=True):
            rows.add(exact, actual)
        progress(done)
    scores, errors = [*(one.score() for one in closeness), *(one.score() for one in same.values())], torch.cat(found)
    scores = [replace(one, inside=one.name in {*inside} - {*called}, name=called.get(one.name, one.name)) for one in scores]
    rating = meter.rating(scores)
    pictures = _pictures(task, files, images, errors, batch) if drawn and type(task).drawn is not Task.drawn else {}
    return Score(runtime, len(images), task.spec, rating, tuple(scores), errors, pictures)


def refuse_silent(path: Path, images: Images, outputs: Sequence[Output], task: Task, *, first: int, **options: Any) -> None:
    """Raise BadImages or BadValues where the float model's outputs say nothing of any image, as `evaluate` would, which has the
    same `options`: by the `first` images, and where these say nothing by more of them, in the end by all.

    What a task of a user's own cannot rate is left to `evaluate`: here nothing differs.
    """
    count = first
    while True:
        try:
            evaluate(path, path, images.subset(range(min(count, len(images)))), outputs, task, drawn=False, **options)
        except BadImages:
            if count >= len(images):
                raise
            count *= MORE
        except BadModel:
            return
        else:
            return


@dataclass
class _Rows:
    """An output of which each image has a share of rows that both models give."""

    name: str
    shares: list[float] = field(default_factory=list)
    first: Tensor | None = None  # of the float model
    varies: bool = False

    def add(self, exact: Tensor, actual: Tensor) -> None:
        self.shares.append(shared(exact, actual))
        self.varies |= self.first is not None and not torch.equal(self.first, exact)
        self.first = exact if self.first is None else self.first

    def score(self) -> OutputScore:
        """Of all images so far; where the float model gives the same rows for several, or none for one, that says nothing."""
        assert self.first is not None
        if not self.varies and (len(self.shares) > 1 or not self.first.numel()):
            return OutputScore(self.name, False, None, are_rows=True)
        shares = torch.tensor(self.shares, dtype=torch.float64)
        low, high = of_mean(shares)
        return OutputScore(self.name, False, 100 * float(shares.mean()), (100 * low, 100 * high), are_rows=True)


@dataclass(frozen=True)
class _Files:
    """Both files, opened when a batch is first given to them; the outputs `names` of it. One that is given twice is run once.
    In another process they are opened again.
    """

    paths: tuple[Path, ...]
    runtime: str
    threads: int
    inputs: tuple[Input, ...]
    names: tuple[str, ...]
    inside: tuple[str, ...]

    @cached_property
    def sessions(self) -> dict[Path, Session]:
        return {path: open_session(self.runtime, path, threads=self.threads, outputs=self.inside) for path in self.paths}

    def __call__(self, x: Batch) -> list[Outputs]:
        found = {path: given_by(one, self.inputs, x, self.names).values() for path, one in self.sessions.items()}
        return [tuple(map(_real, found[path])) for path in self.paths]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _run(files: _Files, images: Images, batch: int, indices: range) -> Iterator[tuple[int, list[Outputs]]]:
    """(images, outputs of both files) of the images at `indices`, batch by batch."""
    chosen, place = images.subset(indices), 0
    for x in chosen.batches(batch):
        try:
            outputs = files(x)
        except CannotRun as error:
            names = chosen.names[place : place + count(x)]
            of = f"on {names[0]}" if len(names) == 1 else f"on one of {names[0]} to {names[-1]}"
            raise CannotRun(f"{str(error).replace('on some of the images', of, 1)} {LEAVE_OUT}") from error
        yield count(x), outputs
        place += count(x)


def _pictures(
    task: Task, compared: Callable[[Batch], list[Outputs]], images: Images, errors: Tensor, batch: int
) -> dict[int, tuple[Image.Image, Image.Image]]:
    """Predictions of both models on the images that differ most."""
    pictures = {}
    for i in errors.argsort(descending=True)[:DRAWN].tolist():
        first = i - i % batch
        x = next(iter(images.subset(range(first, min(first + batch, len(images)))).batches(batch)))
        picture = images.preprocess.undo(images_of(x)[i - first])
        before, after = (task.drawn(picture.copy(), [y[i - first : i - first + 1] for y in one]) for one in compared(x))
        if before is not None and after is not None:
            pictures[i] = before, after
    return pictures


def _real(output: Tensor) -> Tensor:
    """An output in float32 where the file gives real numbers of another type."""
    return output.float() if output.is_floating_point() else output
