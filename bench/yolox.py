"""YOLOX-nano on COCO: average precision and time of fewbit's files beside onnxruntime's static quantizer.

    python bench/yolox.py --out build/yolox                     # every row that is not there yet, then the table
    python bench/yolox.py --targets openvino-x86 --table

What `fewbit quantize yolox_nano.onnx --task detect:yolox --annotations val.json` does up to evaluate, for each recipe and
target; stock files are made of the same float.onnx with the same calibration images. AP is that of the file in the target's
runtime; the interval is that of the difference to float, by a paired bootstrap over images. Times are taken in alternation,
and the fastest round of each file counts: what else the machine does only adds time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit import Run
from fewbit.files import read_json, write_json
from fewbit.onnx_file import load_proto
from fewbit.request import Request
from fewbit.runtimes import open_session
from fewbit.stages import STAGES
from fewbit.target import load_target
from fewbit.task import Rating
from fewbit.task.task import task_of
from fewbit.verify import evaluate
from fewbit.verify.bench import paired

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.apart import verified
from bench.peers import stock

ROWS: Mapping[str, Mapping[str, Any]] = {
    "mse W8A8": {"recipe": "mse"},
    "fast W8A8": {"recipe": "fast"},
    "fast W4A8": {"recipe": "fast", "bits": "w4a8"},
}
STOCK = {"onnxruntime static, min-max": "minmax", "onnxruntime static, percentile 99.999": "percentile"}
PIXELS = {
    "mean": 0.0, "std": 1 / 255, "channel_order": "bgr", "resize": "corner", "crop_pct": 1.0, "interpolation": "bilinear",
}  # fmt: skip


def request(target: str, options: Mapping[str, Any], given: argparse.Namespace) -> Request:
    """What `fewbit quantize` is told."""
    return Request(
        model=given.model, images=given.data / "train" / "images", score=given.data / "val" / "images", task="detect:yolox",
        annotations=given.data / "val" / "instances.json", calibration=given.calibration, target=target, threads=1,
        out=given.out / target / "run", force=True, **PIXELS, **options,
    )  # fmt: skip


def made(target: str, given: argparse.Namespace) -> Iterator[Path]:
    """The rows of a target and their files, those that are not there yet; gives the name of each as it is made."""
    folder = given.out / target
    for name, options in ROWS.items():
        if (folder / f"{name}.json").exists():
            continue
        with Run.start(request(target, options, given), STAGES) as run:
            found = verified(run, {})
            shutil.copy(run["model"], folder / f"{name}.onnx")
            shutil.copy(run["twin"], folder / "float.onnx")
            write_json(folder / f"{name}.json", row(run["score"].rating) | {"codes_wrong": found["codes_wrong"]})
            yield folder / name
            for other, method in STOCK.items():
                if (folder / f"{other}.json").exists():
                    continue
                stock(run["twin"], run["calibration"].batches(1), folder / f"{other}.onnx", method=method)
                score = evaluate(
                    run["twin"], folder / f"{other}.onnx", run["scored"], run["exact"].outputs, task_of(run["exact"]),
                    runtime=load_target(target).runs_in, threads=1, batch=run["exact"].at_a_time(16),
                )  # fmt: skip
                write_json(folder / f"{other}.json", row(score.rating))
                yield folder / other


def row(rating: Rating) -> dict[str, Any]:
    """AP of both files, AP50 of both, and the interval of the difference of AP."""
    half = next(one for one in rating.rows if one["what"] == "AP50")
    return {"float": [rating.float_score, half["float"]], "ap": [rating.score, half["quantized"]], "interval": rating.interval}


def times(folder: Path, names: list[str], runtime: str, seconds: float) -> dict[str, float]:
    """How many times as long as each file onnxruntime's min-max file takes, by the fastest rounds."""
    sessions = [open_session(runtime, folder / f"{name}.onnx", threads=1) for name in names]
    shape = [dim.dim_value or 1 for dim in load_proto(folder / f"{names[0]}.onnx").graph.input[0].type.tensor_type.shape.dim]
    noise = 255 * torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()
    rounds = paired([partial(session.call, session.feed(noise)) for session in sessions], seconds)
    fastest = {name: min(column) for name, column in zip(names, zip(*rounds, strict=True), strict=True)}
    return {name: fastest[next(iter(STOCK))] / least for name, least in fastest.items()}


def table(targets: list[str], given: argparse.Namespace) -> Iterator[str]:
    """The rows that are there as Markdown."""
    yield "| file | target | AP | AP50 | AP less float's | codes wrong | × stock |"
    yield "|---|---|---|---|---|---|---|"
    for target in targets:
        folder = given.out / target
        names = [name for name in (*STOCK, *ROWS) if (folder / f"{name}.json").exists()]
        if not names:
            continue
        rows = {name: read_json(folder / f"{name}.json") for name in names}
        ratio = times(folder, ["float", *names], load_target(target).runs_in, given.seconds) if set(STOCK) <= set(names) else {}
        ap, half = rows[names[0]]["float"]
        yield f"| float | {target} | {ap:.1f} | {half:.1f} | | | {ratio.get('float', float('nan')):.2f} |"
        for name, found in rows.items():
            (ap, half), (low, high) = found["ap"], found["interval"]
            less = f"{ap - found['float'][0]:+.1f} ({low:+.1f} to {high:+.1f})"
            yield (
                f"| {name} | {target} | {ap:.1f} | {half:.1f} | {less} | {found.get('codes_wrong', '')} | "
                f"{ratio.get(name, float('nan')):.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/yolox_nano.onnx")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/coco128"), help="train/images, val/images, val/instances.json"
    )
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--targets", nargs="+", default=["ort-x86-vnni", "openvino-x86"])
    parser.add_argument("--out", type=Path, default=Path("build/yolox"))
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing all files of a target")
    parser.add_argument("--table", action="store_true", help="make no rows, print those that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for target in args.targets if not args.table else ():
        (args.out / target).mkdir(parents=True, exist_ok=True)
        for file in made(target, args):
            print(f"{target} {file.name}", file=sys.stderr, flush=True)
    print("\n".join(table(args.targets, args)))


if __name__ == "__main__":
    main()
