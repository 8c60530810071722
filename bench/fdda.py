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

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Bench, options, rows_of

from fewbit.choose import Context, LabelledImages, Recipe
from fewbit.choose.finetune import SHORTER, Finetune
from fewbit.core.plan import Plan
from fewbit.core.shelf import Shelf
from fewbit.data.images import open_images
from fewbit.data.synthesize.source import Synthesis, in_steps
from fewbit.data.synthesize.teacher import Teacher
from fewbit.demo import model as demo
from fewbit.load import load_model
from fewbit.recipes import MSE
from fewbit.stages.preprocessing import preprocess_of

ROWS: dict[str, dict[str, float] | None] = {  # fields of the generator; None: no synthetic images
    "not tuned": None,
    "real only": None,
    "+ batch-norm statistics": {},
    "+ centralized": {"distorted": 0.0},
    "+ distorted": {"centralized": 0.0},
    "+ both": {},
}
PLAIN = "+ batch-norm statistics"


@dataclass(frozen=True)
class FinetuneWith:
    """Finetune beside images that `synthetic` makes when they are needed (None: on the real images alone)."""

    finetune: Finetune
    synthetic: Callable[[], LabelledImages] | None = field(default=None, repr=False)
    loss: str = "labels"

    def __call__(self, plan: Plan, context: Context) -> Plan:
        made = None if self.synthetic is None else self.synthetic()
        return replace(self.finetune, loss=self.loss)(plan, replace(context, synthetic=made))


def main() -> None:
    parser = options(__doc__, out=Path("bench/out/fdda"), model="demo:resnet20")
    parser.add_argument("--bits", nargs="*", default=["4"])
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4000, help="of the student")
    parser.add_argument("--made-steps", type=int, help="of the generator; without it as many as the student's")
    parser.add_argument("--pool", type=int, default=1024, help="synthetic images")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--silhouette", type=int, metavar="N", help="of N shipped calibration images, in every batch norm")
    args = parser.parse_args()
    args.made_steps = args.made_steps or args.steps
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    if args.silhouette:
        print(silhouettes(loaded, args.silhouette))
    args.images, args.score = args.images or str(demo.CALIBRATION), args.score or str(demo.TEST)
    args.calibration = args.per_class * len(loaded.classes)
    bench = Bench(args, {}, everything=False, recipe="fdda", loss="labels")
    for seed in args.seeds:
        bench.recipes = {name: recipe_of(bench, name, seed) for name in args.rows}
        for name in args.rows:
            for bits in args.bits:
                bench.run(name, name, bits, seed)
    for bits in args.bits:
        rows = rows_of(args.out, bits=bits, calibration=args.calibration)
        print(f"\n{bits}\n\n{table([row for row in rows if row['name'] in args.rows and row['seed'] in args.seeds])}")


def recipe_of(bench: Bench, name: str, seed: int) -> Recipe:
    """The recipe of a row; its synthetic images are made when it runs, and are there for all widths then."""
    if name == "not tuned":
        return Recipe(name, (MSE,))
    synthetic = None if name == "real only" else partial(pool, bench, name, seed)
    return Recipe(name, (MSE, FinetuneWith(SHORTER.in_steps(bench.args.steps), synthetic)))


def pool(bench: Bench, name: str, seed: int) -> LabelledImages:
    """The synthetic images of a row."""
    run, args = bench.start(seed), bench.args
    inputs, real = run["inputs"], None if name == PLAIN else run["calibration"]
    method = replace(in_steps(SHORTER.images, args.made_steps), **(ROWS[name] or {}))
    source = Synthesis(method, args.pool, len(inputs.classes), inputs.preprocess, seed, real)
    images = source(Teacher(inputs.loaded.program), args.out / f"{seed} {name}.safetensors")
    return LabelledImages(Shelf.of(images.batches(64)), images.labels)


def silhouettes(loaded: Any, count: int) -> str:
    """Markdown: for each batch norm how far images of one class are together, by the statistics of each image, and how far the
    classes' centres spread, which the noise of L_D is added to.
    """
    images = open_images(demo.CALIBRATION, preprocess_of(loaded, {}), classes=len(loaded.classes), limit=count)
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


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = ["| row | top-1, % | agreement, % | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["name"] for row in found):
        rows = [row for row in found if row["name"] == name]
        cells = []
        for key in ("top1", "agreement"):
            values = [row[key] for row in rows]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
