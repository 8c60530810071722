"""The closed-form recipe, each part added to those before it, at several widths.

python bench/best.py MODEL --images DIR --score DIR --bits w4a8 4,first=w4a8 --rows mse fast --out best-vit
python bench/best.py demo --bits 4,first=w4a8 --rows fast best --time 120 --out best-demo
python bench/rows.py best-vit
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

from rows import Bench, options

from fewbit.choose.correct import LayerOutput
from fewbit.choose.gptq import Gptq
from fewbit.equalize import Equalize
from fewbit.recipes import RECIPES, Recipe

FAST = RECIPES["fast"]
PLAIN = Gptq(ridges=(), sweeps=0, residual=False)
BEST = RECIPES["best"].rebuild
assert BEST is not None
STEPS: Mapping[str, Recipe] = {
    "mse": RECIPES["mse"],
    "softmax": replace(RECIPES["mse"], free_softmax=True),
    "gptq": replace(FAST, equalize=None, rounding=PLAIN, correction=LayerOutput(gain=False)),
    "ridge": replace(FAST, equalize=None, rounding=Gptq(sweeps=0, residual=False), correction=LayerOutput(gain=False)),
    "residual": replace(FAST, equalize=None, rounding=Gptq(sweeps=0), correction=LayerOutput(gain=False)),
    "descent": replace(FAST, equalize=None, correction=LayerOutput(gain=False)),
    "gain": replace(FAST, equalize=None),
    "norms": replace(FAST, equalize=Equalize(values=False, keys=False, convolutions=False)),
    "values": replace(FAST, equalize=Equalize(keys=False, convolutions=False)),
    "fast": FAST,
    "fast, no residual": replace(FAST, rounding=replace(Gptq(), residual=False)),
    "gradients": replace(FAST, gradients=True),
    "rotated": replace(FAST, equalize=Equalize(rotate=True)),
    "rotated, heads too": RECIPES["fast-rotated"],
    "best": RECIPES["best"],
    "best, ops": replace(FAST, rebuild=replace(BEST, scope="op")),
    "best, no drop": replace(FAST, rebuild=replace(BEST, drop=0.0)),
    "best, fisher": replace(FAST, rebuild=replace(BEST, fisher=True)),
    "best, sigmoid": replace(FAST, rebuild=replace(BEST, learn_codes=True, rate=0.03, pull=0.1)),
    "best, straight": replace(FAST, rebuild=replace(BEST, learn_codes=True, rounding="straight", rate=0.01)),
    "adaround": RECIPES["adaround"],
    "brecq": RECIPES["brecq"],
    "qdrop": RECIPES["qdrop"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    parser.add_argument(
        "--bits", nargs="+", default=["8", "6", "w4a8", "4,first=w4a8", "4,first=w4a8,*.qk=8,*.pv=8,*.fc2=w4a8"]
    )
    parser.add_argument("--rows", nargs="+", choices=[*STEPS], default=["mse", "fast"])
    args = parser.parse_args()
    bench = Bench(args)
    bench.recipes = STEPS
    for seed in args.seeds:
        for bits in args.bits:
            for name in args.rows:
                bench.run(name, name, bits, seed)


if __name__ == "__main__":
    main()
