"""What synthetic images bring to fine-tuning with few real ones (FDDA): the rows of the paper's ablation on ResNet-20.

    python bench/fdda.py --out bench/out/fdda                       # demo:resnet20, W4A4, first and last layer included
    python bench/fdda.py --bits 4 4,first=8,last=8 --steps 800 --made-steps 1000
    python bench/fdda.py --rows --silhouette 256                    # do classes stand apart in batch norms, layer by layer?

Rows: the plan without tuning, tuned on the real images alone, and on these with synthetic images from plain batch-norm
statistics, with L_C, with L_D, and with both. All rows of a seed have the same real images (`--per-class` of each class, drawn
with the seed from the shipped calibration images) and the same number of student steps; all widths share the synthetic images.
Accuracy is measured in onnxruntime on `--score`, or the shipped test images. A row that is there already is not made again.
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
from fewbit.choose import LabelledImages, choose, finetune, parse_bits
from fewbit.core.values import Plan
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
    parser.add_argument("--bits", nargs="*", default=["4"])
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4000, help="of the student")
    parser.add_argument("--made-steps", type=int, help="of the generator; without it as many as the student's")
    parser.add_argument("--pool", type=int, default=1024, help="synthetic images")
    parser.add_argument("--score", help="labelled images to score on; without it the shipped 1,000")
    parser.add_argument("--scored", type=int, default=None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--silhouette", type=int, metavar="N", help="of N shipped calibration images, in every batch norm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/out/fdda"))
    args = parser.parse_args()
    args.made_steps = args.made_steps or args.steps
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.silhouette:
        print(silhouettes(args))
    found = [one(args, name, seed, bits) for seed in args.seeds for name in args.rows for bits in args.bits]
    for bits in args.bits:
        print(f"\n{bits}\n\n{table([row for row in found if row['bits'] == bits])}")


def one(args: argparse.Namespace, name: str, seed: int, width: str) -> dict[str, Any]:
    """A row: read if it is there, else made and written."""
    file = args.out / f"{seed} {name} {width}.json"
    if file.exists():
        return read_json(file)
    began = time.monotonic()
    loaded = load_model(args.model)
    graph, preprocess = capture(loaded), preprocess_of(loaded, {})
    classes = len(loaded.classes)
    real = open_images(demo.CALIBRATION, preprocess, classes=classes, limit=args.per_class * classes, seed=seed)
    x = torch.cat(list(real.batches(64)))
    stats, target, bits = observe(graph, x.split(8)), load_target(args.target), parse_bits(width)
    if name == "not tuned":
        plan = choose(graph, stats, target, replace(RECIPES["fdda"], tune=None), name="mse", bits=bits)
    else:
        tune = replace(FDDA.in_steps(args.steps), loss="labels")
        recipe = replace(RECIPES["fdda"], tune=tune)
        made = None if name == "real only" else lot(args, name, loaded, real, classes, seed)
        given = LabelledImages(x, real.labels)
        plan = finetune(graph, stats, target, recipe, given, made, name=name, bits=bits, seed=seed)
    row = {
        "row": name, "seed": seed, "bits": width, "steps": args.steps, "made_steps": args.made_steps,
        "real": len(real), "pool": args.pool,
        **scored(args, graph, plan, target, preprocess, classes), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    write_json(file, row)
    print(row, flush=True)
    return row


def lot(args: argparse.Namespace, name: str, loaded: Any, real: Images, classes: int, seed: int) -> LabelledImages:
    """The synthetic images of a row."""
    settings = ROWS[name]
    assert settings is not None
    method = replace(in_steps(FDDA.images, args.made_steps), **settings)
    asked = Synthesis(method, args.pool, classes, real.preprocess, seed, None if name == PLAIN else real)
    images = asked(Teacher(loaded.program), args.out / f"{seed} {name}.safetensors")
    return LabelledImages(torch.cat(list(images.batches(64))), images.labels)


def scored(args: argparse.Namespace, graph: Any, plan: Plan, target: Any, preprocess: Any, classes: int) -> dict[str, Any]:
    held_out = open_images(args.score or demo.TEST, preprocess, classes=classes, limit=args.scored)
    with tempfile.TemporaryDirectory() as folder:
        model, twin = Path(folder) / "model.onnx", Path(folder) / "float.onnx"
        realize(graph, plan, model, **target.form)
        float_onnx(graph, twin, opset=target.opset)
        score = evaluate(twin, model, held_out, threads=args.threads)
    return {"float": score.float_top1, "top1": score.top1, "agreement": score.agreement, "scored": score.images}


def silhouettes(args: argparse.Namespace) -> str:
    """Markdown: for each batch norm how far images of one class are together, by the statistics of each image, and how far the
    classes' centres spread, which the noise of L_D is added to.
    """
    loaded = load_model(args.model)
    classes = len(loaded.classes)
    images = open_images(demo.CALIBRATION, preprocess_of(loaded, {}), classes=classes, limit=args.silhouette)
    teacher, labels = Teacher(loaded.program), images.labels
    assert labels is not None
    with torch.no_grad():
        seen = [teacher(image).moments for image in images.batches(1)]
    lines = ["| batch norm | silhouette | centres: deviation of means | of variances |", "|---|---|---|---|"]
    for layer in range(len(teacher.running)):
        means, variances = (torch.stack([getattr(m, kind)[layer] for m in seen]) for kind in ("means", "variances"))
        spreads = [
            torch.stack([x[labels == c].mean(0) for c in labels.unique()]).std(0).square().mean().sqrt()
            for x in (means, variances)
        ]
        score = silhouette(torch.cat([means, variances], 1), labels)
        lines.append(f"| {layer} | {score:.3f} | {spreads[0]:.3f} | {spreads[1]:.3f} |")
    return "\n".join(lines)


def silhouette(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Rousseeuw 1987: the mean of (b - a) / max(a, b) over points (n, d): a is the mean distance to the others of its class, b
    to the nearest other class. Every dimension counts in units of its standard deviation.
    """
    x = (points - points.mean(0)) / points.std(0).clamp_min(1e-9)
    far, member = torch.cdist(x, x), torch.nn.functional.one_hot(labels).float()
    count = member.sum(0)
    to_class = far @ member  # (n, classes), of its own with itself at 0
    own = to_class.gather(1, labels[:, None])[:, 0] / (count[labels] - 1)
    others = (to_class / count).masked_fill(member.bool(), torch.inf).amin(1)
    return float(((others - own) / torch.maximum(own, others)).mean())


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
