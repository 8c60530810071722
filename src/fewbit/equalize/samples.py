"""What equalization looks at of the tensors of a graph: rows of some, the extremes of the channels of maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.graph import Graph
from fewbit.errors import BadImages
from fewbit.execute.watch import watch


@dataclass(frozen=True)
class Extremes:
    """Of the channels of a tensor: the low, the high and the mean square; the low and the high in every other image, and in
    those between (of one image: the same twice), and how many numbers a channel has in such a half.
    """

    low: Float[Tensor, "c"]
    high: Float[Tensor, "c"]
    squares: Float[Tensor, "c"]
    halves: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    count: int


class _Ends:
    """The extremes so far."""

    def __init__(self) -> None:
        self.halves: list[tuple[Tensor, Tensor] | None] = [None, None]
        self.squares: Tensor | None = None
        self.batches, self.images, self.numbers = 0, 0, 0

    def see(self, value: Tensor) -> None:
        others = (0, *range(2, value.ndim))
        squares = value.square().mean(others)
        self.squares = squares if self.squares is None else self.squares + squares
        self.batches, self.numbers = self.batches + 1, value[0, 0].numel()
        for k in range(2):
            part = value[(k - self.images) % 2 :: 2]
            if len(part):
                ends, last = (part.amin(others), part.amax(others)), self.halves[k]
                self.halves[k] = ends if last is None else (torch.minimum(last[0], ends[0]), torch.maximum(last[1], ends[1]))
        self.images += len(value)

    def result(self) -> Extremes:
        first = self.halves[0]
        assert first is not None
        assert self.squares is not None
        second = self.halves[1] or first
        squares = self.squares / self.batches
        low, high = torch.minimum(first[0], second[0]), torch.maximum(first[1], second[1])
        return Extremes(low, high, squares, (first, second), max(self.images // 2, 1) * self.numbers)


def sample_tensors(
    graph: Graph, batches: Collection[Tensor], names: Collection[str], rows: int, maps: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Extremes]]:
    """Rows (n, channels) of the tensors in `names`, which have channels last, `rows` of them or as many as there are, and the
    extremes of those in `maps` (b, c, ...).
    """
    samples: dict[str, Tensor] = {}  # made at once: small tensors that stay between large ones that go leave holes in the heap
    filled = Counter[str]()
    channels: dict[str, _Ends] = {name: _Ends() for name in maps}
    if not batches:
        raise BadImages("no calibration images; a few dozen are needed: --images DIR.")
    each = max(4, rows // len(batches))
    generator = torch.Generator().manual_seed(0)

    def see_map(name: str, value: Tensor, images: range) -> None:
        channels[name].see(value)

    def see(name: str, value: Tensor, images: range) -> None:
        flat = value.reshape(-1, value.shape[-1])
        drawn = flat[torch.randperm(len(flat), generator=generator)[:each]]
        if name not in samples:
            samples[name] = drawn.new_empty(each * len(batches), drawn.shape[1])
        samples[name][filled[name] : filled[name] + len(drawn)] = drawn
        filled[name] += len(drawn)

    watch(graph, batches, {name: partial(see_map if name in maps else see, name) for name in {*names, *maps}})
    taken = {name: found[: filled[name]] for name, found in samples.items()}
    return taken, {name: one.result() for name, one in channels.items() if one.images}
