"""Liu et al. 2021 on a DETR: the rows of the paper's Table 4 on `demo:detr`, with AP on unseen scenes, and ours beside them.

    python -m bench.scenes --data CIFAR --split test --count 2000 --seed 0 --out scenes
    python bench/liu2021_detr.py --data CIFAR --score scenes --out liu-detr      # rows that are there are not made again
    python bench/liu2021_detr.py --table --out liu-detr

CIFAR holds CIFAR-10 (bench/scenes.py). Each seed calibrates on 128 scenes of its own, of the train split; all rows are scored
on the same scenes of the test split, in the runtime, and all have attention in integers. Ranking is applied to self- and
cross-attention. An interval is of the difference to the float model: 95 %, paired bootstrap over scenes, of the first seed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rows import Bench, options

sys.path.append(str(Path(__file__).parents[1]))
from bench.liu2021 import OURS, ablation
from bench.scenes import Scenes, numbered

from fewbit.files import read_json, write_json
from fewbit.recipes import RECIPES


def rows(bits: list[int]) -> dict[str, tuple[str, str]]:
    """Row name -> (recipe, bits): the paper's rows, EasyQuant, and ours."""
    found: dict[str, tuple[str, str]] = {}
    for width in bits:
        found |= {f"{name} {width}": row for name, row in ablation(width).items()}
        found |= {f"{name} {width}": (name, str(width)) for name in ("easyquant", "mse", "fast")}
    return found | {"mse w4a8": ("mse", "w4a8"), "fast w4a8": ("fast", "w4a8")}


def make(args: Any) -> None:
    """Every row for every seed."""
    train, recipes = Scenes.of(args.data, "train"), {**RECIPES, **OURS}

    def calibration(seed: int) -> Any:
        return np.stack([scene.image for scene in numbered(train, 100 + seed, args.calibration)])

    folder, args.score = args.score, str(Path(args.score) / "images")
    bench = Bench(args, recipes, calibration, annotations=Path(folder) / "instances.json", labels=False)
    for seed in args.seeds:
        for name, (recipe, text) in rows(args.bits).items():
            file = args.out / f"{name.replace(' ', '_').replace('+', '_')}_seed{seed}.json"
            if file.exists() or (args.only and name not in args.only):
                continue
            run = bench.quantized(recipes[recipe], text, seed, args.wide if text == "mixed:8.0" else args.target)
            score, plan = run["score"], run["plan"]
            row = {"name": name, "seed": seed, **score.to_json(), **bench.sizes(run, plan), "target": plan.target}
            write_json(file, row)
            print(f"{name:28} seed {seed}  AP {row['quantized']:.2f} of {row['float']:.2f}", flush=True)


def table(out: Path) -> None:
    """The rows in the order in which they are made: AP of each seed, its mean, AP50, bytes of weights."""
    found: dict[str, list[Any]] = {}
    for file in sorted(out.glob("*_seed*.json")):
        row = read_json(file)
        found.setdefault(row["name"], []).append(row)
    print("| row | AP by seed | mean | change, 95 % interval | AP50 | weights, kB |\n|---|---|---|---|---|---|")
    for name in (name for name in rows([8, 6, 4]) if name in found):
        some = sorted(found[name], key=lambda row: row["seed"])
        each, low, high = [row["quantized"] for row in some], *some[0]["interval"]
        at_half = np.mean([next(r["quantized"] for r in row["rows"] if r["what"] == "AP50") for row in some])
        cells = [
            name,
            ", ".join(f"{v:.2f}" for v in each),
            f"{np.mean(each):.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"{at_half:.2f}",
        ]
        print(f"| {' | '.join(cells)} | {some[0]['weight_bytes'] / 1e3:.0f} |")
    one = next(iter(found.values()))[0]
    half = next(r["float"] for r in one["rows"] if r["what"] == "AP50")
    print(f"\nFloat: AP {one['float']:.2f}, AP50 {half:.2f}.")


def main() -> None:
    parser = options(__doc__, model="demo:detr")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        make(args)
    table(args.out)


if __name__ == "__main__":
    main()
