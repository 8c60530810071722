"""`--memory`: what a process may hold, what a run is likely to, and what it held. Held are the pages that the system counts as
this process's (resident memory), those of mapped files among them.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path

from fewbit.core.pages import large_apart
from fewbit.core.peak import peak
from fewbit.errors import FewbitError, Stopped

UNITS = {"MB": 10**6, "GB": 10**9}
CLEAR = Path("/proc/self/clear_refs")
LIBRARIES = 1.1e9  # bytes, with a batch of a small model
MODEL = 2.2  # bytes held for each byte of float weights; bench/big.py
INSIDE, SMALL = 4.4, 128 << 20  # the same of the first bytes, which stand in one file
MATRICES = 9  # of float64 products of all inputs of a layer with each other, where codes are solved
BESIDE = 0.6  # bytes held for each byte of weights meanwhile


def parse(text: str) -> int:
    """Bytes of 4GB or 1500MB. Raises FewbitError for anything else, and for less than the libraries take."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", text.strip(), re.IGNORECASE)
    if found is None:
        raise FewbitError(f"--memory {text} is not understood; give a number of MB or GB: type --memory 4GB, or leave it out.")
    number = float(found[1]) * UNITS[found[2].upper()]
    if number < LIBRARIES:
        raise FewbitError(
            f"--memory {text} is too small: the libraries and a batch of images take {shown(LIBRARIES)}; type --memory "
            f"{shown(1.3 * LIBRARIES)} for a small model, or leave it out."
        )
    return int(number)


def shown(number: float) -> str:
    """Bytes as they are typed, rounded up."""
    return f"{math.ceil(number / 1e8) / 10:g}GB"


def needed(weights: int, widest: int) -> float:
    """The bytes that a run is likely to hold: of the float weights, and of the number of inputs of its widest layer whose codes
    are solved (0: none is).
    """
    whole = max(MODEL * weights, INSIDE * min(weights, SMALL))
    return LIBRARIES + max(whole, BESIDE * weights + 8.0 * MATRICES * widest**2)


def begin() -> None:
    """Count the peak from here on, and keep no holes."""
    large_apart()
    with suppress(OSError):
        CLEAR.write_text("5")


def check(text: str, stage: str) -> None:
    """Raise Stopped where the process has held more than `--memory` allows."""
    held = peak()
    if held > parse(text):
        raise Stopped(
            f"--memory {text} was passed: {shown(held)} were held up to the end of {stage}; type --memory {shown(held)}."
        )
