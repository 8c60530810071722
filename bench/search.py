"""The strategies of `fewbit search` beside uniform widths and Liu's mixed precision, at equal bytes and at equal milliseconds.

    python bench/search.py bytes demo:resnet20 --mean 5 --out search-resnet20      # rows that are there are not made again
    python bench/search.py ms demo --out search-ms                                 # what the latency table leaves in float
    python bench/search.py hago demo:resnet20 --target TARGET --out search-hago    # all edges, no budget (papers' greedy)
    python bench/search.py table search-resnet20

All searches of a seed have the same calibration images and the same number of evaluations; accuracy is that of the written
files on the demo's test images, which no search has seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Bench, options, rows_of

from fewbit.choose import Bits, Context, Mixed, allocate, parse_bits
from fewbit.choose.sensitivity import NuclearNorm
from fewbit.core.record import Record
from fewbit.files import write_json
from fewbit.realize import float_onnx
from fewbit.recipes import RECIPES
from fewbit.search.costs import Sizes
from fewbit.search.judge import Judge
from fewbit.search.model import Loss, Model, Scored, Settings
from fewbit.search.run import run
from fewbit.search.search import SearchProblem, problem_of
from fewbit.search.strategies import STRATEGIES
from fewbit.target import load_target
from fewbit.verify.times import times_of, whole_of


class Setting:
    """A model, its images of a seed, and the problem without limits, from the stages of a run up to observe."""

    def __init__(self, args: argparse.Namespace, seed: int, limits: Mapping[str, float], edges: str = "weights") -> None:
        bench, target = Bench(args), load_target(args.target)
        bench.start(seed)
        self.scored, self.batches, graph = bench.scored, bench.batches, bench.graph
        context = Context(graph, bench.stats, target, images=self.batches, name=args.recipe)
        self.model, twin = Model(context, RECIPES[args.recipe], Settings(edges)), args.out / "float.onnx"
        float_onnx(graph, twin, opset=target.opset)
        given = graph, target, self.model.base, self.model.with_floats
        whole = whole_of(graph, target.runtime, twin, args.threads)
        times = times_of(*given, whole, args.threads, progress=print)
        self.problem: SearchProblem = problem_of(self.model, Loss(graph, self.batches, None), times, limits)

    def row(self, bits: Bits, loss: float, out: Path, threads: int) -> dict[str, Any]:
        """What the artefact of some widths is worth."""
        count = sum(map(len, self.batches))
        return {
            **Judge(self.problem, self.scored, Record(self.scored.preprocess.to_json()), out, threads).artefact(bits),
            "loss": loss,
            "calibration": count,
        }


ROWS = (*STRATEGIES, "uniform", "mixed, weights only", "mixed, activations too")


def file_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The file of a row."""
    return args.out / f"{name.replace(', ', '-').replace(' ', '-')}_n{args.calibration}_seed{seed}.json"


def equal_bytes(args: argparse.Namespace, seed: int) -> None:
    """Every strategy, one width for all and mixed precision, with `mean` bits a weight."""
    setting = None
    for name in args.rows:
        file = file_of(args, f"{name}_{args.mean:g}", seed)
        if file.exists():
            continue
        setting = setting or Setting(args, seed, {"bits": args.mean})
        problem, model = setting.problem, setting.model
        problem = replace(problem, always=(), dimensions=model.dimensions({}))  # widths alone are compared: all ops in integers
        problem = replace(problem, costs=lambda c, p=problem: pipeline_costs(p, c))
        began, each = time.perf_counter(), problem.problem({"bits": args.mean})
        score, made = Scored(model, problem.loss, problem.dimensions), 0
        if name in STRATEGIES:
            history = run(each, STRATEGIES[name](each, args.evaluations, seed), score, evaluations=args.evaluations)
            best, made = history.best(each), len(history.trials)
            assert best is not None
            bits, loss = problem.bits(best.candidate), best.loss
        else:
            bits = baseline(setting, name, args.mean)
            loss = problem.loss(model.plan(bits))
        row = setting.row(bits, loss, args.out, args.threads)
        row |= {"name": name, "seed": seed, "mean": args.mean, "evaluations": made, "seconds": time.perf_counter() - began}
        write_json(file, row)
        print(
            f"{name:24} seed {seed} loss {loss:.5f} top-1 {row['quantized']:.2f} agreement {row['agreement']:.2f}", flush=True
        )


def pipeline_costs(problem: SearchProblem, candidate: tuple[int, ...]) -> Mapping[str, float]:
    """Bits and bytes alone."""
    return Sizes(problem.model)(problem.dimensions, candidate)


def baseline(setting: Setting, name: str, mean: float) -> Bits:
    """One width for all weights, or the widths of nuclear norms (Liu et al. 2021) by dynamic programming."""
    model = setting.model
    if name == "uniform":
        return Bits(8, 8, {s.name: int(mean) for s in model.graph.sites if s.role == "weight"})
    mixed = parse_bits(f"mixed:{mean:g}:4,5,6,7,8")
    assert isinstance(mixed, Mixed)
    widths = allocate(model.context, mixed, replace(model.recipe, sensitivity=NuclearNorm())).bits
    if name == "mixed, activations too":
        return widths
    ops = {op.operands["weight"]: widths.ops[op.name] for op in model.graph.ops if "weight" in op.operands}
    return Bits(8, 8, ops)


def milliseconds(args: argparse.Namespace, seed: int) -> None:
    """Everything in integers, what the table leaves in float, and the same with the prediction beside the measurement."""
    setting = Setting(args, seed, {})
    times, most = setting.problem.times, setting.model.settings.most
    slower = tuple(times.slower())
    names = tuple(op.name for op in setting.model.graph.ops)
    weights = {s.name: 4 for s in setting.model.graph.sites if s.role == "weight"}
    for name, bits in {
        "all integer": Bits(most, most),
        "all integer, weights of 4 bits": Bits(most, most, weights),
        "slower ops float": Bits(most, most, floats=slower),
        "all float": Bits(most, most, floats=names),
    }.items():
        row = setting.row(bits, 0.0, args.out, args.threads)
        row |= {"name": name, "seed": seed, "predicted_ms": times(bits.floats), "floats": list(bits.floats), "mean": 0}
        write_json(file_of(args, f"ms-{name}_{args.model.replace(':', '-')}", seed), row)
        print(f"| {name} | {row['ms']:.3f} | {row['predicted_ms']:.3f} | {row['predicted_ms'] / row['ms']:.2f} | "
              f"{row['faster']:.2f} | {row['quantized']:.2f} | {len(bits.floats)} |", flush=True)  # fmt: skip


def hago(args: argparse.Namespace, seed: int) -> None:
    """The paper's setting: an order of all edges, no budget; the start is all maxima (papers.md 2.8, points 3 and 4)."""
    setting = Setting(args, seed, {}, edges="all")
    problem = setting.problem
    each = problem.problem({})
    score = Scored(setting.model, problem.loss, problem.dimensions, problem.always)
    history = run(each, STRATEGIES["greedy"](each, args.evaluations, seed), score, evaluations=args.evaluations)
    best = history.best(each)
    assert best is not None
    for name, trial in (("all maxima", history.trials[0]), ("greedy", best)):
        row = setting.row(problem.bits(trial.candidate), trial.loss, args.out, args.threads)
        row |= {"name": name, "seed": seed, "mean": 0, "evaluations": len(history.trials)}
        write_json(file_of(args, f"hago-{name}_{args.target}", seed), row)
        bits = sum(d.options[k] for d, k in zip(problem.dimensions, trial.candidate, strict=True))
        print(f"| {name} | {bits} | {trial.loss:.5f} | {row['quantized']:.2f} | {row['agreement']:.2f} |", flush=True)


def table(folder: Path) -> None:
    """Means over seeds, the best loss first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows_of(folder):
        groups.setdefault(f"{row['name']}, {row['calibration']} images", []).append(row)
    print("| widths by | bits a weight | MB | loss on calibration images | top-1 | agreement | ms | evaluations | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, rows in sorted(groups.items(), key=lambda item: np.mean([r["loss"] for r in item[1]])):
        mean = {
            k: float(np.mean([r[k] for r in rows])) for k in ("weight_bits", "bytes", "loss", "quantized", "agreement", "ms")
        }
        print(f"| {name} | {mean['weight_bits']:.2f} | {mean['bytes'] / 1e6:.3f} | {mean['loss']:.5f} | "
              f"{mean['quantized']:.2f} | {mean['agreement']:.2f} | {mean['ms']:.3f} | "
              f"{rows[0].get('evaluations', 0)} | {len(rows)} |")  # fmt: skip


def main() -> None:
    parser = options(__doc__, "bytes", "ms", "hago", "table", calibration=64, threads=1, out=Path("search-rows"))
    parser.add_argument("--recipe", default="mse")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="of `bytes`")
    parser.add_argument("--mean", type=float, default=5.0)
    parser.add_argument("--evaluations", type=int, default=100)
    args = parser.parse_args()
    if args.what == "table":
        table(Path(args.model))
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        {"bytes": equal_bytes, "ms": milliseconds, "hago": hago}[args.what](args, seed)


if __name__ == "__main__":
    main()
