"""Six recipes side by side: the same models, bits, exemptions, calibration and scored images; with time and memory.

    python bench/recipes.py rows demo:resnet20 --images DIR --score DIR --bits 8 w4a8 4 --out recipes-resnet20
    python bench/recipes.py memory demo:resnet20 --images DIR --out recipes-resnet20
    python bench/rows.py recipes-resnet20

The first and the last op with a weight have 8 bits in every row. `lapq` has `--time` seconds for its search. Peak memory is
that of a process that does nothing but one recipe (capture, observe, choose) on the images of the first seed.
"""

from __future__ import annotations

import subprocess
import sys

from rows import ABLATIONS, Bench, options, peak, with_ends

SIX = ("minmax", "mse", "easyquant", "aciq", "lapq", "liu2021")


def main() -> None:
    parser = options(__doc__, "rows", "memory", "one", ends=8)
    parser.add_argument("--bits", nargs="+", default=["8", "w4a8", "4"])
    parser.add_argument("--recipes", nargs="+", default=SIX, choices=ABLATIONS)
    args = parser.parse_args()
    if args.what == "rows":
        Bench(args).rows((f"{name}, {b}", name, with_ends(b, args.ends)) for b in args.bits for name in args.recipes)
        return
    if args.what == "one":
        bench = Bench(args)
        _ = bench.quantized(ABLATIONS[args.recipes[0]], with_ends(args.bits[-1], args.ends), args.seeds[0])["plan"]
        print(peak())
        return
    print("| recipe | peak GB |\n|---|---|")
    for name in args.recipes:
        given = [sys.executable, __file__, "one", *sys.argv[2:], "--recipes", name]
        found = subprocess.run(given, check=True, capture_output=True, text=True).stdout
        print(f"| {name} | {int(found.split()[-1]) / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
