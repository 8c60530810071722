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
import resource
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from fewbit.capture import capture, load_model
from fewbit.capture.units import units
from fewbit.choose import Bits, Mixed, allocate, choose, parse_bits
from fewbit.choose.sensitivity import NuclearNorm
from fewbit.core.values import Plan
from fewbit.execute.samples import ROWS, op_samples
from fewbit.files import read_json
from fewbit.observe import observe
from fewbit.recipes import RECIPES
from fewbit.report.figures import FLOAT
from fewbit.report.figures import frontier as frontier_figure
from fewbit.target import load_target

SEARCHES = ("similarity", "similarity+ranking", "similarity+bias", "all three")
OURS = dict(RECIPES)
OURS["liu2021 on probabilities"] = replace(RECIPES["liu2021"], sensitivity=NuclearNorm(map="probabilities"))
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


class Liu(Bench):
    """The recipes of the paper, and the nuclear norm of probabilities beside them."""

    recipes = OURS


def picture(folder: Path) -> None:
    """Top-1 against the bytes of the weights, means over seeds, as a page with one figure."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
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
        }
        for (kind, number), found in sorted(groups.items())
    ]
    figure = frontier_figure(rows).update_layout(margin_t=90).update_traces(mode="lines+markers", line={"width": 1})
    figure.add_hline(y=next(iter(groups.values()))[0]["float"], line={"dash": "dot", "color": FLOAT}, annotation_text="float")
    figure.write_html(folder / "picture.html", include_plotlyjs=True, config={"displayModeBar": False})
    print(folder / "picture.html")


def heads(folder: Path) -> None:
    """Flipped pairs of each head in the whole model: with the ranking term against without, and the heads that flip most."""
    flips: dict[str, dict[tuple[str, int], list[float]]] = {}
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
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
    target = load_target(bench.args.target)
    blocks = sorted({u.name for u in units(bench.graph)})
    names = {op for u in units(bench.graph) if u.name in blocks[::every] for op in u.ops}
    whole = op_samples(bench.graph, bench.batches, names, tokens=10**6, seed=0)
    found: dict[int, Plan] = {}
    for rows in (128, 256, 512, 2048, 10**9):
        recipe = replace(RECIPES["liu2021"], search=replace(RECIPES["liu2021"].search, rows=rows), correction=None)  # type: ignore[type-var]
        began = time.perf_counter()
        found[rows] = choose(bench.graph, bench.stats, target, recipe, bits=Bits(bits, bits), samples=whole, everything=True)
        print(f"{rows} rows: {time.perf_counter() - began:.0f} s", flush=True)
    print("| rows | steps | the same | within 2 % | within 5 % | largest difference |\n|---|---|---|---|---|---|")
    for rows, plan in list(found.items())[:-1]:
        searched = [c.site for c in plan.choices.values() if c.role != "bias" and "OutputSearch" in c.method]
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
        samples = op_samples(graph, batches, [op.name for op in graph.ops], max(1, ROWS // images))
        seconds.append(time.perf_counter())
        recipe, target = RECIPES["liu2021"], load_target(args.target)
        mixed = parse_bits("mixed:6.0")
        assert isinstance(mixed, Mixed)
        bits = allocate(graph, stats, target, recipe, mixed, batches[0], everything=True).bits
        seconds.append(time.perf_counter())
        choose(graph, stats, target, recipe, bits=bits, samples=samples, everything=True)
        seconds.append(time.perf_counter())
        each = " | ".join(f"{b - a:.1f}" for a, b in pairwise(seconds))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"| {images} | {depth} | {each} | {peak:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "widths", "beyond", "heads", "picture", "steps", "cost"))
    options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[6])
    parser.add_argument("--every", type=int, default=4, help="steps: every so many modules")
    args = parser.parse_args()
    if args.what in ("heads", "picture"):
        {"heads": heads, "picture": picture}[args.what](Path(args.model))
        return
    torch.set_num_threads(args.threads)
    if args.what == "cost":
        cost(args)
        return
    bench = Liu(args)
    if args.what == "steps":
        steps(bench, args.bits[0], every=args.every)
        return
    rows = {"ablation": ablation, "widths": widths, "beyond": beyond}[args.what]
    for seed in args.seeds:
        for bits in args.bits:
            for name, (recipe, text) in rows(bits).items():
                bench.run(name, recipe, text, seed)


if __name__ == "__main__":
    main()
