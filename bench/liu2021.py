"""Liu et al. 2021 in our hands: the rows of the paper's Table 3, and widths by module against one width for all.

    python bench/liu2021.py ablation demo --bits 6 --out liu-demo
    python bench/liu2021.py widths demo --out liu-demo
    python bench/liu2021.py ablation MODEL --images DIR --score DIR --bits 6 --out liu-vit
    python bench/liu2021.py table liu-demo
    python bench/liu2021.py heads liu-demo
    python bench/liu2021.py picture liu-demo                                    # accuracy against bytes, picture.html
    python bench/liu2021.py steps MODEL --images DIR --bits 6 --out liu-vit     # does a sample of rows find the same steps?
    python bench/liu2021.py cost --out liu-cost                                 # seconds against images and depth

Each row is quantized from its own calibration images (drawn with the seed), written as ONNX and scored in onnxruntime; the
answers of every row on every scored image are kept, so that rows are compared in pairs (McNemar's exact test). A row that is
there already is not made again. `--score` takes what `fewbit quantize --score` takes.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from fewbit.capture import capture, load_model
from fewbit.capture.units import units
from fewbit.choose import Bits, Mixed, allocate, choose, parse_bits
from fewbit.choose.bits.sensitivity import NuclearNorm
from fewbit.data.images import Images, open_images
from fewbit.demo import model as demo
from fewbit.files import read_json, write_json
from fewbit.observe import Stats, observe
from fewbit.pipeline import _preprocess
from fewbit.realize import float_onnx, realize
from fewbit.recipes import RECIPES, Recipe
from fewbit.replay import ROWS, op_samples
from fewbit.report.figures import FLOAT
from fewbit.report.figures import frontier as frontier_figure
from fewbit.target import load_target
from fewbit.types import Graph, Plan
from fewbit.verify.attention import attention_tables
from fewbit.verify.evaluate import wilson
from fewbit.verify.runtimes import OnnxRuntime

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


class Bench:
    """One model and one target: captured once, observed and sampled once for each seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        loaded = load_model(args.model)
        self.preprocess = _preprocess(loaded, {})
        self.graph: Graph = capture(loaded)
        outputs = loaded.classes or None
        self.scored = self._open(args.score or str(demo.TEST), labels=True, classes=outputs)
        self.seed: int | None = None

    def _open(self, source: str, *, labels: bool, **options: object) -> Images:
        known = options.get("classes") or self._outputs()
        return open_images(source, self.preprocess, classes=known if labels else None, labels=labels, limit=self.args.scored
                           if labels else self.args.calibration, seed=self.seed_of_images)  # fmt: skip

    seed_of_images = 0

    def _outputs(self) -> int:
        last = next(n for n in self.graph.module.graph.nodes if n.op == "output").all_input_nodes[0]
        return int(last.meta["tensor_meta"].shape[1])

    def start(self, seed: int) -> None:
        """Observe and sample the calibration images of a seed."""
        if self.seed == seed:
            return
        self.seed = self.seed_of_images = seed
        images = self._open(self.args.images or str(demo.CALIBRATION), labels=False)
        self.batches = list(images.batches(8))
        self.stats: Stats = observe(self.graph, self.batches)
        names = [op.name for op in self.graph.ops]
        self.samples = op_samples(self.graph, self.batches, names, max(1, ROWS // len(images)), seed)

    def plan(self, recipe: Recipe, text: str, target_name: str) -> tuple[Plan, dict[str, float]]:
        """The plan of a recipe, and the seconds of allocating and of choosing."""
        target, asked, seconds = load_target(target_name), parse_bits(text), {"allocate": 0.0}
        began = time.perf_counter()
        extra = {}
        if isinstance(asked, Mixed):
            batch = torch.cat(self.batches)[: recipe.sensitivity.images]
            found = allocate(self.graph, self.stats, target, recipe, asked, batch)
            asked, extra = found.bits, {"mixed": found.record}
            seconds["allocate"] = time.perf_counter() - began
        began = time.perf_counter()
        assert isinstance(asked, Bits)
        plan = choose(self.graph, self.stats, target, recipe, bits=asked, samples=self.samples, images=self.batches)
        seconds["choose"] = time.perf_counter() - began
        return replace(plan, extra={**plan.extra, **extra}), seconds

    def answers(self, path: Path) -> NDArray[np.int64]:
        """The class of each scored image, in onnxruntime."""
        session = OnnxRuntime(path, threads=self.args.threads)
        found = [np.asarray(session.run(x.numpy())["logits"]).argmax(1) for x in self.scored.batches(16)]
        return np.concatenate(found)

    def float_answers(self) -> NDArray[np.int64]:
        path = self.out / "float.npy"
        if not path.exists():
            float_onnx(self.graph, self.out / "float.onnx", opset=20)
            np.save(path, self.answers(self.out / "float.onnx"))
        return np.load(path)  # type: ignore[no-any-return]

    def run(self, name: str, recipe: str, text: str, seed: int) -> None:
        """Make one row: a JSON file, and its answers beside it."""
        file = self.out / f"{name.replace(' ', '_').replace(',', '')}_{text.replace(':', '-')}_seed{seed}.json"
        if file.exists():
            return
        before = self.float_answers()
        self.start(seed)
        wide = any(b > 8 for b in (parse_bits(text).candidates if text.startswith("mixed") else ()))  # type: ignore[union-attr]
        target = self.args.wide if wide else self.args.target
        plan, seconds = self.plan(OURS[recipe], text, target)
        path = self.out / "row.onnx"
        realize(self.graph, plan, path, opset=load_target(target).opset)
        after, labels = self.answers(path), np.asarray(self.scored.labels)
        _, flips = attention_tables(self.graph, plan, self.batches[0][:4])
        bits = {
            s.name: plan.choices[s.name].grid.bits for s in self.graph.sites if s.role == "weight" and s.name in plan.choices
        }
        count = {s.name: math.prod(s.shape) for s in self.graph.sites if s.role == "weight"}
        np.save(file.with_suffix(".npy"), after)
        row = {
            "name": name, "recipe": recipe, "bits": text, "seed": seed, "target": target, "images": len(after),
            "calibration": sum(map(len, self.batches)), "seconds": seconds,
            "float": 100 * float((before == labels).mean()), "top1": 100 * float((after == labels).mean()),
            "agreement": 100 * float((after == before).mean()), "interval": wilson(int((after == labels).sum()), len(after)),
            "weight_bytes": sum(count[s] * b for s, b in bits.items()) / 8, "onnx_bytes": path.stat().st_size,
            "flipped": float(np.mean([f["flipped_share"] for f in flips])) if flips else None,
            "flips": [[f["op"], f["head"], f["flipped_share"]] for f in flips], "extra": dict(plan.extra),
        }  # fmt: skip
        write_json(file, row)
        print(f"{name:28} seed {seed}  top-1 {row['top1']:.2f}  agreement {row['agreement']:.2f}  {seconds}", flush=True)


def table(folder: Path, labels: Callable[[], NDArray[np.int64]]) -> None:
    """Every row, the worst first: means over seeds, and each against the next with McNemar's exact test over all seeds."""
    rows: dict[str, list[Mapping[str, object]]] = {}
    answers: dict[str, list[NDArray[np.bool_]]] = {}
    truth = labels()
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
        name = f"{row['name']} [{row['bits']}]"
        rows.setdefault(name, []).append(row)
        answers.setdefault(name, []).append(np.load(file.with_suffix(".npy")) == truth)
    print("| row | MB | top-1 by seed | mean | agreement | flipped pairs | choose s |\n|---|---|---|---|---|---|---|")
    for name, found in sorted(rows.items(), key=lambda item: np.mean([r["top1"] for r in item[1]])):  # type: ignore[misc, list-item]
        mean = {k: float(np.mean([r[k] for r in found])) for k in ("top1", "agreement")}  # type: ignore[misc, list-item]
        flipped = [r["flipped"] for r in found if r["flipped"] is not None]
        seconds = float(np.mean([r["seconds"]["choose"] + r["seconds"]["allocate"] for r in found]))  # type: ignore[index]
        each = ", ".join(f"{r['top1']:.2f}" for r in found)
        print(
            f"| {name} | {found[0]['weight_bytes'] / 1e6:.2f} | {each} | {mean['top1']:.2f} | {mean['agreement']:.2f} % "  # type: ignore[operator]
            f"| {100 * float(np.mean(flipped)) if flipped else math.nan:.2f} % | {seconds:.0f} |"  # type: ignore[arg-type]
        )
    print("\n| pair | only the first right | only the second right | p |\n|---|---|---|---|")
    ordered = sorted(rows, key=lambda name: np.mean([r["top1"] for r in rows[name]]))  # type: ignore[misc, list-item]
    for a, b in pairwise(ordered):
        if len(answers[a]) == len(answers[b]):
            one = sum(int((x & ~y).sum()) for x, y in zip(answers[a], answers[b], strict=True))
            two = sum(int((y & ~x).sum()) for x, y in zip(answers[a], answers[b], strict=True))
            p = binomtest(one, one + two).pvalue if one + two else 1.0
            print(f"| {a} / {b} | {one} | {two} | {p:.2g} |")


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
        found[rows] = choose(bench.graph, bench.stats, target, recipe, bits=Bits(bits, bits), samples=whole)
        print(f"{rows} rows: {time.perf_counter() - began:.0f} s", flush=True)
    print("| rows | steps | the same | within 2 % | within 5 % | largest difference |\n|---|---|---|---|---|---|")
    for rows, plan in list(found.items())[:-1]:
        searched = [c.site for c in plan.choices.values() if c.role != "bias" and "OutputSearch" in c.method]
        pairs = [(plan.choices[s].affine.scale, found[10**9].choices[s].affine.scale) for s in searched]
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
        bits = allocate(graph, stats, target, recipe, mixed, batches[0]).bits
        seconds.append(time.perf_counter())
        choose(graph, stats, target, recipe, bits=bits, samples=samples)
        seconds.append(time.perf_counter())
        each = " | ".join(f"{b - a:.1f}" for a, b in pairwise(seconds))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"| {images} | {depth} | {each} | {peak:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "widths", "beyond", "table", "heads", "picture", "steps", "cost"))
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--images")
    parser.add_argument("--score")
    parser.add_argument("--bits", type=int, nargs="+", default=[6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--scored", type=int)
    parser.add_argument("--target", default="ort-x86-vnni")
    parser.add_argument("--wide", default="ort-x86-wide", help="the target for candidates above 8 bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=4, help="steps: every so many modules")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "table":
        table(Path(args.model), lambda: np.load(Path(args.model) / "labels.npy"))
        return
    if args.what in ("heads", "picture"):
        {"heads": heads, "picture": picture}[args.what](Path(args.model))
        return
    torch.set_num_threads(args.threads)
    if args.what == "cost":
        cost(args)
        return
    bench = Bench(args)
    if args.what == "steps":
        steps(bench, args.bits[0], every=args.every)
        return
    np.save(args.out / "labels.npy", np.asarray(bench.scored.labels))
    rows = {"ablation": ablation, "widths": widths, "beyond": beyond}[args.what]
    for seed in args.seeds:
        for bits in args.bits:
            for name, (recipe, text) in rows(bits).items():
                bench.run(name, recipe, text, seed)


if __name__ == "__main__":
    main()
