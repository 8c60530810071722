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

import numpy as np
import torch
from rows import Bench

from fewbit.choose import Bits, choose, lapq
from fewbit.choose.choose import choosing
from fewbit.choose.joint_search import Model
from fewbit.choose.loss import BATCH, Measure
from fewbit.choose.powell import JointSearch
from fewbit.choose.ranges import MseRange
from fewbit.files import read_json, write_json
from fewbit.realize import realize
from fewbit.recipes import Recipe
from fewbit.target import load_target


def recipes(args: argparse.Namespace) -> dict[str, dict[str, Recipe]]:
    """Rows of each command; a joint search with 0 sweeps stops at its start."""
    powell = JointSearch(sweeps=args.sweeps, seconds=args.time, evaluations=args.evaluations, loss=args.loss)
    own, still = replace(powell, points=0), replace(powell, sweeps=0)

    def at(p: float, joint: JointSearch) -> Recipe:
        return Recipe(MseRange(p), MseRange(p), joint=joint)

    def starts(joint: JointSearch, name: str) -> dict[str, Recipe]:
        ranged = replace(joint, points=0)
        return {f"p = 1{name}": at(1, ranged), f"max{name}": Recipe(joint=ranged), f"p = 2{name}": at(2, ranged)}

    best = {"p*": at(2, still), "p* + Powell": at(2, powell)}
    coordinate = replace(powell, method="coordinate")
    return {
        "starts": {**starts(replace(own, sweeps=0), ""), **starts(own, " + Powell"), **best},
        "methods": {**best, "p* + coordinates": at(2, coordinate), **starts(own, " + Powell"),
                    **starts(replace(coordinate, points=0), " + coordinates")},
    }  # fmt: skip


class Lapq(Bench):
    """Rows with the first and last op at 8 bits, and without samples of ops."""

    def bits(self, bits: int) -> Bits:
        weighted = [op.name for op in self.graph.ops if "weight" in op.operands]
        ends = dict.fromkeys((weighted[0], weighted[-1]), self.args.ends) if self.args.ends else {}
        return Bits(bits, bits, ends, asked=f"w{bits}a{bits}" + (f", ends {self.args.ends}" if ends else ""))

    def row(self, name: str, recipe: Recipe, bits: int, seed: int) -> None:
        """Make one row: a JSON file, and its answers beside it."""
        file = self.out / f"{name.replace(' ', '').replace('*', 'star')}_{bits}_seed{seed}.json"
        if file.exists():
            return
        before = self.float_answers()
        self.start(seed, samples=False, labels=self.args.loss == "labels")
        target, began = load_target(self.args.target), time.perf_counter()
        options = {"name": name, "bits": self.bits(bits), "everything": True}
        if recipe.joint is None:
            plan = choose(self.graph, self.stats, target, recipe, **options)
        else:
            plan = lapq(self.graph, self.stats, target, recipe, self.batches, labels=self.labels, **options)
        seconds = time.perf_counter() - began
        realize(self.graph, plan, self.out / "row.onnx", **target.form)
        after, truth = self.answers(self.out / "row.onnx"), np.asarray(self.scored.labels)
        np.save(file.with_suffix(".npy"), after)
        found = plan.extra["joint"]
        row = {
            "name": name, "bits": str(self.bits(bits)), "seed": seed, "images": len(after), "seconds": seconds,
            "calibration": sum(map(len, self.batches)), "float": 100 * float((before == truth).mean()),
            "top1": 100 * float((after == truth).mean()), "agreement": 100 * float((after == before).mean()), "joint": found,
        }  # fmt: skip
        write_json(file, row)
        said = f"loss {found['start']:.4g} -> {found['best']:.4g}, {found['evaluations']} evaluations, {seconds:.0f} s"
        print(
            f"{name:20} {row['bits']} seed {seed}  top-1 {row['top1']:.2f}  agreement {row['agreement']:.2f}  {said}",
            flush=True,
        )

    def model(self, bits: int, images: int) -> Model:
        """The loss as a function of all steps, from ranges at p = 2."""
        batches = list(torch.cat(self.batches)[:images].split(BATCH))
        recipe = Recipe(MseRange(), MseRange())
        work = choosing(self.graph, self.stats, load_target(self.args.target), recipe, bits=self.bits(bits), everything=True)
        return Model(work, Measure.of(self.graph, batches), batches, "moved")


def cross(bench: Lapq, bits: int, seed: int) -> dict[str, object]:
    """Of random pairs of steps, each moved by `--move`: what both do together beyond what each does alone, over the loss.

    |L(a + δe_i + δe_j) - L(a + δe_i) - L(a + δe_j) + L(a)|, relative to L(a) and to what each of the two changes alone.
    """
    bench.start(seed, samples=False)
    model = bench.model(bits, bench.args.calibration)
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
    write_json(bench.out / f"cross_{bits}_seed{seed}.json", row)
    print(row, flush=True)
    return row


def speed(bench: Lapq) -> None:
    """Seconds of an evaluation in line searches in graph order: from each step's own place on, and of the whole model."""
    bench.start(bench.args.seeds[0], samples=False)
    model = bench.model(bench.args.bits[0], bench.args.calibration)
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
                    model._asked = np.full(n, 9.0)
                values.append(model(x))
        found[way], losses[way] = (time.perf_counter() - began) / len(values), values
    print(f"{sum(map(len, bench.batches))} images, {n} free steps: {found['whole']:.3f} s whole, "
          f"{found['in part']:.3f} s in part, {found['whole'] / found['in part']:.2f} x; same losses: "
          f"{losses['whole'] == losses['in part']}")  # fmt: skip


def table(folder: Path) -> None:
    """Means over seeds, a row each."""
    groups: dict[tuple[str, str], list[dict[str, object]]] = {}
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
        if "top1" in row:
            groups.setdefault((row["bits"], row["name"]), []).append(row)
    print("| bits | row | loss at the start | loss | top-1 by seed | mean | agreement | p | evaluations | s |\n|" + "---|" * 10)
    for (bits, name), rows in sorted(groups.items()):

        def mean(key: str, rows: list[dict[str, object]] = rows, inner: bool = False) -> float:
            return float(np.mean([row["joint"][key] if inner else row[key] for row in rows]))  # type: ignore[index, call-overload]

        each = ", ".join(f"{row['top1']:.2f}" for row in rows)
        norms = ", ".join("-" if row["joint"]["p"] is None else f"{row['joint']['p']:.2f}" for row in rows)  # type: ignore[index]
        start, best, count = (mean(key, inner=True) for key in ("start", "best", "evaluations"))
        print(f"| {bits} | {name} | {start:.4g} | {best:.4g} | {each} | {mean('top1'):.2f} "
              f"| {mean('agreement'):.2f} % | {norms} | {count:.0f} | {mean('seconds'):.0f} |")  # fmt: skip
    for file in sorted(folder.glob("cross_*_seed*.json")):
        print(read_json(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("starts", "methods", "cross", "speed", "table"))
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--images")
    parser.add_argument("--score")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--ends", type=int, default=8, help="bits of the first and last op with a weight; 0: as the others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--scored", type=int)
    parser.add_argument("--loss", choices=("kl", "labels"), default="kl")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--time", type=float, help="seconds of a search; without it a search ends by itself")
    parser.add_argument("--evaluations", type=int, help="losses of a search, the same on any machine")
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--pairs", type=int, default=100, help="cross: pairs; speed: steps that are moved")
    parser.add_argument("--move", type=float, default=0.2, help="cross: each step is so much larger")
    parser.add_argument("--target", default="ort-x86-vnni")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("lapq"))
    args = parser.parse_args()
    if args.what == "table":
        table(Path(args.model))
        return
    torch.set_num_threads(args.threads)
    bench = Lapq(args)
    if args.what == "speed":
        speed(bench)
        return
    for seed in args.seeds:
        for bits in args.bits:
            if args.what == "cross":
                cross(bench, bits, seed)
                continue
            for name, recipe in recipes(args)[args.what].items():
                if args.rows is None or name in args.rows:
                    bench.row(name, recipe, bits, seed)


if __name__ == "__main__":
    main()
