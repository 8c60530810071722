"""No images, or almost none: what rows are worth that were calibrated on noise, on synthetic images, or on a few real ones.

    python bench/nodata.py demo --out nodata-demo                                  # --help: sources, recipes, widths
    python bench/nodata.py MODEL --images DIR --score DIR --steps 100 --made 32 --out nodata-vit
    python bench/rows.py nodata-demo

A source is `noise` (normal with mean 0 and variance 1 in every colour, which is what normalized images have), `photographic`
(noise with the spectrum of photographs, which synthetic images start from), `synthetic` (images made from the model, `fewbit
quantize --images synthetic`; they lie in the folder when made), or a number of real images. Everything else of a row is as in
bench/rows.py.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rows import ABLATIONS, Bench, options, with_ends

from fewbit.data.images import Preprocess
from fewbit.data.synthesize.inversion import photographic
from fewbit.demo import model as demo


def noise(kind: str, count: int, preprocess: Preprocess, seed: int) -> torch.Tensor:
    """Images of noise (count, c, h, w)."""
    random = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randn(count, *preprocess.size, generator=random)
    return photographic(count, preprocess.size, *preprocess.ends(), random)


def bench_of(args: argparse.Namespace, source: str) -> Bench:
    """Rows whose calibration images are of a source; their classes are not used."""
    count = int(source) if source.isdecimal() else args.made
    bench = Bench(argparse.Namespace(**{**vars(args), "calibration": count}))
    if source == "synthetic":
        bench.images, bench.options["steps"] = (lambda seed: source), args.steps
    elif not source.isdecimal():
        bench.images = partial(noise, source, count, bench.preprocess)
    return bench


def main() -> None:
    parser = options(__doc__, ends=0, out=Path("nodata"))
    parser.add_argument("--sources", nargs="+", default=["noise", "photographic", "synthetic", "16", "128"])
    parser.add_argument("--recipes", nargs="+", default=["mse", "fast"], choices=ABLATIONS)
    parser.add_argument("--bits", nargs="+", default=["8", "w4a8"])
    parser.add_argument("--made", type=int, default=128, help="synthetic images, and of noise")
    parser.add_argument("--steps", type=int, help="of each image, or of the generator (default: as fewbit quantize)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.images, args.score = args.images or str(demo.CALIBRATION), args.score or str(demo.TEST)
    for source in args.sources:
        rows = [(f"{source}, {name}", name, with_ends(bits, args.ends)) for bits in args.bits for name in args.recipes]
        bench_of(args, source).rows(rows)


if __name__ == "__main__":
    main()
