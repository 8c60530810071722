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

import numpy as np
from rows import Bench, options, with_ends

from fewbit.choose.aciq import AnalyticClip, clipping_factor
from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.correct import WeightMean
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.recipes import RECIPES, Recipe

CLIP, OF_ACTIVATIONS, OF_WEIGHTS = AnalyticClip(), ChannelBits(weights=False), ChannelBits(activations=False)
OURS = {
    "naive": Recipe("", (Ranges(),)),
    "clipping": Recipe("", (Ranges(CLIP, MinMax()),)),
    "widths of activations": Recipe("", (Ranges(channel_bits=OF_ACTIVATIONS),)),
    "clipping and widths": Recipe("", (Ranges(CLIP, MinMax(), channel_bits=OF_ACTIVATIONS),)),
    "means of weights": Recipe("", (Ranges(), WeightMean())),
    "means and spreads of weights": Recipe("", (Ranges(), WeightMean(variance=True))),
    "widths of weights": Recipe("", (Ranges(channel_bits=OF_WEIGHTS),)),
    "means and widths": Recipe("", (Ranges(channel_bits=OF_WEIGHTS), WeightMean())),
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
    args = options(__doc__, "formula", "rows", ends=8).parse_args()
    if args.what == "formula":
        formula()
        return
    Bench(args, OURS).rows((name, recipe, with_ends(bits, args.ends), target) for name, recipe, bits, target in ROWS)


if __name__ == "__main__":
    main()
