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
import time
from pathlib import Path

import torch
from rows import Bench, options
from torch import Tensor

from fewbit.capture import load_model
from fewbit.data.synthesize.inversion import photographic
from fewbit.data.synthesize.source import Synthesis, method_for
from fewbit.data.synthesize.teacher import Teacher
from fewbit.recipes import RECIPES


class NoData(Bench):
    """Rows whose calibration images come from `source`."""

    source = "noise"

    def calibration(self, seed: int, *, labels: bool) -> tuple[list[Tensor], Tensor | None]:
        """Images of the source; their classes are not used."""
        count, size, random = self.args.made, self.preprocess.size, torch.Generator().manual_seed(seed)
        if self.source == "noise":
            return list(torch.randn(count, *size, generator=random).split(8)), None
        if self.source == "photographic":
            return list(photographic(count, size, *self.preprocess.ends(), random).split(8)), None
        if self.source == "synthetic":
            return list(self.made(seed).split(8)), None
        self.args.calibration = int(self.source)
        return super().calibration(seed, labels=False)

    def made(self, seed: int) -> Tensor:
        """The synthetic images of a seed."""
        teacher, began = Teacher(load_model(self.args.model).program), time.perf_counter()
        method = method_for(teacher, real=False, steps=self.args.steps)
        asked = Synthesis(method, self.args.made, self._outputs(), self.preprocess, seed)
        images = asked(teacher, self.out / f"synthetic_{seed}.safetensors")
        print(f"{asked.source}: {time.perf_counter() - began:.0f} s", flush=True)
        return torch.cat(list(images.batches(8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.set_defaults(out=Path("nodata"))
    parser.add_argument("--sources", nargs="+", default=["noise", "photographic", "synthetic", "16", "128"])
    parser.add_argument("--recipes", nargs="+", default=["mse", "fast"], choices=RECIPES)
    parser.add_argument("--bits", nargs="+", default=["8", "w4a8"])
    parser.add_argument("--made", type=int, default=128, help="synthetic images, and of noise")
    parser.add_argument("--steps", type=int, help="of each image, or of the generator (default: as fewbit quantize)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = NoData(args)
    for seed in args.seeds:
        for source in args.sources:
            bench.source, bench.seed = source, None
            for bits in args.bits:
                for recipe in args.recipes:
                    bench.run(f"{source}, {recipe}", recipe, bits, seed)


if __name__ == "__main__":
    main()
