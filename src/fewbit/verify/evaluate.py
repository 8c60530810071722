"""Accuracy of the artefact in the runtime, beside the float twin on the same images in the same runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fewbit.data.images import Images
from fewbit.runtimes import open_session


@dataclass(frozen=True)
class Score:
    """Percentages over `images` images; `float_top1` and `top1` are None without labels.

    `interval` is Wilson's 95 % interval of top1, or of the agreement where there are no labels. `float_answers` and
    `answers` are the classes per image, int64 (images,).
    """

    runtime: str
    images: int
    float_top1: float | None
    top1: float | None
    agreement: float
    cosine: float
    interval: tuple[float, float]
    float_answers: Tensor
    answers: Tensor

    def to_json(self) -> dict[str, object]:
        return {
            "float": self.float_top1,
            "quantized": self.top1,
            "agreement": self.agreement,
            "cosine": self.cosine,
            "interval": list(self.interval),
            "runtime": self.runtime,
        }


def evaluate(
    float_path: Path,
    path: Path,
    images: Images,
    *,
    runtime: str = "onnxruntime",
    batch: int = 16,
    threads: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Score:
    """Run both models on every image, batch by batch; only the predicted classes are stored."""
    sessions = [open_session(runtime, p, threads=threads) for p in (float_path, path)]
    answers: list[list[Tensor]] = [[], []]
    cosines = 0.0
    for x in images.batches(batch):
        outputs = [torch.from_numpy(np.array(session.run(x.numpy())["logits"])) for session in sessions]
        for column, out in zip(answers, outputs, strict=True):
            column.append(out.flatten(1).argmax(1))
        cosines += float(torch.nn.functional.cosine_similarity(outputs[0].flatten(1), outputs[1].flatten(1)).sum())
        progress(len(x))
    before, after = (torch.cat(column) for column in answers)
    count = len(before)
    agree = int((before == after).sum())
    labels = images.labels
    hits = None if labels is None else int((after == labels).sum())
    return Score(
        runtime,
        count,
        None if labels is None else 100 * int((before == labels).sum()) / count,
        None if hits is None else 100 * hits / count,
        100 * agree / count,
        cosines / count,
        wilson(agree if hits is None else hits, count),
        before,
        after,
    )


def wilson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share, in percent (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)
