"""What stands on an axis, its place in percent of the figure, and its ticks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fewbit.report.words import Json, Rows, tick

CHARACTERS = 80  # that stand side by side below a figure
PLACE, FEWEST = 150, 3  # pixels of a place on an axis in order where there are few, and for how many there is room at least
BESIDE, LETTER = 66, 7  # pixels of a figure left and right of its axis, and of a character
LAST = 0.95  # labels right of it end at their place
ENDS = 0.4  # of a place, left and right of an axis in order together
TICKS = 7  # at most
COMMON = {"model", "module", "net", "blocks", "block", "layers", "layer", "stages", "features"}  # which say nothing of a place
MANY_POINTS = 10  # more have no labels, which would touch

Ticks = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Axis:
    """What stands on an axis: a key of the row, or several keys with their names in the legend; the title has the unit. What is
    over `most` is drawn there.
    """

    keys: str | Mapping[str, str]
    title: str
    scale: float = 1.0
    log: bool = False
    most: float = math.inf

    def series(self) -> Mapping[str, str]:
        return {self.keys: ""} if isinstance(self.keys, str) else self.keys

    def of(self, row: Json, key: str = "") -> float | None:
        value = row.get(key or str(self.keys))
        if not isinstance(value, (int, float)) or math.isnan(value):
            return None
        drawn = min(value * self.scale, self.most)
        return drawn if math.isfinite(drawn) else None

    def values(self, rows: Rows) -> list[float]:
        return [value for row in rows for key in self.series() if (value := self.of(row, key)) is not None]


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`; `ticks` are values with their labels."""

    low: float
    high: float
    ticks: Ticks
    title: str = ""
    log: bool = False
    last: float = 100 * LAST

    def at(self, value: float) -> float:
        """The place of a value, in percent of the axis; what is outside stands at its end."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return round(100 * min((here - low) / (high - low), 1.0), 2)


def linear(values: Sequence[float], title: str = "", *, left: float = 0.06, right: float = 0.06) -> Scale:
    """A scale for these values with room at its ends, ticks at 1, 2 or 5 times a power of ten; whole where all values are."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = high - low or abs(high) or 1.0
    low, high = low - left * span, high + right * span
    rough = (high - low) / TICKS
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * ten for factor in (1, 2, 5, 10) if factor * ten >= rough * 0.999)
    if all(value == int(value) for value in values):
        step = max(step, 1.0)
    first = math.ceil(low / step - 1e-9)
    ticks = ((i * step, tick(round(i * step, 12))) for i in range(first, math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, tuple(ticks), title)


def logarithmic(values: Sequence[float], title: str = "", *, few: bool = False) -> Scale:
    """A logarithmic scale: a tick at every value that is there if they are `few`, else at decades, or at 1, 2 and 5 of each."""
    positive = sorted({value for value in values if value > 0}) or [1.0]
    low, high = math.log10(positive[0]), math.log10(positive[-1])
    room = 0.06 * (high - low or 1.0)
    low, high = low - room, high + room
    factors = (1, 2, 5) if high - low < 3 else (1,)
    every = max(math.ceil((high - low) / TICKS), 1) if len(factors) == 1 else 1
    decades = range(math.floor(low), math.ceil(high) + 1)
    places = [factor * 10.0**power for power in decades if power % every == 0 for factor in factors]
    shown = positive if few and len(positive) <= MANY_POINTS else [p for p in places if low <= math.log10(p) <= high]
    return Scale(10.0**low, 10.0**high, tuple((p, tick(p)) for p in shown), title, log=True)


def most_pixels(places: int) -> int:
    """How wide a figure with so many places side by side may be, its margins included: few do not fill a page."""
    return PLACE * max(places, FEWEST)


def in_order(names: Sequence[str], title: str) -> Scale:
    """The order of the graph, a place for each name, with ticks where a block starts."""
    return Scale(-ENDS / 2 - 0.5, len(names) - 0.5 + ENDS / 2, block_ticks(names), title)


def block_of(name: str) -> str:
    """A short name for the block of a site or op: `blocks.3.mlp.fc1:weight` -> `3`, `layer1.0.conv2` -> `layer1.0`,
    `model.decoder.layers.2.fc1` -> `decoder.2`.
    """
    parts = name.split(":")[0].split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    said = [part for part in parts[:first] if part not in COMMON]
    said = said[-1:] if first < len(parts) else said[:1]
    for here, part in enumerate(parts[first:], first):
        if part.isdigit():
            said.append(part)
        elif part not in COMMON or not parts[min(here + 1, len(parts) - 1)].isdigit():
            break
    return ".".join(said) or parts[0]


def block_ticks(names: Sequence[str]) -> Ticks:
    """Where a new block starts, and its short name. Where labels would touch, the longer block keeps its label."""
    blocks = [block_of(name) for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    length = {start: end - start for start, end in pairwise([*starts, len(names)])}
    pixels = (most_pixels(len(names)) - BESIDE) * len(names) / (len(names) + ENDS)
    room = min(CHARACTERS, int(pixels / LETTER))
    taken: dict[int, tuple[float, float]] = {}
    for start in sorted(starts, key=lambda start: (-length[start], start)):
        place, long = room * start / len(names), len(shorten(blocks[start]))
        low = place - (long if place > LAST * room else long / 2)  # the last labels end at their place
        if all(low > end + 1 or low + long + 1 < begin for begin, end in taken.values()):
            taken[start] = (low, low + long)
    return tuple((i, shorten(blocks[i])) for i in sorted(taken))


def shorten(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
