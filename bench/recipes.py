"""Six recipes side by side: the same models, bits, exemptions, calibration and scored images; with time and memory.

    python bench/recipes.py rows demo:resnet20 --images DIR --score DIR --bits 8 w4a8 4 --out recipes-resnet20
    python bench/recipes.py memory demo:resnet20 --images DIR --out recipes-resnet20
    python bench/rows.py recipes-resnet20

The first and the last op with a weight have 8 bits in every row. `lapq` has `--time` seconds for its search. Peak memory is
that of a process that does nothing but one recipe (capture, observe, choose) on the images of the first seed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from rows import Bench, options, peak

from fewbit.recipes import RECIPES

SIX = ("minmax", "mse", "easyquant", "aciq", "lapq", "liu2021")


def named(bits: str, ends: int) -> str:
    return f"{bits},first={ends},last={ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "memory", "one"))
    options(parser)
    parser.add_argument("--bits", nargs="+", default=["8", "w4a8", "4"])
    parser.add_argument("--ends", type=int, default=8, help="width of the first and the last op with a weight")
    parser.add_argument("--recipes", nargs="+", default=SIX, choices=RECIPES)
    args = parser.parse_args()
    if args.what == "rows":
        bench = Bench(args)
        for seed in args.seeds:
            for bits in args.bits:
                for name in args.recipes:
                    bench.run(f"{name}, {bits}", name, named(bits, args.ends), seed)
        return
    if args.what == "one":
        bench = Bench(args)
        bench.start(args.seeds[0], samples=RECIPES[args.recipes[0]].needs_samples)
        bench.plan(RECIPES[args.recipes[0]], named(args.bits[-1], args.ends), args.target)
        print(peak())
        return
    print("| recipe | peak GB |\n|---|---|")
    for name in args.recipes:
        given = [sys.executable, __file__, "one", *sys.argv[2:], "--recipes", name]
        found = subprocess.run(given, check=True, capture_output=True, text=True).stdout
        print(f"| {name} | {int(found.split()[-1]) / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
