"""Rows of a table: a model quantized in some way, written as ONNX and scored in its runtime, once for each seed.

    python bench/rows.py make MODEL --images DIR --score DIR --recipes mse fast --bits 8 w4a8 --out FOLDER
    python bench/rows.py FOLDER        # the rows of a folder, and each against the next

A row is what `fewbit quantize --everything` ships: the same stages, from load to evaluate (src/fewbit/stages). Each row is
quantized from its own calibration images (drawn with the seed); the answers of every row on every scored image are kept, so
that rows are compared in pairs (McNemar's exact test). A row that is there already is not made again.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from fewbit import Run
from fewbit.choose import Recipe
from fewbit.core.bits import parse_bits
from fewbit.core.peak import peak
from fewbit.core.plan import Plan
from fewbit.files import read_json, write_json
from fewbit.request import Request
from fewbit.stages import STAGES
from fewbit.target.load import HERE
from fewbit.task.interval import wilson
from fewbit.verify.attention import attention_tables
from fewbit.verify.evaluate import Score

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.ablations import ABLATIONS


class Bench:
    """One model: loaded, captured and observed once for each seed; every row goes on from there.

    `recipes` are the rows' by name; `images` gives those of a seed to calibrate on (without it `--images` for all seeds);
    `options` are of every request. `everything` takes ops that are faster in float as well.
    """

    def __init__(
        self, args: argparse.Namespace, recipes: Mapping[str, Recipe] = ABLATIONS,
        images: Callable[[int], Any] | None = None, *, everything: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.args, self.out, self.recipes, self.images = args, args.out, recipes, images
        self.options = {"everything": everything, **options}
        self.out.mkdir(parents=True, exist_ok=True)
        self.seed: int | None = None
        with Run.start(self.request(seed=0, images=args.images), STAGES[:3]) as first:
            self.scored, self.preprocess = first["scored"], first["inputs"].preprocess  # the same images for every seed
        np.save(self.out / "labels.npy", np.asarray(self.scored.labels))

    def request(self, **options: Any) -> Request:
        """What `fewbit quantize` would be told."""
        args, seed = self.args, options["seed"]
        if "images" not in options:
            options["images"] = args.images if self.images is None else self.images(seed)
        common = {
            "score": args.score, "calibration": args.calibration, "scored": args.scored, "threads": args.threads,
            "target": args.target,
        }  # fmt: skip
        return Request(model=args.model, **{**common, **self.options, "out": self.out / f"seed{seed}", **options})

    def start(self, seed: int) -> Run:
        """The run up to observe that all rows of a seed share."""
        if self.seed != seed:
            self.seed = seed
            self.base = Run.start(self.request(seed=seed), STAGES)
            self.base.values["scored"] = self.scored
            self.graph, self.stats = self.base["exact"], self.base["observed"]
            self.batches = self.base["calibration"].batches(8)
            self.labels = self.base["calibration"].labels
        return self.base

    def quantized(self, recipe: Recipe, text: str, seed: int, target: str | None = None) -> Run:
        """A run of a row; `run["plan"]` and `run["score"]` are made when they are asked for."""
        base, options = self.start(seed), {"recipe": recipe, "bits": text, "target": target or self.args.target, "seed": seed}
        if self.args.time is not None and any(hasattr(one, "seconds") for one in recipe.passes):
            options["time"] = f"{self.args.time}s"
        if not any(hasattr(one, "loss") for one in recipe.passes):
            options["loss"] = None
        shutil.rmtree(self.out / "row", ignore_errors=True)
        (self.out / "row").mkdir()
        return base.fork(self.out / "row", self.request(**options))

    def rows(self, rows: Iterable[Sequence[str]]) -> None:
        """Make rows (name, recipe, bits, perhaps a target) for every seed."""
        rows = list(rows)
        for seed in self.args.seeds:
            for name, recipe, text, *target in rows:
                self.run(name, recipe, text, seed, *target)

    def run(self, name: str, recipe: str, text: str, seed: int, target: str | None = None) -> None:
        """Make one row: a JSON file, and its answers beside it."""
        widths, label = re.sub(r"[^\w.=-]", "-", text), name.replace(" ", "_").replace(",", "")
        file = self.out / f"{label}_{widths}_n{self.args.calibration}_seed{seed}.json"
        if file.exists():
            return
        wide = any(b > 8 for b in (parse_bits(text).candidates if text.startswith("mixed") else ()))  # type: ignore[union-attr]
        run = self.quantized(self.recipes[recipe], text, seed, target or (self.args.wide if wide else self.args.target))
        plan, score = run["plan"], run["score"]
        np.save(file.with_suffix(".npy"), score.rating.answers.numpy())
        np.save(self.out / "float.npy", score.rating.float_answers.numpy())
        row = {
            "name": name, "recipe": recipe, "bits": text, "seed": seed, "target": plan.target, "images": score.images,
            "calibration": len(run["calibration"]), "seconds": dict(run.progress.seconds),
            **accuracies(score, self.scored.labels), **self.sizes(run, plan),
            "peak_bytes": peak(), **flips(run, self.batches[0][:4]), "log": [asdict(entry) for entry in plan.log],
        }  # fmt: skip
        write_json(file, row)
        seconds = row["seconds"].get("choose", 0.0)
        print(f"{name:28} seed {seed}  top-1 {row['top1']:.2f}  agreement {row['agreement']:.2f}  {seconds:.0f} s", flush=True)

    def sizes(self, run: Run, plan: Plan) -> dict[str, float]:
        """Bytes of the weights, of the file and of the packed plan."""
        count = {s.name: math.prod(s.shape) for s in run["graph"].sites if s.role == "weight" and s.name in plan.choices}
        return {
            "weight_bytes": sum(n * plan.choices[s].grid.mean_bits for s, n in count.items()) / 8,
            "onnx_bytes": run["model"].stat().st_size,
            "packed_bytes": (run.folder / "plan.safetensors").stat().st_size,
        }


def accuracies(score: Score, labels: Any) -> dict[str, Any]:
    """Percentages of the float model and of the row, and their interval."""
    truth = np.asarray(labels)
    before, after = ((answers.numpy() == truth) for answers in (score.rating.float_answers, score.rating.answers))
    found = {"float": 100 * float(before.mean()), "top1": 100 * float(after.mean())}
    return {**found, "agreement": score.rating.agreement, "interval": wilson(int(after.sum()), len(after))}


def flips(run: Run, sample: Any) -> dict[str, Any]:
    """Pairs of attention scores whose order has changed."""
    _, rows = attention_tables(run["graph"], run["plan"], sample)
    shares = [row["flipped_share"] for row in rows]
    each = [[row["op"], row["head"], row["flipped_share"]] for row in rows]
    return {"flipped": float(np.mean(shares)) if shares else None, "flips": each}


def edited(target: str, edits: Iterable[tuple[str, str]], path: Path) -> str:
    """A file for a target like a shipped one, with parts of its text replaced."""
    text = (HERE / f"{target}.toml").read_text()
    for old, new in edits:
        if old not in text:
            raise ValueError(f"{target} has no {old!r}")
        text = text.replace(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def rows_of(folder: Path, **fields: Any) -> list[dict[str, Any]]:
    """The rows of a folder that have these fields, by the names of their files."""
    rows = [read_json(file) for file in sorted(folder.glob("*_seed*.json"))]
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def summary(row: Mapping[str, Any], log: str) -> Mapping[str, Any]:
    """What a pass of a row has left in the plan's log."""
    return next(entry["summary"] for entry in row["log"] if entry["name"] == log)


def with_ends(bits: object, ends: int) -> str:
    """Bits with others for the first and the last op with a weight (0: the same)."""
    return f"{bits},first={ends},last={ends}" if ends else str(bits)


def table(folder: Path) -> None:
    """Every row, the worst first: means over seeds, and each against the next with McNemar's exact test over all seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[NDArray[np.bool_]]] = {}
    truth = np.load(folder / "labels.npy")
    for file in sorted(folder.glob("*_seed*.json")):
        row = read_json(file)
        name = f"{row['name']} [{row['bits']}, {row['calibration']} images]"
        rows.setdefault(name, []).append(row)
        answers.setdefault(name, []).append(np.load(file.with_suffix(".npy")) == truth)
    ordered = sorted(rows, key=lambda name: float(np.mean([row["top1"] for row in rows[name]])))
    print("| row | MB | top-1 by seed | mean | agreement | flipped pairs | choose s |\n|---|---|---|---|---|---|---|")
    for name in ordered:
        found = rows[name]
        mean = {k: float(np.mean([r[k] for r in found])) for k in ("top1", "agreement")}
        flipped = [r["flipped"] for r in found if r["flipped"] is not None]
        chosen = ("allocate", "equalize", "choose")
        seconds = float(np.mean([sum(r["seconds"].get(k, 0.0) for k in chosen) for r in found]))
        each = ", ".join(f"{r['top1']:.2f}" for r in found)
        print(
            f"| {name} | {found[0]['weight_bytes'] / 1e6:.2f} | {each} | {mean['top1']:.2f} | {mean['agreement']:.2f} % "
            f"| {100 * float(np.mean(flipped)) if flipped else math.nan:.2f} % | {seconds:.0f} |"
        )
    print("\n| pair | only the first right | only the second right | p |\n|---|---|---|---|")
    for a, b in pairwise(ordered):
        if len(answers[a]) == len(answers[b]):
            one = sum(int((x & ~y).sum()) for x, y in zip(answers[a], answers[b], strict=True))
            two = sum(int((y & ~x).sum()) for x, y in zip(answers[a], answers[b], strict=True))
            p = binomtest(one, one + two).pvalue if one + two else 1.0
            print(f"| {a} / {b} | {one} | {two} | {p:.2g} |")


def options(doc: str | None, *what: str, ends: int | None = None, **defaults: Any) -> argparse.ArgumentParser:
    """What every bench of rows takes, behind one of `what`; `ends` is the default of an option that only some have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if what:
        parser.add_argument("what", choices=what)
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
    if ends is not None:
        parser.add_argument("--ends", type=int, default=ends, help="bits of the first and last op; 0: as the others")
    parser.add_argument("--out", type=Path, default=Path("rows"))
    parser.set_defaults(**defaults)
    return parser


def make(
    arguments: Sequence[str] | None = None, recipes: Mapping[str, Recipe] = ABLATIONS, doc: str | None = __doc__,
    bits: Sequence[str] = ("8",), **defaults: Any,
) -> None:  # fmt: skip
    """A row for each recipe, width and seed: all there is to a bench of recipes."""
    parser = options(doc, ends=0, **defaults)
    parser.add_argument("--recipes", "--rows", nargs="+", default=["mse", "fast"], choices=recipes)
    parser.add_argument("--bits", nargs="+", default=bits)
    args = parser.parse_args(arguments)
    Bench(args, recipes).rows((name, name, with_ends(b, args.ends)) for b in args.bits for name in args.recipes)


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    table(parser.parse_args().folder)


if __name__ == "__main__":
    main()
