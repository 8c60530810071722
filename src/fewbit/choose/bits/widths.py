"""What `--bits` means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fewbit.errors import FewbitError

WIDTHS = range(2, 17)  # that a grid may have; what a target holds is its own business
SPREAD = 2  # candidates below and above the mean width: {4..8} for 6, {6..10} for 8 (Liu et al. 2021, section 4.1)


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; `ops` has ops with another width of both, by name. `asked` is how it was asked for."""

    weights: int = 8
    activations: int = 8
    ops: Mapping[str, int] = field(default_factory=dict)
    asked: str = ""

    def __str__(self) -> str:
        return self.asked or f"w{self.weights}a{self.activations}"


@dataclass(frozen=True)
class Mixed:
    """One width for each attention module and each MLP, so that a weight has `mean` bits on average at most."""

    mean: float
    candidates: tuple[int, ...]

    def __str__(self) -> str:
        return f"mixed:{self.mean:g}:{','.join(map(str, self.candidates))}"


def parse_bits(text: str | int) -> Bits | Mixed:
    """`8`, `6`, `w4a8`, `mixed:6.0`, `mixed:6.0:4,6,8`. Raises FewbitError that says what is allowed."""
    asked = str(text).strip().lower()
    if found := re.fullmatch(r"(?:w(\d+)a(\d+)|(\d+))", asked):
        weights, activations, both = found.groups()
        bits = Bits(int(weights or both), int(activations or both))
        if bits.weights in WIDTHS and bits.activations in WIDTHS:
            return bits
    if found := re.fullmatch(r"mixed:(\d+(?:\.\d+)?)(?::(\d+(?:,\d+)*))?", asked):
        mean = float(found[1])
        middle = round(mean)
        listed = map(int, found[2].split(",")) if found[2] else range(middle - SPREAD, middle + SPREAD + 1)
        candidates = tuple(sorted({b for b in listed if found[2] or b in WIDTHS}))
        if candidates and all(b in WIDTHS for b in candidates) and mean >= candidates[0]:
            return Mixed(mean, candidates)
    raise FewbitError(
        f"--bits {text} is not understood; allowed are 2 to 16 (weights and activations), w4a8 (each its own), mixed:6.0 (a "
        "width for each module, 6.0 bits a weight on average) and mixed:6.0:4,6,8 (from these widths, the mean not below them)."
    )
