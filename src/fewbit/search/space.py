"""The search space: an ordered tuple of options for each dimension, and limits on the costs of a candidate.

Independent of models: strategies are tested on scores with known optima.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

Candidate = tuple[int, ...]  # the index of the option in each dimension


@dataclass(frozen=True)
class Dimension:
    """One decision: its name and its options from the finest to the coarsest; `start` is where a search begins."""

    name: str
    options: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class Problem:
    """Dimensions, what a candidate costs (name -> number, cheap to compute), and the limit of each cost."""

    dimensions: tuple[Dimension, ...]
    costs: Callable[[Candidate], Mapping[str, float]] = field(default=lambda candidate: {})
    limits: Mapping[str, float] = field(default_factory=dict)
    _cheapest: dict[str, Candidate] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def start(self) -> Candidate:
        """Where every dimension begins: HAGO's first trial, all at their maximum."""
        return tuple(d.start for d in self.dimensions)

    def excess(self, candidate: Candidate) -> float:
        """By how much a candidate is over its limits, as shares of them, summed; 0 where it is allowed."""
        if not self.limits:
            return 0.0
        costs = self.costs(candidate)
        return sum(max(0.0, costs[name] / limit - 1) for name, limit in self.limits.items())

    def least(self, name: str) -> float:
        """The smallest cost of this name."""
        return self.costs(self.cheapest(name))[name]

    def cheapest(self, name: str) -> Candidate:
        """The candidate with the smallest cost of this name, as far as moving one dimension at a time finds it: from the start,
        and from all at the same option, since some costs (a table that unpacks codes) are those of many at once.
        """
        if name not in self._cheapest:
            found = [self._descended(name, begin) for begin in (self.start, *self._levels(self.start))]
            self._cheapest[name] = min(found, key=lambda candidate: self.costs(candidate)[name])
        return self._cheapest[name]

    def _descended(self, name: str, candidate: Candidate) -> Candidate:
        """From a candidate on, each dimension in turn at the option that costs least."""
        for at, dimension in enumerate(self.dimensions):
            options = [(*candidate[:at], k, *candidate[at + 1 :]) for k in range(len(dimension.options))]
            candidate = min(options, key=lambda one: self.costs(one)[name])
        return candidate

    def _levels(self, candidate: Candidate) -> Iterator[Candidate]:
        """The candidate with all dimensions at least at the second option, at the third and so on."""
        for level in range(1, max((len(d.options) for d in self.dimensions), default=0)):
            yield tuple(max(k, min(level, len(d.options) - 1)) for k, d in zip(candidate, self.dimensions, strict=True))

    def moved(self, candidate: Candidate, at: int, by: int) -> Candidate | None:
        """The candidate with another option in one dimension; None beyond its ends."""
        place = candidate[at] + by
        if not 0 <= place < len(self.dimensions[at].options):
            return None
        return (*candidate[:at], place, *candidate[at + 1 :])

    def repaired(self, candidate: Candidate, rng: random.Random | None = None) -> Candidate | None:
        """A candidate within the limits, by steps in one dimension that each reduce the excess; None where none does.

        The dimension at the finest option goes first, which keeps a candidate uniform; with `rng` the order is random. A step
        skips options only where single ones do not help (float to 6 bits over a slower 8), and moves several dimensions only
        where one does not (what unpacks the first narrower weight takes more than that saves).
        """
        over = self.excess(candidate)
        while over > 0:
            order = list(range(len(candidate)))
            if rng is not None:
                rng.shuffle(order)
            else:
                order.sort(key=lambda i: candidate[i])
            step = next(self._nearer(candidate, order, over), None) or self._several(candidate, over)
            if step is None:
                return None
            candidate, over = step
        return candidate

    def _nearer(self, candidate: Candidate, order: list[int], over: float) -> Iterator[tuple[Candidate, float]]:
        """Candidates with a smaller excess, and that excess; the smallest steps first."""
        farthest = max(len(d.options) for d in self.dimensions)
        for size in range(1, farthest):
            for at in order:
                for by in (size, -size):
                    neighbour = self.moved(candidate, at, by)
                    if neighbour is not None and (less := self.excess(neighbour)) < over:
                        yield neighbour, less

    def _several(self, candidate: Candidate, over: float) -> tuple[Candidate, float] | None:
        """A candidate with a smaller excess in several dimensions, and that excess."""
        ahead = itertools.chain(self._levels(candidate), (self.cheapest(name) for name in self.limits))
        return next(((one, less) for one in ahead if (less := self.excess(one)) < over), None)
