"""What a search may choose: for each dimension an ordered tuple of options, and what a candidate may cost.

Nothing here knows a model: strategies are tested on scores with known optima.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

Candidate = tuple[int, ...]  # the place of the chosen option in each dimension


@dataclass(frozen=True)
class Dimension:
    """One decision: its name and its options from the finest to the coarsest; `start` is where a search begins."""

    name: str
    options: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class Problem:
    """Dimensions, what a candidate costs (name -> number, cheap to ask for), and the most that each cost may be."""

    dimensions: tuple[Dimension, ...]
    costs: Callable[[Candidate], Mapping[str, float]] = field(default=lambda candidate: {})
    limits: Mapping[str, float] = field(default_factory=dict)

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

    def moved(self, candidate: Candidate, at: int, by: int) -> Candidate | None:
        """The candidate with another option in one dimension; None beyond its ends."""
        place = candidate[at] + by
        if not 0 <= place < len(self.dimensions[at].options):
            return None
        return (*candidate[:at], place, *candidate[at + 1 :])

    def repaired(self, candidate: Candidate, rng: random.Random | None = None) -> Candidate | None:
        """A candidate within the limits, by single steps that each bring it nearer; None where no step does.

        The dimension that is at the finest option goes first, which keeps a candidate uniform; with `rng` any of them. A step
        of more than one place is taken where single ones do not help (float to 6 bits over a slower 8).
        """
        over = self.excess(candidate)
        while over > 0:
            order = list(range(len(candidate)))
            if rng is not None:
                rng.shuffle(order)
            else:
                order.sort(key=lambda i: candidate[i])
            found = next(self._nearer(candidate, order, over), None)
            if found is None:
                return None
            candidate, over = found
        return candidate

    def _nearer(self, candidate: Candidate, order: list[int], over: float) -> Iterator[tuple[Candidate, float]]:
        """Candidates that are less over the limits, each with by how much, the smallest steps first."""
        farthest = max(len(d.options) for d in self.dimensions)
        for size in range(1, farthest):
            for at in order:
                for by in (size, -size):
                    moved = self.moved(candidate, at, by)
                    if moved is not None and (less := self.excess(moved)) < over:
                        yield moved, less
