"""EasyQuant in our hands: the cosine search against its start, one side alone, and the released tool's two passes.

    python bench/easyquant.py demo:resnet20 --images DIR --score DIR --bits 8 7 6 --out easyquant
    python bench/easyquant.py demo:resnet20 --images DIR --score DIR --bits 6 --target arm-int7 --out easyquant-arm
    python bench/easyquant.py demo:mobilenet --images DIR --score DIR --weights tensor --out easyquant-tensor   # as the paper
    python bench/rows.py easyquant

`kl` is the start: activations by the entropy of their histogram, all of the weights. 50 images for the search and the ranges
(the paper: 3,000 for the ranges). The mean cosine of the ops' outputs, each op on what the quantized model gives it, is
printed. `--ends 8` gives the first and the last op 8 bits; without it no op is exempt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from rows import ABLATIONS, Bench, edited, options, rows_of, with_ends

from fewbit.recipes import ENTROPY, IN_TURN, Recipe

ROWS = {
    "kl": "kl",
    "easyquant": "easyquant",
    "weights only": "easyquant, weights only",
    "inputs only": "easyquant, inputs only",
    "one pass": "easyquant-onepass",
}
SIDES = {
    f"easyquant, {side} only": Recipe("one side alone", (ENTROPY, replace(IN_TURN, sides=side)))
    for side in ("weights", "inputs")
}


def main() -> None:
    parser = options(__doc__, ends=0, calibration=50)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6])
    parser.add_argument("--weights", choices=("channel", "tensor"), default="channel", help="what a step of a weight is for")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    if args.weights == "tensor":
        narrow = "signed = true\nnarrow = true\ngranularity = "
        args.target = edited(args.target, [(f'{narrow}"channel"', f'{narrow}"tensor"')], args.out / "tensor.toml")
    rows = [(f"{name}, {bits}", ROWS[name], with_ends(bits, args.ends)) for bits in args.bits for name in args.rows]
    Bench(args, {**ABLATIONS, **SIDES}).rows(rows)
    print("| row | mean cosine of the ops' outputs, before and after |\n|---|---|")
    for name in args.rows:
        for bits in args.bits:
            rows = rows_of(args.out, name=f"{name}, {bits}", calibration=args.calibration)
            searches = [[log["rows"] for log in row["log"] if log["name"] == "output search"] for row in rows]
            found = [[scale[k] for passes in searches if passes for scale in passes[-1]] for k in ("before", "after")]
            if found[0]:
                print(f"| {name}, {bits} | {np.mean(found[0]):.5f} | {np.mean(found[1]):.5f} |")


if __name__ == "__main__":
    main()
