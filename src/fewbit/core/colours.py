"""Colours for numbers: from dark blue to yellow (viridis), which those who see fewer colours tell apart as well."""

from __future__ import annotations

from itertools import pairwise

ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def dark_to_bright() -> list[tuple[int, ...]]:
    """Red, green and blue of 256 levels."""
    place = [i / 255 * (len(ANCHORS) - 1) for i in range(256)]
    ends = list(pairwise(ANCHORS))
    both = [(ends[min(int(p), len(ends) - 1)], p - min(int(p), len(ends) - 1)) for p in place]
    return [tuple(round(a + share * (b - a)) for a, b in zip(*pair, strict=True)) for pair, share in both]
