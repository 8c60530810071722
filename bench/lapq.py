"""LAPQ in our hands: what the norm p, the joint search and its start are worth, and when steps interact.

    python bench/lapq.py starts demo:resnet20 --images DIR --score DIR --bits 4 8 --out lapq     # p = 2, p*, Powell, bad starts
    python bench/lapq.py methods demo:resnet20 --images DIR --score DIR --bits 4 --out lapq      # coordinates against Powell
    python bench/lapq.py cross demo:resnet20 --images DIR --bits 8 4 3 --out lapq                # do two steps add up?
    python bench/lapq.py speed demo                                                           # an evaluation, whole and in part
    python bench/lapq.py table lapq

Each row is quantized from its own calibration images (drawn with the seed), written as ONNX and scored in onnxruntime. The
first and the last op with a weight have 8 bits; `--ends 0` gives them what the others have. A row that is there already is
not made again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Bench, options, rows_of, summary, with_ends

from fewbit.choose import Bits, Context, Recipe, choose, parse_bits
from fewbit.choose.joint_search import JointSearch, Model
from fewbit.choose.loss import BATCH, ModelLoss
from fewbit.choose.ranges import MseRange, Ranges
from fewbit.core.shelf import Rebatched
from fewbit.files import read_json, write_json
from fewbit.recipes import MSE
from fewbit.target import load_target


def recipes(args: argparse.Namespace, seconds: float | None) -> dict[str, dict[str, Recipe]]:
    """Rows of each command; a joint search with 0 sweeps stops at its start."""
    powell = JointSearch(sweeps=args.sweeps, seconds=seconds, evaluations=args.evaluations, loss=args.loss)
    own, still = replace(powell, points=0), replace(powell, sweeps=0)

    def at(start: Ranges, joint: JointSearch) -> Recipe:
        return Recipe("", (replace(joint, start=start),))

    def starts(joint: JointSearch, name: str) -> dict[str, Recipe]:
        ranges = {"p = 1": Ranges(MseRange(1), MseRange(1)), "max": Ranges(), "p = 2": Ranges(MseRange(2), MseRange(2))}
        return {start + name: at(ranges[start], joint) for start in ranges}

    best = {"p*": at(MSE, still), "p* + Powell": at(MSE, powell)}
    coordinate = replace(powell, method="coordinate")
    return {
        "starts": {**starts(replace(own, sweeps=0), ""), **starts(own, " + Powell"), **best},
        "methods": {**best, "p* + coordinates": at(MSE, coordinate), **starts(own, " + Powell"),
                    **starts(replace(coordinate, points=0), " + coordinates")},
    }  # fmt: skip


def model_of(bench: Bench, bits: int) -> Model:
    """The loss as a function of all scales, from ranges at p = 2."""
    args, widths = bench.args, parse_bits(with_ends(bits, bench.args.ends))
    batches = Rebatched(bench.batches, BATCH, args.calibration)
    assert isinstance(widths, Bits)
    context = Context(bench.graph, bench.stats, load_target(args.target), widths, images=batches, everything=True)
    plan = choose(context, Recipe("", (MSE,)))
    return Model(plan, context, ModelLoss.of(bench.graph, batches), batches, "moved")


def cross(bench: Bench, bits: int, seed: int) -> dict[str, object]:
    """Of random pairs of steps, each moved by `--move`: what both do together beyond what each does alone, over the loss.

    |L(a + δe_i + δe_j) - L(a + δe_i) - L(a + δe_j) + L(a)|, relative to L(a) and to what each of the two changes alone.
    """
    bench.start(seed)
    model = model_of(bench, bits)
    draw, n, args = np.random.default_rng(seed), len(model.free), bench.args
    at = model(np.zeros(n))
    alone: dict[int, float] = {}
    terms, singles = [], []

    def moved(*steps: int) -> float:
        x = np.zeros(n)
        x[list(steps)] = np.log1p(args.move)
        return model(x)

    for _ in range(args.pairs):
        i, j = sorted(draw.choice(n, 2, replace=False).tolist())
        for k in (i, j):
            alone[k] = alone[k] if k in alone else moved(k)
        terms.append(moved(i, j) - alone[i] - alone[j] + at)
        singles.append(abs(alone[i] - at) + abs(alone[j] - at))
    size, single = np.abs(terms), np.array(singles)
    row = {
        "bits": bits, "seed": seed, "pairs": args.pairs, "move": args.move, "loss": at,
        "cross_over_loss": float(size.mean() / at), "cross_over_singles": float(size.sum() / single.sum()),
        "cross_absolute": float(size.mean()), "median_over_loss": float(np.median(size) / at),
    }  # fmt: skip
    write_json(bench.out / f"cross_{bits}_n{args.calibration}_seed{seed}.json", row)
    print(row, flush=True)
    return row


def speed(bench: Bench) -> None:
    """Seconds of an evaluation in line searches in graph order: from each step's own place on, and of the whole model."""
    bench.start(bench.args.seeds[0])
    model = model_of(bench, bench.args.bits[0])
    n = len(model.free)
    some = range(0, n, max(1, n // bench.args.pairs))
    found, losses = {}, {}
    for way in ("in part", "whole"):
        began, values = time.perf_counter(), []
        for i in some:
            for u in (0.1, -0.1, 0.05, -0.05, 0.02):
                x = np.zeros(n)
                x[i] = u
                if way == "whole":
                    model.walk.back()
                    model._last = np.full(n, 9.0)
                values.append(model(x))
        found[way], losses[way] = (time.perf_counter() - began) / len(values), values
    print(f"{sum(map(len, bench.batches))} images, {n} free steps: {found['whole']:.3f} s whole, "
          f"{found['in part']:.3f} s in part, {found['whole'] / found['in part']:.2f} x; same losses: "
          f"{losses['whole'] == losses['in part']}")  # fmt: skip


def table(folder: Path) -> None:
    """Means over seeds, a row each."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows_of(folder):
        if "top1" in row:
            own = {"joint": summary(row, "joint search"), "choose_seconds": row["seconds"]["choose"]}
            groups.setdefault((row["bits"], row["name"], row["calibration"]), []).append(row | own)
    print("| bits | row | loss at the start | loss | top-1 by seed | mean | agreement | p | evaluations | s |\n|" + "---|" * 10)
    for (bits, name, images), rows in sorted(groups.items()):
        each = ", ".join(f"{row['top1']:.2f}" for row in rows)
        norms = ", ".join("-" if row["joint"]["p"] is None else f"{row['joint']['p']:.2f}" for row in rows)
        top1, agreement, spent = (np.mean([row[key] for row in rows]) for key in ("top1", "agreement", "choose_seconds"))
        start, best, count = (np.mean([row["joint"][key] for row in rows]) for key in ("start", "best", "evaluations"))
        print(f"| {bits} | {name}, {images} images | {start:.4g} | {best:.4g} | {each} | {top1:.2f} "
              f"| {agreement:.2f} % | {norms} | {count:.0f} | {spent:.0f} |")  # fmt: skip
    for file in sorted(folder.glob("cross_*_seed*.json")):
        print(read_json(file))


def main() -> None:
    parser = options(
        __doc__, "starts", "methods", "cross", "speed", "table", ends=8, calibration=512, time=None, out=Path("lapq")
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--loss", choices=("kl", "labels"), default="kl")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--evaluations", type=int, help="losses of a search, the same on any machine")
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--pairs", type=int, default=100, help="cross: pairs; speed: scales that are moved")
    parser.add_argument("--move", type=float, default=0.2, help="cross: each scale is so much larger")
    args = parser.parse_args()
    if args.what == "table":
        table(Path(args.model))
        return
    torch.set_num_threads(args.threads)
    args.time, seconds = None, args.time  # the recipes of the rows have it already
    labelled = args.loss == "labels" and args.what not in ("cross", "speed")
    ours = recipes(args, seconds).get(args.what, {})
    bench = Bench(args, ours, **({"loss": "labels", "recipe": "lapq"} if labelled else {}))
    if args.what == "speed":
        speed(bench)
    elif args.what == "cross":
        for seed in args.seeds:
            for bits in args.bits:
                cross(bench, bits, seed)
    else:
        names = [name for name in ours if args.rows is None or name in args.rows]
        bench.rows((name.replace("*", "star"), name, with_ends(bits, args.ends)) for bits in args.bits for name in names)


if __name__ == "__main__":
    main()
