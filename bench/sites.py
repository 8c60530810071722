"""Which tensors cost most at few bits: each kind alone at those bits, and all but it.

    python bench/sites.py demo --bits 4,first=w4a8 --recipe fast-rotated
    python bench/sites.py MODEL --images DIR --bits 4,first=w4a8 --calibration 128 --judge 256

A kind is all sites of one name without their numbers (blocks.3.attn.qkv:input is of blocks.attn.qkv:input); weights are kinds
too. The loss is the KL divergence from the float model's answers, in simulation, on `--judge` images of `--images` that do not
calibrate. "Alone": the kind as the recipe chose it, all else at 8 bits. "All but it": the kind at 8 bits, all else as the
recipe chose it. Weights keep the codes that were solved for their inputs at few bits; biases are those that take the mean
error of each layer's output, anew for each row (a bias that was corrected for codes of 4 bits is wrong beside those of 8).
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fewbit import Run
from fewbit.choose.context import Context
from fewbit.choose.correct import OutputBias
from fewbit.core.graph import Graph
from fewbit.core.plan import Choice, Plan
from fewbit.data.images import Images
from fewbit.execute.executor import Executor
from fewbit.request import Request
from fewbit.stages import STAGES
from fewbit.stages.times import context_of

SHARED = ("calibration", "observed", "verdict", "graph", "stats", "equalized")  # both plans are of the same equalized graph


def kind_of(site: str) -> str:
    return re.sub(r"\.\d+(?=[.:])", "", site)


def loss(graph: Graph, plan: Plan, exact: Executor, images: Images) -> tuple[float, float]:
    """Mean KL divergence from the float answers, and the share of images in the same class."""
    quantized = Executor.of(graph, plan)
    total, same = 0.0, 0
    for batch in images.batches(graph.at_a_time(32)):
        with torch.no_grad():
            a, b = (one(batch)[0].log_softmax(1) for one in (exact, quantized))
        total += float((a.exp() * (a - b)).sum())
        same += int((a.argmax(1) == b.argmax(1)).sum())
    return total / len(images), 100 * same / len(images)


def rows(context: Context, few: Plan, many: Plan, images: Images) -> Iterator[tuple[str, int, float, float, float, float]]:
    """(kind, sites, alone: loss, agreement, all but it: loss, agreement), first of nothing at few bits and of everything."""
    graph, exact, correct = context.graph, Executor(context.graph), OutputBias()

    def of(choices: Mapping[str, Choice]) -> tuple[float, float]:
        return loss(graph, correct(replace(few, choices=choices), context), exact, images)

    narrow = {site for site, choice in few.choices.items() if choice.grid.bits < many.choices[site].grid.bits}
    yield "(everything)", len(narrow), *of(few.choices), *of(many.choices)
    for kind in dict.fromkeys(map(kind_of, sorted(narrow))):
        sites = [site for site in narrow if kind_of(site) == kind]
        alone = {**many.choices, **_some(few, sites)}
        yield kind, len(sites), *of(alone), *of({**few.choices, **_some(many, sites)})


def _some(plan: Plan, sites: Iterable[str]) -> dict[str, Choice]:
    return {site: plan.choices[site] for site in sites}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images")
    parser.add_argument("--recipe", default="fast-rotated")
    parser.add_argument("--bits", default="4,first=w4a8")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--judge", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        request = partial(
            Request, model=args.model, images=args.images, score=args.images, calibration=args.calibration, scored=args.judge,
            recipe=args.recipe, everything=True, threads=1, out=Path(folder) / "run",
        )  # fmt: skip
        asked = request(bits=args.bits)
        with Run.start(asked, STAGES) as run:
            (Path(folder) / "wide").mkdir()
            wide = run.fork(Path(folder) / "wide", request(bits="8"), **{name: run[name] for name in SHARED})
            print("| kind | sites | alone: KL | agreement | all but it: KL | agreement |\n|---|---|---|---|---|---|")
            context = context_of(run["graph"], run["stats"], asked, images=run["calibration"].batches(8))
            found = sorted(rows(context, run["plan"], wide["plan"], run["scored"]), key=lambda row: -row[2])
            for kind, count, a, b, c, d in found:
                print(f"| {kind} | {count} | {a:.4f} | {b:.1f} % | {c:.4f} | {d:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
