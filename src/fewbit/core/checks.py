"""Checks: for each site and output how simulation and runtime differ; verify makes them, the verdict reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = Any
HANDFUL = 8  # ties of a site that chance may bring, however few codes it has
CHANCE = 0.01  # of the codes of a site: chance brings a tie in some hundred thousand


def crowded(ties: int, compared: int) -> bool:
    """Whether so many of the codes of a site are ties that chance does not bring them."""
    return ties > max(HANDFUL, CHANCE * compared)


@dataclass(frozen=True)
class SiteCheck:
    """Codes of one site, simulation against runtime, the same upstream codes in both.

    `ties` are off-by-one differences where the simulation stands at a rounding boundary (verify/ties.py); `wrong` is the rest.
    """

    site: str
    compared: int
    differing: int
    ties: int
    wrong: int
    max_difference: int

    @property
    def crowded(self) -> bool:
        """Whether more of its codes are ties than chance brings: most often channels that are the same for every image."""
        return crowded(self.ties, self.compared)


@dataclass(frozen=True)
class SelectionCheck:
    """What a node that selects (top-k, sorting, the place of the largest), compares numbers (a threshold) or rounds them to
    whole ones chose in a runtime, by the simulation's own numbers; `does` says which.

    Of `compared` rows `near` are chosen otherwise than by the simulation, among scores that float32 rounding may order either
    way (verify/selections.py); `wrong` are those that it does not explain. There a score misses its place by `difference`,
    where `limit` is explained; 0 where a place is chosen twice. Where numbers are compared or rounded each row is one number,
    `difference` is how far it is from its threshold, and 0 where it stands on it whatever rounding does (verify/thresholds.py).
    """

    node: str
    compared: int
    near: int
    wrong: int
    difference: float
    limit: float
    does: Literal["selects", "compares", "rounds"] = "selects"


@dataclass(frozen=True)
class OutputCheck:
    """One output of a file in a runtime (`place` says which and where), against what it should be.

    `limit` is the largest difference that rounding explains, `usual_limit` that of the middle one of all numbers (`usual`);
    agreement is that of the largest entry, in percent.
    """

    place: str
    output: str
    difference: float
    limit: float
    cosine: float
    agreement: float
    usual: float = 0.0
    usual_limit: float = math.inf

    @property
    def wrong(self) -> bool:
        return not (self.difference <= self.limit and self.usual <= self.usual_limit)  # a NaN is wrong, too

    @property
    def said(self) -> str:
        """In words, by how much it differs, and how much rounding explains: of the largest difference, or of the middle one
        where that alone is too large.
        """
        if self.difference == float("inf"):
            return "has another shape, or infinite numbers where the other has none"
        if self.difference <= self.limit and self.wrong:
            return f"differs by {self.usual:.3g} in the middle, where float32 rounding explains {self.usual_limit:.2g}"
        return f"differs by {self.difference:.3g}, where float32 rounding explains {self.limit:.2g}"


@dataclass(frozen=True)
class Gap:
    """How far an output of a file is from what the simulation gives by itself, with its own codes at every site.

    `difference` is the largest of all numbers, `usual` the middle one, and `spread` the standard deviation of the simulation's
    numbers. Of whole numbers `difference` is the share of unequal ones, and `spread` is None. Infinite: of another shape.
    """

    place: str
    output: str
    difference: float
    usual: float
    spread: float | None


@dataclass(frozen=True)
class Deviation:
    """A tensor or a node of a file that is not what the plan gives, and what is different about it."""

    file: str
    name: str
    what: str


@dataclass(frozen=True)
class Checks:
    """Verify's tables: the file's own codes of weights and biases, codes of activations as written (off) and optimised as
    the file ships (on), and outputs. `file` is what differs from the same plan realized again; None: not looked at.
    `selections` are what the runtime chose by comparing numbers, off and on. `gaps` are looked at where ties are more than
    chance brings, or where the file as it ships has other ties than the one that shows its codes.
    """

    off: tuple[SiteCheck, ...]
    on: tuple[SiteCheck, ...]
    outputs: tuple[OutputCheck, ...]
    kernels: Mapping[str, Json] = field(default_factory=dict)
    weights: tuple[SiteCheck, ...] = ()
    file: tuple[Deviation, ...] | None = None
    selections: tuple[tuple[SelectionCheck, ...], tuple[SelectionCheck, ...]] = ((), ())
    gaps: tuple[Gap, ...] = ()

    @property
    def codes(self) -> tuple[SiteCheck, ...]:
        """Every table of codes; sites in the order in which the graph computes them."""
        return self.weights + self.off + self.on

    @property
    def crowded(self) -> tuple[SiteCheck, ...]:
        """The sites with more ties than chance brings, each in that table where it has most, most ties first."""
        most = dict[str, SiteCheck]()
        for check in sorted(self.off + self.on, key=lambda check: -check.ties):
            most.setdefault(check.site, check)
        return tuple(check for check in most.values() if check.crowded)

    @property
    def wrong(self) -> tuple[SiteCheck, ...]:
        return tuple(check for check in self.codes if check.wrong)

    @property
    def wrong_outputs(self) -> tuple[OutputCheck, ...]:
        return tuple(check for check in self.outputs if check.wrong)
