"""Which module gets which width: the smallest loss for every number of bytes, exactly.

Losses of modules add up, and so do their sizes. The best configurations of the first k modules are those of the first k - 1,
each with every width of module k, without those that another beats in size and loss: dynamic programming over the Pareto set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.errors import FewbitError


@dataclass(frozen=True)
class Frontier:
    """All configurations that no other beats, smallest first.

    `sizes` (points,) in the unit of the input sizes, `losses` (points,), `picks` (points, modules): the option of each module.
    """

    sizes: NDArray[np.int64]
    losses: NDArray[np.float64]
    picks: NDArray[np.int64]

    def best(self, budget: int) -> int:
        """The point with the smallest loss that is no larger than a budget. Raises FewbitError where none is."""
        place = int(np.searchsorted(self.sizes, budget, side="right")) - 1
        if place < 0:
            raise FewbitError(f"the smallest configuration takes {self.sizes[0]}, the budget is {budget}; give a larger one.")
        return place


def frontier(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> Frontier:
    """The frontier over modules with sizes[module][option] and losses[module][option] >= 0, both summed over modules."""
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    trace: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for options, costs in zip(sizes, losses, strict=True):
        sums = (size[:, None] + np.asarray(options, np.int64)).ravel()
        totals = (loss[:, None] + np.asarray(costs, np.float64)).ravel()
        order = np.lexsort((totals, sums))
        totals = totals[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], totals[:-1]]))
        undominated = order[totals < before]
        size, loss = sums[undominated], totals[totals < before]
        trace.append((undominated // len(options), undominated % len(options)))
    picks = np.empty((len(size), len(trace)), np.int64)
    place = np.arange(len(size))
    for module in reversed(range(len(trace))):
        back, option = trace[module]
        picks[:, module] = option[place]
        place = back[place]
    return Frontier(size, loss, picks)
