"""How good the artefact is in the runtime, beside the float twin on the same images in the same runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbit.core.inputs import ALONE, count
from fewbit.core.values import Input, Output
from fewbit.data.images import Images
from fewbit.runtimes import open_session
from fewbit.task import Closeness, OutputScore, Rating, Task
from fewbit.verify.outputs import given_by


@dataclass(frozen=True)
class Score:
    """The rating of the file over `images` images, and how near each output is to the float model's.

    `errors` (images,) says for each image how far its outputs are from the float model's, to find the worst ones.
    """

    runtime: str
    images: int
    task: str
    rating: Rating
    outputs: tuple[OutputScore, ...]
    errors: Tensor

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
            "why": rating.why,
            "outputs": [output.to_json() for output in self.outputs],
            "runtime": self.runtime,
        }


def evaluate(
    float_path: Path,
    path: Path,
    images: Images,
    outputs: Sequence[Output],
    task: Task,
    *,
    inputs: Sequence[Input] = ALONE,
    runtime: str = "onnxruntime",
    batch: int = 16,
    threads: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Score:
    """Run both models on every image, batch by batch; predictions are stored, outputs are summed up.

    Raises BadImages or BadValues where the float model's outputs say nothing: NaN, or the same for every image.
    """
    sessions = [open_session(runtime, p, threads=threads) for p in (float_path, path)]
    predictions: list[list[Tensor]] = [[], []]
    closeness = [Closeness(output.name, output.is_real) for output in outputs]
    names, errors = [output.name for output in outputs], list[Tensor]()
    for x in images.batches(batch):
        both = [tuple(map(_real, given_by(session, inputs, x, names).values())) for session in sessions]
        for column, values in zip(predictions, both, strict=True):
            if (predicted := task.predict(values)) is not None:
                column.append(predicted)
        each = [one.add(exact, actual) for one, exact, actual in zip(closeness, *both, strict=True)]
        errors.append(torch.stack(each).amax(0))
        progress(count(x))
    before, after = (torch.cat(column) if column else None for column in predictions)
    scores = tuple(one.score() for one in closeness)
    rating = task.rate(before, after, images.labels, scores)
    return Score(runtime, len(images), task.name, rating, scores, torch.cat(errors))


def _real(output: Tensor) -> Tensor:
    """An output in float32 where the file gives real numbers of another type."""
    return output.float() if output.is_floating_point() else output
