"""What synthetic images bring to fine-tuning with few real ones (FDDA): the rows of the paper's ablation on ResNet-20.

    python bench/fdda.py --out bench/out/fdda                       # demo:resnet20, W4A4, first and last layer included
    python bench/fdda.py --bits 4,first=8,last=8 --out bench/out/fdda-f8l8

Rows: the plan without tuning, tuned on the real images alone, and on these with synthetic images from plain batch-norm
statistics, with L_C, with L_D, and with both. All rows of a seed have the same real images (`--per-class` of each class, drawn
with the seed from the shipped calibration images) and the same number of student steps. Accuracy is measured in onnxruntime on
`--score`, or the shipped test images. A row that is there already is not made again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.capture import capture, load_model
from fewbit.choose import Lot, choose, finetune, parse_bits
from fewbit.data.images import Images, open_images
from fewbit.data.synthesize.source import Synthesis, in_steps
from fewbit.data.synthesize.teacher import Teacher
from fewbit.demo import model as demo
from fewbit.files import read_json, write_json
from fewbit.observe import observe
from fewbit.pipeline import preprocess_of
from fewbit.realize import float_onnx, realize
from fewbit.recipes import RECIPES
from fewbit.target import load_target
from fewbit.types import Plan
from fewbit.verify import evaluate

FDDA = RECIPES["fdda"].tune
ROWS: dict[str, dict[str, float] | None] = {  # fields of the generator; None: no synthetic images
    "not tuned": None,
    "real only": None,
    "+ batch-norm statistics": {},
    "+ centralized": {"distorted": 0.0},
    "+ distorted": {"centralized": 0.0},
    "+ both": {},
}
PLAIN = "+ batch-norm statistics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:resnet20")
    parser.add_argument("--target", default="ort-x86-vnni")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4000, help="of the generator, and of the student")
    parser.add_argument("--pool", type=int, default=1024, help="synthetic images")
    parser.add_argument("--score", help="labelled images to score on; without it the shipped 1,000")
    parser.add_argument("--scored", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/out/fdda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    found = [one(args, name, seed) for seed in range(args.seeds) for name in args.rows]
    print(table(found))


def one(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """A row: read if it is there, else made and written."""
    file = args.out / f"{seed} {name}.json"
    if file.exists():
        return read_json(file)
    began = time.monotonic()
    loaded = load_model(args.model)
    graph, preprocess = capture(loaded), preprocess_of(loaded, {})
    classes = len(loaded.classes)
    real = open_images(demo.CALIBRATION, preprocess, classes=classes, limit=args.per_class * classes, seed=seed)
    x = torch.cat(list(real.batches(64)))
    stats, target, bits = observe(graph, x.split(8)), load_target(args.target), parse_bits(args.bits)
    if name == "not tuned":
        plan = choose(graph, stats, target, replace(RECIPES["fdda"], tune=None), name="mse", bits=bits)
    else:
        tune = replace(FDDA.in_steps(args.steps), loss="labels")
        recipe = replace(RECIPES["fdda"], tune=tune)
        made = None if name == "real only" else lot(args, name, loaded, real, classes, seed)
        given = Lot(x, real.labels)
        plan = finetune(graph, stats, target, recipe, given, made, name=name, bits=bits, seed=seed)
    row = {
        "row": name, "seed": seed, "bits": args.bits, "steps": args.steps, "real": len(real), "pool": args.pool,
        **scored(args, graph, plan, target, preprocess, classes), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    write_json(file, row)
    print(row, flush=True)
    return row


def lot(args: argparse.Namespace, name: str, loaded: Any, real: Images, classes: int, seed: int) -> Lot:
    """The synthetic images of a row."""
    settings = ROWS[name]
    assert settings is not None
    method = replace(in_steps(FDDA.images, args.steps), **settings)
    asked = Synthesis(method, args.pool, classes, real.preprocess, seed, None if name == PLAIN else real)
    images = asked(Teacher(loaded.program), args.out / f"{seed} {name}.safetensors")
    return Lot(torch.cat(list(images.batches(64))), images.labels)


def scored(args: argparse.Namespace, graph: Any, plan: Plan, target: Any, preprocess: Any, classes: int) -> dict[str, Any]:
    held_out = open_images(args.score or demo.TEST, preprocess, classes=classes, limit=args.scored)
    with tempfile.TemporaryDirectory() as folder:
        model, twin = Path(folder) / "model.onnx", Path(folder) / "float.onnx"
        realize(graph, plan, model, **target.form)
        float_onnx(graph, twin, opset=target.opset)
        score = evaluate(twin, model, held_out, threads=args.threads)
    return {"float": score.float_top1, "top1": score.top1, "agreement": score.agreement, "scored": score.images}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = ["| row | top-1, % | agreement, % | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["row"] for row in found):
        rows = [row for row in found if row["row"] == name]
        cells = []
        for key in ("top1", "agreement"):
            values = [row[key] for row in rows]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
