"""ACIQ in our hands: the formula against measured optima, and what clipping, widths of channels and means of weights are worth.

    python bench/aciq.py formula
    python bench/aciq.py rows demo:resnet20 --images DIR --score DIR --out aciq-resnet20
    python bench/rows.py aciq-resnet20

Rows as in the paper's table: W8A4 (clipping and widths of activations), W4A8 (means and widths of weights), W4A4 (all). The
first and the last op with a weight have 8 bits. A width for each channel of an activation needs a step for each: W8A4 and
W4A4 run on `ort-x86-channel`, whose products are float. "Integers" are the same on `ort-x86-vnni`, one step for a tensor, as
far as its kernels can hold it. Naive is the whole range, of a channel where the target has a step for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from rows import Bench, options

from fewbit.choose.aciq import AnalyticClip, clipping_factor
from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.correct import WeightMean
from fewbit.choose.ranges import MinMax
from fewbit.recipes import RECIPES, Recipe

NAIVE = Recipe(MinMax(), MinMax())
CLIP, MEANS = replace(NAIVE, activations=AnalyticClip()), replace(NAIVE, correction=WeightMean())
OF_ACTIVATIONS, OF_WEIGHTS = ChannelBits(weights=False), ChannelBits(activations=False)
OURS = {
    "naive": NAIVE,
    "clipping": CLIP,
    "widths of activations": replace(NAIVE, channels=OF_ACTIVATIONS),
    "clipping and widths": replace(CLIP, channels=OF_ACTIVATIONS),
    "means of weights": MEANS,
    "means and spreads of weights": replace(NAIVE, correction=WeightMean(variance=True)),
    "widths of weights": replace(NAIVE, channels=OF_WEIGHTS),
    "means and widths": replace(MEANS, channels=OF_WEIGHTS),
    "all": RECIPES["aciq"],
}
CHANNEL, INTEGER = "ort-x86-channel", "ort-x86-vnni"
ROWS = [  # label, recipe, widths, target
    *((f"{name}, W8A4", name, "w8a4", CHANNEL) for name in list(OURS)[:4]),
    *((f"{name}, W8A4, integers", name, "w8a4", INTEGER) for name in ("naive", "clipping")),
    *((f"{name}, W8A3", name, "w8a3", CHANNEL) for name in list(OURS)[:4]),
    *((f"{name}, W4A8", name, "w4a8", INTEGER) for name in ("naive", *list(OURS)[4:8])),
    *((f"{name}, W4A4", name, "4", CHANNEL) for name in ("naive", "all")),
    *((f"{name}, W4A4, integers", name, "4", INTEGER) for name in ("naive", "clipping", "all")),
]


class Aciq(Bench):
    """The parts of the recipe one by one."""

    recipes: Mapping[str, Recipe] = OURS


def formula(count: int = 1_000_000) -> None:
    """The clip with the smallest mean squared error on a sample, searched numerically, over the formula's."""
    draw = np.random.default_rng(0)
    samples = {"laplace": draw.laplace(size=count), "gauss": draw.standard_normal(count)}
    print("| prior | bits | formula | measured optimum | measured / formula |\n|---|---|---|---|---|")
    for prior, x in samples.items():
        for bits in (2, 3, 4):
            expected = clipping_factor(prior, bits)  # type: ignore[arg-type]
            tried = np.linspace(0.8, 1.2, 161) * expected

            def error(a: float, x: np.ndarray = x, bits: int = bits) -> float:
                step = 2 * a / 2**bits
                centre = (np.floor((x + a) / step) + 0.5) * step - a
                return float(np.mean((x - np.where(np.abs(x) < a, centre, np.sign(x) * a)) ** 2))

            best = tried[np.argmin([error(a) for a in tried])]
            print(f"| {prior} | {bits} | {expected:.4f} | {best:.4f} | {best / expected:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("formula", "rows"))
    options(parser)
    parser.add_argument("--ends", type=int, default=8, help="width of the first and the last op with a weight")
    args = parser.parse_args()
    if args.what == "formula":
        formula()
        return
    bench = Aciq(args)
    for seed in args.seeds:
        for name, recipe, bits, target in ROWS:
            bench.run(name, recipe, f"{bits},first={args.ends},last={args.ends}", seed, target)


if __name__ == "__main__":
    main()
