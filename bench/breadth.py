"""Families of vision models × targets: each quantized, written and verified, a process each.

    python bench/breadth.py --targets ort-x86-vnni --out build/breadth        # every row that is not there yet, then the table
    python bench/breadth.py --rows "timm.*vit*" --out build/breadth
    python bench/breadth.py --recipe fast --bits w4a8 --targets ort-x86-vnni --out build/breadth-fast

A row is what `fewbit quantize` does up to evaluate, with recipe `mse` or another one, on 16 images that are drawn here;
bench/apart.py says how it may end.

The weights are seeded: each library's own initial ones, with parameters that it leaves constant (gains of 1, layer scales of
1e-6, biases of 0) moved, small weights scaled to keep the variance, and batch norms given the statistics of the images. Rows
lie in a folder, a JSON file each; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit import Run
from fewbit.files import read_json
from fewbit.request import Request
from fewbit.stages import STAGES

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.apart import Found, ends, made, told, verified
from bench.families import Row, rows

IMAGES = 16
GRAY = 0.5  # mean and standard deviation of the pixels
LEAST_GAIN = 0.3  # standard deviation of a weight by that which keeps the variance


def pictures(size: int, count: int = IMAGES, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Drawn images, uint8 (count, size, size, channels): waves of colour, a few rectangles with edges, a little noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    images = np.zeros((count, size, size, channels))
    for image in images:
        for channel in range(channels):
            for _ in range(3):
                u, v, phase = draw.normal(0, 4, 2), draw.normal(0, 4), draw.uniform(0, 6.3)
                image[..., channel] += 30 * np.cos(u[0] * x + u[1] * y + v + phase)
        for _ in range(4):
            top, left = draw.integers(0, size, 2)
            high, wide = draw.integers(size // 8, size // 2 + 1, 2)
            image[top : top + high, left : left + wide] += draw.normal(0, 60, channels)
    return np.clip(128 + images + draw.normal(0, 8, images.shape), 0, 255).astype(np.uint8)


@torch.no_grad()
def settle(net: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Weights as if trained: constant parameters moved, small ones (0.02 in transformers) as large as keeps the variance of
    what goes through them, statistics of batch norms those of images (b, c, h, w).
    """
    draw = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.numel() and bool(parameter.min() == parameter.max()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
        elif parameter.ndim > 1 and (gain := float(parameter.std()) * (parameter.numel() / len(parameter)) ** 0.5) < LEAST_GAIN:
            parameter /= gain
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        if norm.weight is not None and float(norm.weight.abs().mean()) < LEAST_GAIN / 6:  # a first 0.02 here, too
            norm.weight += 1
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls
        norm.train()
    if norms:
        net(x)
    net.eval()


def quantized(row: Row, target: str, threads: int, **options: Any) -> Callable[[Found], Found]:
    """Make a row, in the process that it is called in."""

    def work(found: Found) -> Found:
        images = pictures(row.size, channels=row.channels)
        net = row.net()
        x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        if "detection" not in row.name or "backbone" in row.name:
            settle(net, x)
        with (
            TemporaryDirectory() as out,
            Run.start(asked(net, images, row.size, target, threads, out, **options), STAGES) as run,
        ):
            return verified(run, found)

    return work


def warm() -> None:
    """Import what a row imports by making one up to the file; the runtimes are left to each row, as they have threads."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a fork copies no threads
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)).eval()
    with TemporaryDirectory() as out, Run.start(asked(net, pictures(16), 16, "ort-x86-vnni", 1, out), STAGES) as run:
        run["model"]


def asked(
    net: nn.Module, images: np.ndarray, size: int, target: str, threads: int, out: str, recipe: str = "mse",
    bits: str | None = None,
) -> Request:  # fmt: skip
    """What `fewbit quantize` would be told."""
    return Request(
        model=net, images=images, labels=False, target=target, recipe=recipe, bits=bits, threads=threads, mean=GRAY, std=GRAY,
        input_size=(images.shape[3], size, size), interpolation="bilinear", resize="squash", crop_pct=1.0,
        out=Path(out) / "run",
    )  # fmt: skip


def file_of(row: Row, target: str, out: Path) -> Path:
    """Where a row lies."""
    return out / target / f"{row.key}.json"


def table(wanted: list[Row], targets: list[str], out: Path) -> None:
    """The rows that are there as Markdown, and how they ended."""
    for target in targets:
        found = [read_json(file) for row in wanted if (file := file_of(row, target, out)).exists()]
        print(f"\n### {target}\n\n{len(found)} of {len(wanted)} rows: {ends(found)}.\n")
        print("| model | pixels | end | stage | codes compared | wrong | in integers | kernels | correlation |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in found:
            print(line(row))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    about = f"| {row['library']} {row['name']} | {row['size']} | {row['end']} | {row['stage']} |"
    if "codes_compared" not in row:
        return f"{about} {told(row)[:160]} |||||"
    correlation = "" if row["correlation"] is None else f"{row['correlation']:.4f}"
    kernels = " of ".join(str(n) for n in row["kernels"])
    return (
        f"{about} {row['codes_compared']:,} | {row['codes_wrong']} | {100 * row['share']:.1f} % | {kernels} | {correlation} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["ort-x86-vnni", "openvino-x86"])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of library.name")
    parser.add_argument("--recipe", default="mse")
    parser.add_argument("--bits", help="what the target has where nothing is said")
    parser.add_argument("--out", type=Path, default=Path("build/breadth"), help="a folder of its own for each recipe and bits")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of work for a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="make no rows, print those that are there")
    args = parser.parse_args()
    wanted = [row for row in rows() if any(fnmatch(row.key, pattern) for pattern in args.rows)]
    if not args.table:
        warm()
    for target in args.targets if not args.table else ():
        (args.out / target).mkdir(parents=True, exist_ok=True)
        for row in wanted:
            file = file_of(row, target, args.out)
            if not file.exists():
                about = {"library": row.library, "name": row.label, "size": row.size, "target": target}
                work = quantized(row, target, args.threads, recipe=args.recipe, bits=args.bits)
                made(work, about, file, args.limit, args.threads)
                found = read_json(file)
                said = told(found) if found["end"] != "right" else f"{found['correlation']}"
                print(
                    f"{target} {row.key:50} {found['end']:8} {found['seconds']:6} s  {said[:300]}", file=sys.stderr, flush=True
                )
    table(wanted, args.targets, args.out)


if __name__ == "__main__":
    main()
