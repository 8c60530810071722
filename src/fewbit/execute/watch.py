"""The float graph over images, some of its nodes handed to functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, count
from fewbit.errors import BadImages
from fewbit.execute.executor import Executor


def watch(graph: Graph, batches: Iterable[Batch], taps: Mapping[str, Callable[[Tensor, range], object]]) -> int:
    """Call functions with the float values of nodes, by name, and the numbers of the images that these belong to.

    One pass over batches of images, without gradients; nothing is kept. Returns the number of images; raises BadImages
    where there is none.
    """
    executor, total = Executor(graph), 0
    with torch.no_grad():
        for batch in batches:
            images = range(total, total + count(batch))
            executor(batch, {name: _of(images, tap) for name, tap in taps.items()})
            total += count(batch)
    if not total:
        raise BadImages("no calibration images; a few dozen are needed: --images DIR.")
    return total


def _of(images: range, tap: Callable[[Tensor, range], object]) -> Callable[[Tensor], object]:
    return lambda value: tap(value, images)
