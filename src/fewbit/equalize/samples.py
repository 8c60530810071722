"""What equalization looks at of the tensors of a graph: rows of some, the extremes of the channels of maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.core.graph import Graph
from fewbit.errors import BadImages
from fewbit.execute.watch import watch


def sample_tensors(
    graph: Graph, batches: Collection[Tensor], names: Collection[str], rows: int, maps: Collection[str] = ()
) -> dict[str, Tensor]:
    """Rows (n, channels) of the tensors in `names`, which have channels last; of those in `maps` (b, c, ...) the low, the high
    and the mean square of each channel (3, c).
    """
    samples: dict[str, Tensor] = {}  # made at once: small tensors that stay between large ones that go leave holes in the heap
    filled = Counter[str]()
    channels: dict[str, list[Any]] = {}
    if not batches:
        raise BadImages("no calibration images; a few dozen are needed: --images DIR.")
    each = max(4, rows // len(batches))
    generator = torch.Generator().manual_seed(0)

    def see_map(name: str, value: Tensor, images: range) -> None:
        others = (0, *range(2, value.ndim))
        part = [value.amin(others), value.amax(others), value.square().mean(others)]
        last = channels.get(name)
        join: tuple[Callable[..., Tensor], ...] = (torch.minimum, torch.maximum, torch.add)
        channels[name] = part if last is None else [f(a, b) for f, a, b in zip(join, last, part, strict=True)]

    def see(name: str, value: Tensor, images: range) -> None:
        flat = value.reshape(-1, value.shape[-1])
        drawn = flat[torch.randperm(len(flat), generator=generator)[:each]]
        if name not in samples:
            samples[name] = drawn.new_empty(each * len(batches), drawn.shape[1])
        samples[name][filled[name] : filled[name] + len(drawn)] = drawn
        filled[name] += len(drawn)

    watch(graph, batches, {name: partial(see_map if name in maps else see, name) for name in {*names, *maps}})
    result = {name: rows[: filled[name]] for name, rows in samples.items()}
    ends = channels.items()
    return result | {name: torch.stack([low, high, squares / len(batches)]) for name, (low, high, squares) in ends}
