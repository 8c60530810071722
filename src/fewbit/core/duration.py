"""What `--time` means."""

from __future__ import annotations

import re

from fewbit.errors import FewbitError

UNITS = {"s": 1, "min": 60, "h": 3600}


def parse_time(text: str) -> float:
    """Seconds of `90s`, `10min`, `1h`, more than 0. Raises FewbitError that says what is allowed."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)\s*", str(text), re.ASCII)
    if match is None:
        raise FewbitError(f"--time {text} is not understood; allowed are seconds, minutes and hours: 90s, 10min, 1h.")
    seconds = float(match[1]) * UNITS[match[2]]
    if not seconds:
        raise FewbitError(
            f"--time {text} leaves no time; allowed is more than 0, as in 90s, 10min, 1h. For no limit leave it out."
        )
    return seconds
