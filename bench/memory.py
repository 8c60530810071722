"""Peak memory of `fewbit quantize` against calibration images and against the bytes of the model.

    python bench/memory.py make memory
    python bench/memory.py show memory

`make` writes nets of random weights (vision transformers at 64 px) and 2,064 random images into the folder, quantizes in a
process of its own for each row, and keeps its peak (VmHWM: files that are mapped into memory count while they are); rows that
are there already are not made again. About 20 minutes on one core. `show` prints the tables. `best` learns for 40
steps, which hold the same values in memory as more of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fewbit import quantize
from fewbit.choose.distill import Distill
from fewbit.files import read_json, write_json
from fewbit.recipes import recipe_named

COUNTS = (32, 128, 512, 2000)
RECIPES = ("mse", "fast", "best")
WIDTHS = {"tiny": (96, 2), "small": (384, 4), "middle": (768, 4), "large": (1024, 5)}  # width and blocks
NETS = """
import torch
from timm.models.vision_transformer import VisionTransformer

INPUT_SIZE, MEAN, STD = (3, 64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def net(width, blocks):
    torch.manual_seed(0)
    return VisionTransformer(64, 8, num_classes=10, embed_dim=width, depth=blocks, num_heads=width // 32)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "show", "row"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("row", nargs="*", help="of `row`, which `make` starts: net, recipe, images")
    args = parser.parse_args()
    if args.what == "row":
        net, recipe, count = args.row
        write_json(args.folder / f"{net} {recipe} {count}.json", row(args.folder, net, recipe, int(count)))
        return
    rows = [("tiny", recipe, count) for recipe in RECIPES for count in COUNTS]
    rows += [(net, recipe, 32) for recipe in RECIPES[:2] for net in WIDTHS if net != "tiny"]
    if args.what == "make":
        write_inputs(args.folder)
        for net, recipe, count in rows:
            if not (args.folder / f"{net} {recipe} {count}.json").exists():
                subprocess.run([sys.executable, __file__, "row", args.folder, net, recipe, str(count)], check=True)
                print(net, recipe, count, read_json(args.folder / f"{net} {recipe} {count}.json"), flush=True)
    show({key: read_json(args.folder / f"{' '.join(map(str, key))}.json") for key in rows})


def write_inputs(folder: Path) -> None:
    """The nets and the images, where they are not there yet."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    nets = [f"\n\ndef {name}():\n    return net({width}, {blocks})\n" for name, (width, blocks) in WIDTHS.items()]
    (folder / "nets.py").write_text(NETS + "".join(nets))
    random = np.random.default_rng(0)
    for i in range(COUNTS[-1] + 64):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        place = folder / ("images" if i < COUNTS[-1] else "scored") / f"{i:04}.jpg"
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(place)


def row(folder: Path, net: str, recipe: str, count: int) -> dict[str, float]:
    """Megabytes at the peak of this process, of the weights, and of the process before it has a model."""
    before = megabytes("VmHWM")
    method = recipe_named(recipe)
    short = tuple(one.in_steps(40) if isinstance(one, Distill) else one for one in method.passes)
    result = quantize(
        f"{folder / 'nets.py'}:{net}", folder / "images", score=folder / "scored", labels=False, calibration=count,
        recipe=replace(method, passes=short), threads=1, seconds=0.01,
    )  # fmt: skip
    weights = sum(path.stat().st_size for path in result.folder.glob("float.onnx*")) / 2**20  # large ones beside the file
    return {"peak": megabytes("VmHWM"), "model": weights, "imports": before}


def megabytes(name: str) -> float:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**10


def show(found: dict[tuple[str, str, int], dict[str, float]]) -> None:
    """The two tables."""
    print("| recipe |", " | ".join(f"{count:,} images" for count in COUNTS), "| most against least |")
    print("|---" * (len(COUNTS) + 2) + "|")
    for recipe in RECIPES:
        peaks = [found["tiny", recipe, count]["peak"] for count in COUNTS]
        cells = " | ".join(f"{peak:,.0f} MB" for peak in peaks)
        print(f"| `{recipe}` | {cells} | +{100 * (max(peaks) / min(peaks) - 1):.1f} % |")
    print("\n| model |", " | ".join(f"`{recipe}`" for recipe in RECIPES[:2]), "| bytes for each further byte of model |")
    print("|---|---|---|---|")
    for net in WIDTHS:
        both = [(found[net, recipe, 32], found["tiny", recipe, 32]) for recipe in RECIPES[:2]]
        cells = " | ".join(f"{one['peak']:,.0f} MB" for one, _ in both)
        slopes = [(one["peak"] - least["peak"]) / max(one["model"] - least["model"], 1e-9) for one, least in both]
        more = "" if net == "tiny" else ", ".join(f"{slope:.1f}" for slope in slopes)
        print(f"| {both[0][0]['model']:,.0f} MB | {cells} | {more} |")


if __name__ == "__main__":
    main()
