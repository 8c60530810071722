"""3x3 convolutions of seven-bit integers: direct, direct with chains of eight products in 16 bits, and Winograd F(2x2, 3x3).

    python -m bench.winograd                # a table in Markdown
    python -m bench.winograd --rounds 41

The layers are those of ResNet-20 and ResNet-18 with stride 1, one image, one thread. All three kernels are the same kind of
code (numba, no intrinsics; the innermost loop is over output channels) and give the same integers, which is checked before
anything is timed. They run in turn, so that a slow moment hits all of them; weights are packed beforehand. Counts are of the
multiplications and of the additions and subtractions, millions for one image; for Winograd with those of both transforms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from bench.kernels import direct, winograd

LAYERS = (
    ("ResNet-20", 16, 32),
    ("ResNet-20", 32, 16),
    ("ResNet-20", 64, 8),
    ("ResNet-18", 64, 56),
    ("ResNet-18", 128, 28),
    ("ResNet-18", 256, 14),
    ("ResNet-18", 512, 7),
)


def direct_operations(channels: int, size: int) -> tuple[int, int]:
    """Multiplications and additions of a convolution with as many input as output channels, padded by 1."""
    products = 9 * channels**2 * size**2
    return products, products


def winograd_operations(channels: int, size: int) -> tuple[int, int]:
    """The same by tiles of 2 x 2: 16 products; 32 additions for a tile of the input and 24 for one of the output."""
    tiles = (-(-size // 2)) ** 2
    products = 16 * channels**2 * tiles
    return products, products + (32 + 24) * channels * tiles


def in_turn(kernels: Sequence[Callable[[], object]], rounds: int, repeat: int) -> list[list[float]]:
    """Seconds of one call, (rounds, kernels): in each round every kernel runs `repeat` times, one kernel after the other."""
    rows = []
    for _ in range(rounds):
        row = []
        for kernel in kernels:
            start = time.perf_counter()
            for _ in range(repeat):
                kernel()
            row.append((time.perf_counter() - start) / repeat)
        rows.append(row)
    return rows


def measure(channels: int, size: int, rounds: int) -> list[list[float]]:
    """Times of direct, chained and Winograd on codes within ±63. Raises AssertionError where they differ."""
    rng = np.random.default_rng(0)
    x = rng.integers(-63, 64, (1, channels, size, size)).astype(np.int8)
    w = rng.integers(-63, 64, (channels, channels, 3, 3)).astype(np.int8)
    packed, transformed = direct.pack(w), winograd.pack(w)
    kernels = (
        lambda: direct.direct(x, packed),
        lambda: direct.chained(x, packed),
        lambda: winograd.winograd(x, transformed),
    )
    first, *others = (kernel() for kernel in kernels)  # compiles them, too
    assert all(np.array_equal(first, other) for other in others)
    (once,) = in_turn(kernels, 1, 1)
    return in_turn(kernels, rounds, max(1, round(0.02 / max(once))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    print("| layer | multiplications, M | additions, M | direct, ms | chains, ms | Winograd, ms | chains | Winograd |")
    print("|---|---|---|---|---|---|---|---|")
    for net, channels, size in LAYERS:
        times = measure(channels, size, args.rounds)
        a, b = direct_operations(channels, size), winograd_operations(channels, size)
        counts = " | ".join(f"{p / 1e6:.2f} → {q / 1e6:.2f}" for p, q in zip(a, b, strict=True))
        milliseconds = " | ".join(f"{1e3 * statistics.median(row[i] for row in times):.3f}" for i in range(3))
        faster = " | ".join(f"{statistics.median(row[0] / row[i] for row in times):.2f} x" for i in (1, 2))
        print(f"| {net}, {channels} channels, {size} x {size} | {counts} | {milliseconds} | {faster} |", flush=True)


if __name__ == "__main__":
    main()
