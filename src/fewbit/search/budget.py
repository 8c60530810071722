"""A budget as it is typed: what it limits, and how much; and the words about one that cannot be kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from fewbit.errors import FewbitError

WIDEST = 16  # bits
UNITS = {"bit": ("bits", 1.0), "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "b": ("bytes", 1.0), "ms": ("ms", 1.0)}
SHOWN = {"bits": ("bit", 1.0, 2), "bytes": ("KB", 1e3, 1), "ms": ("ms", 1.0, 3)}  # unit, its size, decimals


def parse_budget(text: str) -> tuple[str, float]:
    """(cost, limit) of `6bit` (per weight on average), `3MB`, `900KB` or `20ms`. Raises FewbitError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(bits?|[km]?b|ms)\s*", str(text).lower(), re.ASCII)
    if match is None or float(match[1]) <= 0 or (match[2].startswith("bit") and float(match[1]) > WIDEST):
        raise FewbitError(
            f"--budget {text} is not understood; allowed are 6bit (a weight has 6 bits on average, at most 16), 3MB or "
            "900KB (the file) and 20ms (one image in the target's runtime)."
        )
    name, factor = UNITS[match[2].rstrip("s") if match[2] != "ms" else "ms"]
    return name, float(match[1]) * factor


def shown(name: str, limit: float) -> str:
    """A budget that was typed, with all its digits."""
    unit, size, _ = SHOWN.get(name, (f" {name}", 1.0, 3))
    return f"{Decimal(f'{limit / size:.12g}'):f}{unit}"


def typed(name: str, limit: float) -> str:
    """The budget of a cost, rounded up to a few digits, as it is typed."""
    unit, size, decimals = SHOWN.get(name, (f" {name}", 1.0, 3))
    whole = 10**decimals
    return f"{math.ceil(limit / size * whole - 1e-6) / whole:.{decimals}f}".rstrip("0").rstrip(".") + unit


def too_small(limits: Mapping[str, float], least: Mapping[str, float]) -> FewbitError:
    """The error of limits that no candidate keeps; `least` are the smallest costs, each where it alone is wanted small."""
    asked = " and ".join(shown(name, limit) for name, limit in limits.items())
    below = [name for name, limit in limits.items() if name in least and limit < least[name]]
    if not below:
        return FewbitError(
            f"no setting of the target keeps the budget {asked}, though one keeps each part of it; give a larger one for one "
            "part."
        )
    options = " and ".join(f"--budget {typed(name, least[name])}" for name in below)
    return FewbitError(
        f"no setting of the target keeps the budget {asked}; the smallest that one keeps is {options}: give that or more."
    )
