"""Liu et al. 2021 in our hands: the rows of the paper's Table 3, and widths by module against one width for all.

    python bench/liu2021.py ablation demo --bits 6 --out liu-demo
    python bench/liu2021.py widths demo --out liu-demo
    python bench/liu2021.py ablation MODEL --images DIR --score DIR --bits 6 --out liu-vit
    python bench/rows.py liu-demo
    python bench/liu2021.py heads liu-demo
    python bench/liu2021.py picture liu-demo                                    # accuracy against bytes, picture.html
    python bench/liu2021.py steps MODEL --images DIR --bits 6 --out liu-vit     # does a sample of rows find the same steps?
    python bench/liu2021.py cost --out liu-cost                                 # seconds against images and depth

How a row is made, scored and compared: rows.py. `--score` takes what `fewbit quantize --score` takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ABLATIONS, Bench, options, peak, rows_of
from scipy.stats import binomtest

from fewbit.capture import capture
from fewbit.capture.structure import modules
from fewbit.choose import Bits, Context, Mixed, Recipe, allocate, choose, parse_bits
from fewbit.choose.objectives import RankingLoss
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.ranges import Ranges
from fewbit.choose.sensitivity import NuclearNorm
from fewbit.core.plan import Plan
from fewbit.execute.samples import op_samples
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.recipes import RECIPES
from fewbit.report.figures import Points
from fewbit.report.page import of_sections
from fewbit.report.scale import Axis
from fewbit.report.sections import Section
from fewbit.target import load_target

SEARCHES = ("similarity", "similarity+ranking", "similarity+bias", "all three")
PROBABILITIES = replace(RECIPES["liu2021"], sensitivity=NuclearNorm(map="probabilities"))
OURS = {**ABLATIONS, "liu2021 on probabilities": PROBABILITIES}
NAMES = dict(zip(SEARCHES, ("liu2021-similarity", "liu2021-ranking", "liu2021-bias", "liu2021"), strict=True))


def ablation(bits: int) -> dict[str, tuple[str, str]]:
    """Row name -> (recipe, bits) for the percentile baseline and the eight rows of Table 3."""
    rows = {"percentile": ("percentile", str(bits))}
    rows |= {name: (NAMES[name], str(bits)) for name in SEARCHES}
    rows |= {f"{name}+MP": (NAMES[name], f"mixed:{bits}.0") for name in SEARCHES}
    return rows


def widths(bits: int) -> dict[str, tuple[str, str]]:
    """One width for all, nuclear norms and KL at equal bytes."""
    given = {4: "2,3,4,5,6,7,8", 5: "3,4,5,6,7,8", 6: "4,5,6,7,8", 8: "6,7,8,9,10"}[bits]
    rows = {f"uniform {bits}": ("liu2021", str(bits)), f"percentile {bits}": ("percentile", str(bits))}
    rows[f"mixed {bits}, nuclear norm"] = ("liu2021", f"mixed:{bits}.0:{given}")
    rows[f"mixed {bits}, nuclear norm of probabilities"] = ("liu2021 on probabilities", f"mixed:{bits}.0:{given}")
    rows[f"mixed {bits}, KL"] = ("liu2021-kl", f"mixed:{bits}.0:{given}")
    return rows


def beyond(bits: int) -> dict[str, tuple[str, str]]:
    """What the paper leaves open: inputs of the float model or of the quantized one, the op's output or the module's."""
    return {
        f"{name}, {bits}": (name, str(bits))
        for name in ("liu2021-bias", "output-mse", "liu2021-module", "liu2021", "liu2021-sequential")
    }


def picture(folder: Path, calibration: int) -> None:
    """Top-1 against the bytes of the weights, means over seeds, as a page with one figure."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows_of(folder, calibration=calibration):
        kind, number = row["name"].replace(",", " ").split()[:2]
        how = row["name"].partition(", ")[2]
        name = {"percentile": "percentile, one width", "uniform": "liu2021, one width"}.get(kind, f"liu2021, widths by {how}")
        groups.setdefault((name, number), []).append(row)
    rows = [
        {
            "kind": kind,
            "label": number,
            "bits": float(number),
            "bytes": float(np.mean([r["weight_bytes"] for r in found])),
            "accuracy": float(np.mean([r["top1"] for r in found])),
            "float": found[0]["float"],
        }
        for (kind, number), found in sorted(groups.items())
    ]
    view = Points(
        Axis("accuracy", "top-1, %"), Axis("bytes", "weights, MB (10⁶ bytes)", 1e-6), group="{kind}", line="float",
        lines=tuple(row["kind"] for row in rows), hover="{label} bits: {accuracy:.2f} %",
    )  # fmt: skip
    section = Section("Top-1 against the bytes of the weights", "rows", (view,)).shown({"rows": rows})
    (folder / "picture.html").write_text(of_sections("Liu et al. 2021", [section] if section else []), encoding="utf-8")
    print(folder / "picture.html")


def heads(folder: Path, calibration: int) -> None:
    """Flipped pairs of each head in the whole model: with the ranking term against without, and the heads that flip most."""
    flips: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows_of(folder, calibration=calibration):
        for op, head, share in row["flips"]:
            flips.setdefault(row["name"], {}).setdefault((op, head), []).append(share)
    mean = {name: {head: float(np.mean(shares)) for head, shares in found.items()} for name, found in flips.items()}
    print("| without | with | flipped without | flipped with | heads with fewer | p |\n|---|---|---|---|---|---|")
    for without, ranked in (
        ("similarity", "similarity+ranking"),
        ("similarity+bias", "all three"),
        ("similarity+MP", "similarity+ranking+MP"),
    ):
        if without in mean and ranked in mean:
            a, b = mean[without], mean[ranked]
            fewer, differ = sum(b[h] < a[h] for h in a), sum(b[h] != a[h] for h in a)
            p = binomtest(fewer, differ).pvalue if differ else 1.0
            shares = [f"{100 * np.mean(list(m.values())):.2f} %" for m in (a, b)]
            print(f"| {without} | {ranked} | {shares[0]} | {shares[1]} | {fewer} of {len(a)} | {p:.2g} |")
    first = mean.get("similarity", {})
    print("\nMost flipped with similarity alone: " + ", ".join(
        f"{op} head {head} {100 * share:.1f} %" for (op, head), share in sorted(first.items(), key=lambda x: -x[1])[:6]
    ))  # fmt: skip


def steps(bench: Bench, bits: int, every: int) -> None:
    """The steps that are found on samples of rows, against those on all rows: ratios, for every few blocks of the model."""
    bench.start(bench.args.seeds[0])
    blocks = sorted({u.name for u in modules(bench.graph)})
    names = {op for u in modules(bench.graph) if u.name in blocks[::every] for op in u.ops}
    whole = op_samples(bench.graph, bench.batches, names, tokens=10**6, seed=0)
    context = Context(
        bench.graph, bench.stats, load_target(bench.args.target), Bits(bits, bits), images=bench.batches, everything=True,
        sampled=whole,
    )  # fmt: skip
    found: dict[int, Plan] = {}
    for rows in (128, 256, 512, 2048, 10**9):
        began = time.perf_counter()
        found[rows] = choose(context, Recipe("", (Ranges(), OutputSearch(ranking=RankingLoss(), rows=rows))))
        print(f"{rows} rows: {time.perf_counter() - began:.0f} s", flush=True)
    print("| rows | steps | the same | within 2 % | within 5 % | largest difference |\n|---|---|---|---|---|---|")
    for rows, plan in list(found.items())[:-1]:
        searched = [c.site for c in plan.choices.values() if "OutputSearch" in c.method]
        pairs = [(plan.choices[s].qparams.scale, found[10**9].choices[s].qparams.scale) for s in searched]
        away = np.array([float((a / b - 1).abs().max()) for a, b in pairs])
        shares = [100 * float((away <= limit + 1e-6).mean()) for limit in (0, 0.02, 0.05)]
        print(
            f"| {rows} | {len(away)} | {shares[0]:.0f} % | {shares[1]:.0f} % | {shares[2]:.0f} % | {100 * away.max():.1f} % |"
        )


def cost(args: argparse.Namespace) -> None:
    """Seconds of each stage of liu2021 for a ViT-S of random weights, at three numbers of images and three depths."""
    import timm

    torch.manual_seed(0)
    print("| images | blocks | capture | observe | replay | allocate | choose | peak GB |\n|---|---|---|---|---|---|---|---|")
    for images, depth in ((128, 4), (128, 8), (128, 12), (32, 12), (64, 12)):
        net = timm.models.VisionTransformer(112, 14, embed_dim=384, depth=depth, num_heads=6, num_classes=200).eval()
        batches = torch.randn(images, 3, 112, 112).split(8)
        seconds = [time.perf_counter()]
        graph = capture(load_model(net, overrides={"input_size": (3, 112, 112)}))
        seconds.append(time.perf_counter())
        stats = observe(graph, batches)
        seconds.append(time.perf_counter())
        context = Context(graph, stats, load_target(args.target), images=batches, everything=True)
        samples = context.samples
        seconds.append(time.perf_counter())
        recipe, mixed = RECIPES["liu2021"], parse_bits("mixed:6.0")
        assert isinstance(mixed, Mixed)
        bits = allocate(context, mixed, recipe).bits
        seconds.append(time.perf_counter())
        choose(replace(context, bits=bits, sampled=samples), recipe)
        seconds.append(time.perf_counter())
        each = " | ".join(f"{b - a:.1f}" for a, b in pairwise(seconds))
        print(f"| {images} | {depth} | {each} | {peak() / 1e9:.2f} |", flush=True)


def main() -> None:
    parser = options(__doc__, "ablation", "widths", "beyond", "heads", "picture", "steps", "cost")
    parser.add_argument("--bits", type=int, nargs="+", default=[6])
    parser.add_argument("--every", type=int, default=4, help="steps: every so many modules")
    args = parser.parse_args()
    if args.what in ("heads", "picture"):
        {"heads": heads, "picture": picture}[args.what](Path(args.model), args.calibration)
        return
    torch.set_num_threads(args.threads)
    if args.what == "cost":
        cost(args)
        return
    bench = Bench(args, OURS)
    if args.what == "steps":
        steps(bench, args.bits[0], every=args.every)
        return
    rows = {"ablation": ablation, "widths": widths, "beyond": beyond}[args.what]
    bench.rows((name, *row) for bits in args.bits for name, row in rows(bits).items())


if __name__ == "__main__":
    main()
