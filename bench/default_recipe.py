"""Which recipe is the default: whole runs of `fewbit quantize` at 8 bits over the models of bench/, in pairs.

    python bench/default_recipe.py make build/default --shared ../shared       # rows that are there are not made again
    python bench/default_recipe.py show build/default

A row is a process of its own: the model with one recipe, all else as it is by default (128 calibration images, seed 0, the
products inside attention in float on onnxruntime). Seconds are those of the stages that a recipe decides (equalize, choose)
and of the whole command without timing the files; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbit.files import read_json, write_json

RECIPES = ("mse", "fast")
CHOOSING, TIMING = ("equalize", "choose"), ("bench",)


def models(shared: Path) -> Mapping[str, Sequence[object]]:
    """What `fewbit quantize` is told of each model."""
    models, data, cifar = shared / "models", shared / "data", shared / "data/cifar10"
    on_cifar = ("--images", cifar / "train.parquet", "--score", cifar / "test.parquet")
    coco = data / "coco128"
    yolox = (
        "--task detect:yolox --mean 0 --std 0.00392156862745098 --channel-order bgr --resize corner --crop-pct 1 "
        "--interpolation bilinear --calibration 64"
    )
    return {
        "ViT-S": (
            f"{models}/vit_s14_tiny200.py:model", "--images", data / "tiny200/train", "--score", data / "tiny200/val",
        ),
        "EfficientNet-Lite0": (
            f"{models}/efficientnet_lite0.py:model", "--images", data / "ilsvrc_one_per_class", "--score", data / "ilsvrc_val",
        ),
        "demo": ("demo", *on_cifar),
        "ResNet-20": ("demo:resnet20", *on_cifar),
        "mobilenet": ("demo:mobilenet", *on_cifar),
        "DETR": ("demo:detr",),
        "YOLOX-nano": (
            models / "yolox_nano.onnx", "--images", coco / "train/images", "--score", coco / "val/images",
            "--annotations", coco / "val/instances.json", *yolox.split(),
        ),
    }  # fmt: skip


def row(folder: Path, name: str, recipe: str, target: str, given: Sequence[object]) -> dict[str, Any]:
    """One run, in a process of its own, so that its peak is its own."""
    out = folder / "run"
    tail = ("--recipe", recipe, "--target", target, "--threads", "1", "--seconds", "1", "--out", out, "--force")
    command = [sys.executable, "-m", "fewbit", "quantize", *given, *tail]
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = read_json(out / "report.json")
    return {
        "model": name, "recipe": recipe, "target": target, "accuracy": report["accuracy"], "images": report["images"],
        "seconds": report["seconds"], "wrong": report["verify"]["codes_wrong"],
        "peak_bytes": report["peak_memory_bytes"],
    }  # fmt: skip


def table(folder: Path) -> Iterator[str]:
    """Rows of the models, a recipe above the other, and what is gained in all."""
    yield "| model | images | recipe | float | quantized | drop (95 %) | agreement | codes wrong | chooses | whole run | peak |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    rows = [read_json(file) for file in sorted(folder.glob("*.json"))]
    for found in sorted(rows, key=lambda one: (one["model"], one["target"], RECIPES.index(one["recipe"]))):
        score, took = found["accuracy"], found["seconds"]
        chooses = sum(took.get(stage, 0.0) for stage in CHOOSING)
        whole = sum(took.values()) - sum(took.get(stage, 0.0) for stage in TIMING)
        yield " | ".join((
            f"| {found['model']}, {found['target']}", f"{found['images']['scored']:,}", f"`{found['recipe']}`",
            *change(score),
            str(found["wrong"]), f"{chooses:.0f} s", f"{whole:.0f} s", f"{found['peak_bytes'] / 1e9:.1f} GB |",
        ))  # fmt: skip


def change(score: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a score: float, quantized, the drop with its interval, agreement."""
    low, high = score["interval"]
    drop = f"{score['float'] - score['quantized']:+.2f} ({-high:+.2f} to {-low:+.2f})"
    return f"{score['float']:.2f}", f"{score['quantized']:.2f}", drop, f"{score['agreement']:.2f} %"


def parser_of(about: str | None, row: str) -> argparse.ArgumentParser:
    """The command line of a table whose rows `make` makes in processes of their own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "show", "row"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("row", nargs="*", help=f"of `row`, which `make` starts: {row}")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    return parser


def main() -> None:
    parser = parser_of(__doc__, "model, recipe, target")
    parser.add_argument("--targets", nargs="+", default=["ort-x86-vnni"])
    parser.add_argument("--models", nargs="+")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    known = models(args.shared)
    if args.what == "row":
        name, recipe, target = args.row
        write_json(file_of(args.folder, *args.row), row(args.folder, name, recipe, target, known[name]))
    if args.what == "show":
        print("\n".join(table(args.folder)))
    for name, target, recipe in itertools.product(args.models or known, args.targets, RECIPES) if args.what == "make" else ():
        if not file_of(args.folder, name, recipe, target).exists():
            given = (args.folder, name, recipe, target, "--shared", args.shared)
            subprocess.run([sys.executable, __file__, "row", *map(str, given)], check=True)


def file_of(folder: Path, name: str, recipe: str, target: str) -> Path:
    return folder / f"{name} {target} {recipe}.json"


if __name__ == "__main__":
    main()
