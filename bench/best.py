"""The closed-form recipe, each part added to those before it, at several widths.

python bench/best.py MODEL --images DIR --score DIR --bits w4a8 4,first=w4a8 --rows mse fast --out best-vit
python bench/best.py demo --bits 4,first=w4a8 --rows fast best --time 120 --out best-demo
python bench/rows.py best-vit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ablations import BLOCKS
from rows import make

from fewbit.choose import Pass, Recipe
from fewbit.choose.fisher import Importance
from fewbit.equalize import Equalize
from fewbit.recipes import CLOSED, FAST, MSE, RECIPES
from fewbit.recipes import GPTQ as WHOLE

RANGES, ATTENTION = CLOSED
GPTQ = replace(WHOLE, light=33)  # at 8 bits as well, so that each part counts
BIAS = replace(GPTQ, gain=False)
WEIGHTED = (RANGES, ATTENTION, replace(GPTQ, importance=Importance()))


def _fast(*passes: Pass, equalize: Equalize | None = None) -> Recipe:
    return Recipe("fast without a part, or with another", passes, equalize)


def _blocks(**settings: object) -> Recipe:
    return replace(FAST, passes=(*FAST.passes, replace(BLOCKS, **settings)))


STEPS: Mapping[str, Recipe] = {
    "mse": RECIPES["mse"],
    "softmax": _fast(replace(MSE, free_softmax=True)),
    "gptq": _fast(RANGES, replace(BIAS, ridges=(), sweeps=0, residual=False)),
    "ridge": _fast(RANGES, replace(BIAS, sweeps=0, residual=False)),
    "residual": _fast(RANGES, replace(BIAS, sweeps=0)),
    "descent": _fast(RANGES, BIAS),
    "gain": _fast(RANGES, GPTQ),
    "norms": _fast(RANGES, GPTQ, equalize=Equalize(values=False, keys=False, convolutions=False)),
    "values": _fast(RANGES, GPTQ, equalize=Equalize(keys=False, convolutions=False)),
    "keys": _fast(RANGES, GPTQ, equalize=Equalize()),
    "fast": FAST,  # and attention's scales
    "fast, no residual": _fast(RANGES, ATTENTION, replace(GPTQ, residual=False), equalize=Equalize()),
    "gradients": _fast(replace(RANGES, gradients=True), ATTENTION, GPTQ, equalize=Equalize()),
    "rotated": replace(FAST, equalize=Equalize(rotate=True)),
    "rotated, heads too": RECIPES["fast-rotated"],
    "weighted": replace(FAST, passes=WEIGHTED),
    "weighted, rotated": replace(RECIPES["fast-rotated"], passes=WEIGHTED),
    "best": RECIPES["best"],
    "best-rotated": RECIPES["best-rotated"],
    "blocks": _blocks(),
    "blocks, ops": _blocks(scope="op"),
    "blocks, no drop": _blocks(drop=0.0),
    "blocks, fisher": _blocks(fisher=True),
    "blocks, sigmoid": _blocks(learn_codes=True, lr=0.03, rounding_weight=0.1),
    "blocks, straight": _blocks(learn_codes=True, rounding="straight", lr=0.01),
    "adaround": RECIPES["adaround"],
    "brecq": RECIPES["brecq"],
    "qdrop": RECIPES["qdrop"],
}
BITS = ("8", "6", "w4a8", "4,first=w4a8", "4,first=w4a8,*.qk=8,*.pv=8,*.fc2=w4a8")


def main() -> None:
    make(None, STEPS, __doc__, BITS)


if __name__ == "__main__":
    main()
