"""What `--bits` means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewbit.errors import FewbitError


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations."""

    weights: int = 8
    activations: int = 8

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


def parse_bits(text: str | int) -> Bits:
    """`8`, `6`, `w4a8`. Raises FewbitError that says what is allowed."""
    found = re.fullmatch(r"(?:w(\d+)a(\d+)|(\d+))", str(text).strip().lower())
    if found:
        weights, activations, both = found.groups()
        bits = Bits(int(weights or both), int(activations or both))
        if 2 <= bits.weights <= 8 and 2 <= bits.activations <= 8:
            return bits
    raise FewbitError(f"--bits {text} is not understood; allowed are 2 to 8 (weights and activations) or w4a8 (each its own).")
