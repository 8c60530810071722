"""Rows of a table: a model quantized in some way, written as ONNX and scored in onnxruntime, once for each seed.

    python bench/rows.py FOLDER        # the rows of a folder, and each against the next

Every product has the width of its row, those of attention too (`--everything`). Each row is quantized from its own
calibration images (drawn with the seed); the answers of every row on every scored image are kept, so that rows are compared in
pairs (McNemar's exact test). A row that is there already is not made again.
"""

from __future__ import annotations

import argparse
import math
import re
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from fewbit.capture import capture, load_model
from fewbit.choose import Bits, Mixed, allocate, choose, lapq, parse_bits, reconstruct
from fewbit.core.values import Graph, Plan
from fewbit.data.images import Images, open_images
from fewbit.demo import model as demo
from fewbit.execute.samples import ROWS, channel_samples, op_samples
from fewbit.files import read_json, write_json
from fewbit.observe import Stats, observe
from fewbit.pipeline import preprocess_of
from fewbit.realize import float_onnx, realize, save_plan
from fewbit.recipes import RECIPES, Recipe
from fewbit.target import load_target
from fewbit.target.allowed import allowed
from fewbit.target.spec import HERE
from fewbit.verify.attention import attention_tables
from fewbit.verify.evaluate import wilson
from fewbit.verify.runtimes import OnnxRuntime


class Bench:
    """One model and one target: captured once, observed and sampled once for each seed. `recipes` are rows' by name;
    `everything` takes ops that are faster in float as well.
    """

    recipes: Mapping[str, Recipe] = RECIPES
    everything = True

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        loaded = load_model(args.model)
        self.preprocess = preprocess_of(loaded, {})
        self.graph: Graph = capture(loaded)
        outputs = loaded.classes or None
        self.scored = self._open(args.score or str(demo.TEST), args.scored, labels=True, classes=outputs)
        np.save(self.out / "labels.npy", np.asarray(self.scored.labels))
        self.seed: int | None = None

    def _open(self, source: str, limit: int | None, *, labels: bool, classes: Any = None) -> Images:
        known = (classes or self._outputs()) if labels else None
        return open_images(source, self.preprocess, classes=known, labels=labels, limit=limit, seed=self.seed_of_images)

    seed_of_images = 0

    def _outputs(self) -> int:
        last = next(n for n in self.graph.module.graph.nodes if n.op == "output").all_input_nodes[0]
        return int(last.meta["tensor_meta"].shape[1])

    def start(self, seed: int, *, samples: bool = True, labels: bool = False) -> None:
        """Observe and, with `samples`, sample the calibration images of a seed; with `labels`, of a source that has them."""
        if self.seed == seed:
            return
        self.seed = self.seed_of_images = seed
        self.batches, self.labels = self.calibration(seed, labels=labels)
        self.stats: Stats = observe(self.graph, self.batches)
        self.count = sum(map(len, self.batches))
        names = [op.name for op in self.graph.ops]
        self.samples = op_samples(self.graph, self.batches, names, max(1, ROWS // self.count), seed) if samples else {}

    def calibration(self, seed: int, *, labels: bool) -> tuple[list[Tensor], Tensor | None]:
        """Batches of images to calibrate on, drawn with a seed, and their classes if those are wanted."""
        images = self._open(self.args.images or str(demo.CALIBRATION), self.args.calibration, labels=labels)
        return list(images.batches(8)), images.labels

    def plan(self, recipe: Recipe, text: str, target_name: str) -> tuple[Plan, dict[str, float]]:
        """The plan of a recipe, and the seconds of allocating and of choosing."""
        target, asked, seconds = load_target(target_name), parse_bits(text), {"allocate": 0.0}
        began, extra = time.perf_counter(), {}
        self.planned, stats = self.graph, self.stats
        if recipe.equalize is not None and isinstance(asked, Bits):
            widths = asked.of(self.graph)
            slots = allowed(
                self.graph, target, weight_bits=widths.weights, activation_bits=widths.activations, widths=widths.ops
            )
            equalized = recipe.equalize(self.graph, self.batches, slots.grids)
            self.planned, stats = equalized.graph, observe(equalized.graph, self.batches)
            extra = {"equalize": [dict(row) for row in equalized.record]}
            seconds["equalize"] = time.perf_counter() - began
        axes = allowed(self.graph, target).channel_axes
        channels = (
            channel_samples(self.graph, self.batches, axes, max(1, ROWS // self.count), seed=self.seed or 0) if axes else {}
        )
        if isinstance(asked, Mixed):
            batch = torch.cat(self.batches)[: recipe.sensitivity.images]
            found = allocate(self.graph, self.stats, target, recipe, asked, batch, everything=True)
            asked, extra = found.bits, {"mixed": found.record}
            seconds["allocate"] = time.perf_counter() - began
        began = time.perf_counter()
        assert isinstance(asked, Bits)
        options: dict[str, Any] = {"bits": asked, "samples": self.samples, "everything": self.everything}
        if recipe.joint is not None:
            recipe = replace(recipe, joint=replace(recipe.joint, seconds=self.args.time))
            plan = lapq(self.graph, self.stats, target, recipe, self.batches, **options)
        elif recipe.rebuild is not None:
            recipe = replace(recipe, rebuild=recipe.rebuild.in_seconds(self.args.time))
            options |= {"channels": channels, "seed": self.seed or 0}
            plan = reconstruct(self.planned, stats, target, recipe, self.batches, **options)
        else:
            plan = choose(self.planned, stats, target, recipe, images=self.batches, channels=channels, **options)
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

    def run(self, name: str, recipe: str, text: str, seed: int, target: str | None = None) -> None:
        """Make one row: a JSON file, and its answers beside it."""
        widths = re.sub(r"[^\w.=-]", "-", text)
        file = self.out / f"{name.replace(' ', '_').replace(',', '')}_{widths}_seed{seed}.json"
        if file.exists():
            return
        before = self.float_answers()
        self.start(seed)
        wide = any(b > 8 for b in (parse_bits(text).candidates if text.startswith("mixed") else ()))  # type: ignore[union-attr]
        target = target or (self.args.wide if wide else self.args.target)
        plan, seconds = self.plan(self.recipes[recipe], text, target)
        path = self.out / "row.onnx"
        realize(self.planned, plan, path, **load_target(target).form)
        after, labels = self.answers(path), np.asarray(self.scored.labels)
        _, flips = attention_tables(self.planned, plan, self.batches[0][:4])
        save_plan(self.planned, replace(plan, extra={}), self.out)
        weights = [s.name for s in self.graph.sites if s.role == "weight" and s.name in plan.choices]
        bits = {s: plan.choices[s].grid.mean_bits for s in weights}
        count = {s.name: math.prod(s.shape) for s in self.graph.sites if s.role == "weight"}
        np.save(file.with_suffix(".npy"), after)
        row = {
            "name": name, "recipe": recipe, "bits": text, "seed": seed, "target": target, "images": len(after),
            "calibration": sum(map(len, self.batches)), "seconds": seconds,
            "float": 100 * float((before == labels).mean()), "top1": 100 * float((after == labels).mean()),
            "agreement": 100 * float((after == before).mean()), "interval": wilson(int((after == labels).sum()), len(after)),
            "weight_bytes": sum(count[s] * b for s, b in bits.items()) / 8, "onnx_bytes": path.stat().st_size,
            "packed_bytes": (self.out / "plan.safetensors").stat().st_size, "peak_bytes": peak(),
            "flipped": float(np.mean([f["flipped_share"] for f in flips])) if flips else None,
            "flips": [[f["op"], f["head"], f["flipped_share"]] for f in flips], "extra": dict(plan.extra),
        }  # fmt: skip
        write_json(file, row)
        print(f"{name:28} seed {seed}  top-1 {row['top1']:.2f}  agreement {row['agreement']:.2f}  {seconds}", flush=True)


def edited(target: str, edits: Iterable[tuple[str, str]], path: Path) -> str:
    """A file for a target like a shipped one, with parts of its text replaced."""
    text = (HERE / f"{target}.toml").read_text()
    for old, new in edits:
        if old not in text:
            raise ValueError(f"{target} has no {old!r}")
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(folder: Path, name: str) -> list[Mapping[str, Any]]:
    """The rows of a name, one for each seed."""
    rows = [read_json(file) for file in sorted(folder.glob("*_seed*.json"))]
    return [row for row in rows if row["name"] == name]


def table(folder: Path) -> None:
    """Every row, the worst first: means over seeds, and each against the next with McNemar's exact test over all seeds."""
    rows: dict[str, list[Mapping[str, object]]] = {}
    answers: dict[str, list[NDArray[np.bool_]]] = {}
    truth = np.load(folder / "labels.npy")
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
        name = f"{row['name']} [{row['bits']}]"
        rows.setdefault(name, []).append(row)
        answers.setdefault(name, []).append(np.load(file.with_suffix(".npy")) == truth)
    print("| row | MB | top-1 by seed | mean | agreement | flipped pairs | choose s |\n|---|---|---|---|---|---|---|")
    for name, found in sorted(rows.items(), key=lambda item: np.mean([r["top1"] for r in item[1]])):  # type: ignore[misc, list-item]
        mean = {k: float(np.mean([r[k] for r in found])) for k in ("top1", "agreement")}  # type: ignore[misc, list-item]
        flipped = [r["flipped"] for r in found if r["flipped"] is not None]
        seconds = float(np.mean([sum(r["seconds"].values()) for r in found]))  # type: ignore[index]
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


def options(parser: argparse.ArgumentParser) -> None:
    """What every bench of rows takes."""
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--images", help="the default are the demo's")
    parser.add_argument("--score", help="images that no row is calibrated on; the default are the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--scored", type=int)
    parser.add_argument("--target", default="ort-x86-vnni")
    parser.add_argument("--wide", default="ort-x86-wide", help="the target for candidates above 8 bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", type=float, default=60.0, help="seconds of a joint search or a reconstruction")
    parser.add_argument("--out", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    table(parser.parse_args().folder)


if __name__ == "__main__":
    main()
