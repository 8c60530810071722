"""Memory of every stage of `fewbit quantize` on big vision transformers of random weights.

    python bench/big.py row build/big vit_large_patch14_clip_224 --images 64
    python bench/big.py row build/big 512x4 --images 8 --size 112 --quick
    python bench/big.py show build/big

`row` quantizes in this process and writes what each stage held at its peak, as the system counts it every 20 ms:
`anonymous` is memory that only this process can give back (RssAnon), `mapped` the pages of files (RssFile), which the system
drops and reads again where memory is short, `resident` both at once (VmRSS). A model is a name of timm or WIDTHxBLOCKS.
`show` prints the rows that are there.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fewbit import quantize
from fewbit.files import read_json, write_json
from fewbit.progress import Progress

NETS = """
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

INPUT_SIZE, MEAN, STD = (3, {size}, {size}), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def net():
    torch.manual_seed(0)
    name = "{model}"
    if "x" in name and name.replace("x", "").isdecimal():
        width, blocks = map(int, name.split("x"))
        return VisionTransformer({size}, 14, num_classes=1000, embed_dim=width, depth=blocks, num_heads=width // 64)
    return timm.create_model(name, num_classes=1000)
"""
FIELDS = {"anonymous": "RssAnon", "mapped": "RssFile", "resident": "VmRSS"}
EVERY = 0.02  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("row", "show"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?", default="vit_large_patch14_clip_224")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--scored", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--quick", action="store_true", help="without the bench")
    args = parser.parse_args()
    if args.what == "row":
        name = f"{args.model} {args.recipe} {args.images} {args.size}" + (f" {args.memory}" if args.memory else "")
        write_json(args.folder / f"{name}.json", row(args))
    show(args.folder)


def row(args: argparse.Namespace) -> dict[str, object]:
    """Megabytes at the peak of each stage, of the float model's file, and before there is a model; seconds of each stage."""
    folder = args.folder / f"inputs {args.model} {args.size}"
    write_inputs(folder, args.images, args.scored, NETS.format(size=args.size, model=args.model), args.size)
    before, watch = megabytes(), Watch()
    options = {} if args.memory is None else {"memory": args.memory}
    run = args.folder / "run"
    quantize(
        f"{folder / 'nets.py'}:net", folder / "images", score=folder / "scored", labels=False, calibration=args.images,
        recipe=args.recipe, quick=args.quick, threads=1, seconds=0.01, progress=watch, out=run, force=True, **options,
    )  # fmt: skip
    files = {p.name: p.stat().st_size / 2**20 for p in sorted(run.iterdir()) if p.is_file() and p.stat().st_size > 2**20}
    model = sum(size for name, size in files.items() if name.startswith("float.onnx"))
    peak = {name: max(stage[name] for stage in watch.peaks.values()) for name in FIELDS}
    return {"model": model, "before": before, "peak": peak, "stages": watch.peaks, "seconds": watch.seconds, "files": files}


def write_inputs(folder: Path, images: int, scored: int, nets: str, size: int) -> None:
    """The net and the images, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nets.py").write_text(nets)
    random = np.random.default_rng(0)
    for kind, count in (("images", images), ("scored", scored)):
        for place in (folder / kind).glob("*.jpg"):
            place.unlink()
        (folder / kind).mkdir(exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / kind / f"{i:04}.jpg")


class Watch(Progress):
    """Keeps the peaks of each stage, and prints them."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        peak = self.peaks.setdefault(name, dict.fromkeys(FIELDS, 0.0))
        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(peak, over), daemon=True)
        beat.start()
        start = time.perf_counter()
        try:
            with super().stage(name):
                yield
        finally:
            over.set()
            beat.join()
            print(f"{name:12}", *(f"{peak[one]:8.0f}" for one in FIELDS), f"{time.perf_counter() - start:8.1f} s", flush=True)


def _beat(peak: dict[str, float], over: threading.Event) -> None:
    while True:
        for name, value in megabytes().items():
            peak[name] = max(peak[name], value)
        if over.wait(EVERY):
            return


def megabytes() -> dict[str, float]:
    """What this process holds now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) / 2**10 for name, field in FIELDS.items()}


def show(folder: Path) -> None:
    """A table of the rows in the folder."""
    print("| model, recipe, images, size | float model | before | resident | anonymous | bytes for each byte of model |")
    print("|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*.json")):
        found = read_json(path)
        peak, before = found["peak"], found["before"]["resident"]
        more = (peak["resident"] - 1024) / found["model"]
        cells = (found["model"], before, peak["resident"], peak["anonymous"])
        print(f"| {path.stem} |", " | ".join(f"{cell:,.0f} MB" for cell in cells), f"| {more:.2f} |")


if __name__ == "__main__":
    main()
