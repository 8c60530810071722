"""Speed of today's files beside stock flows: onnxruntime's static quantizer, NNCF and torchao's x86 flow through Inductor.

    python bench/speed.py make --out speed      # files of every model, by default recipes; what is there is kept
    python bench/speed.py time --out speed      # when nothing else runs: about two minutes a model on two cores

A round times one answer of each file, and the order rotates, so a slow moment hits all of them; cells are medians over rounds:
milliseconds of the float file, times faster than it in the same runtime. Every stock file is made of the run's own float file
and calibration images; those for Inductor of the exported program, with its weights frozen. NNCF and torchao are left out
where they are not installed (pip install nncf torchao).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from fewbit import Run
from fewbit.files import read_json, write_json
from fewbit.progress import Lines
from fewbit.request import Request
from fewbit.runtimes import open_session
from fewbit.stages import STAGES
from fewbit.verify.bench import paired

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.peers import has_attention, pixels, stock, with_nncf, with_torchao
from bench.yolox import PIXELS

SHARED = Path(__file__).parents[1].parent / "shared"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "demo": {"model": "demo"},
    "ResNet-20": {"model": "demo:resnet20"},
    "ViT-S": {"model": f"{SHARED}/models/vit_s14_tiny200.py:model", "images": f"{SHARED}/data/tiny200/train"},
    "EfficientNet-Lite0": {
        "model": f"{SHARED}/models/efficientnet_lite0.py:model", "images": f"{SHARED}/data/ilsvrc_one_per_class",
    },
    "YOLOX-nano": {
        "model": f"{SHARED}/models/yolox_nano.onnx", "images": f"{SHARED}/data/coco128/train", "calibration": 64,
        "task": "detect:yolox", **PIXELS,
    },
}  # fmt: skip
TARGETS = {"onnxruntime": "ort-x86-vnni", "openvino": "openvino-x86"}
FLOAT, IMAGES, STOCK, NNCF, TIMES = "onnxruntime/float.onnx", "images.npy", "onnxruntime.onnx", "nncf.xml", "times.json"
BASE = "float"  # what is timed in each runtime, and what a ratio is over
BATCHES, THREADS = (1, 8), (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "time", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of the rounds of all files at one batch and thread count")
    args = parser.parse_args()
    for name in args.models:
        folder = args.out / name
        if args.action == "make":
            make(folder, MODELS[name])
            continue
        if args.action == "time":
            settings = itertools.product(THREADS, batches(folder / FLOAT))
            write_json(folder / TIMES, [row for one in settings for row in timed(folder, *one, args.seconds)])
        print(f"{name}\n{table(read_json(folder / TIMES))}", flush=True)


def make(folder: Path, options: Mapping[str, Any]) -> None:
    """A run for each runtime, the stock files beside them, and the images that all are calibrated on."""
    folder.mkdir(parents=True, exist_ok=True)
    for runtime, target in TARGETS.items():
        if (folder / runtime).exists():
            continue
        with Run.start(Request(target=target, out=folder / runtime, quick=True, **options), STAGES, Lines()) as run:
            for stage in STAGES:
                run.do(stage.name)
            source, calibration = run.folder / "float.onnx", run["calibration"]
            if runtime == "onnxruntime":
                np.save(folder / IMAGES, np.concatenate(pixels(calibration)))
                stock(source, calibration.batches(max(batches(source))), folder / STOCK, method="minmax")
                if importlib.util.find_spec("nncf"):
                    with_nncf(source, calibration, folder / NNCF, transformer=has_attention(source))
            run.finish()


def shape(source: Path) -> list[int]:
    """(b, c, h, w) of a float file's input; b is 0 where it is free."""
    first = onnx.load(str(source), load_external_data=False).graph.input[0]
    return [dim.dim_value for dim in first.type.tensor_type.shape.dim]


def batches(source: Path) -> tuple[int, ...]:
    """Those that a float file is timed with."""
    written = shape(source)[0]
    return (written,) if written else BATCHES


def timed(folder: Path, threads: int, batch: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each file: its median milliseconds, and the median ratio of the runtime's float file to it."""
    torch.set_num_threads(threads)
    x = np.random.default_rng(0).standard_normal((batch, *shape(folder / FLOAT)[1:])).astype(np.float32)
    calls = {**in_runtimes(folder, x, threads), **in_inductor(folder, torch.from_numpy(x))}
    rounds, keys = paired(list(calls.values()), seconds), list(calls)
    for i, (runtime, name) in enumerate(keys):
        base = keys.index((runtime, BASE))
        milliseconds, ratio = 1e3 * statistics.median(r[i] for r in rounds), statistics.median(r[base] / r[i] for r in rounds)
        row = {"runtime": runtime, "file": name, "batch": batch, "threads": threads, "ms": milliseconds, "ratio": ratio}
        yield {**row, "rounds": len(rounds)}


Calls = dict[tuple[str, str], Callable[[], object]]  # by runtime and file


def in_runtimes(folder: Path, x: np.ndarray[Any, Any], threads: int) -> Calls:
    source, ours = folder / FLOAT, folder / "openvino" / "model.onnx"
    files = {
        ("onnxruntime", BASE): source,
        ("onnxruntime", "static quantizer"): folder / STOCK,
        ("onnxruntime", "fewbit"): folder / "onnxruntime" / "model.onnx",
        ("openvino", BASE): source,
        ("openvino", "NNCF"): folder / NNCF,
        ("openvino", "fewbit"): ours,
        ("openvino-bf16", BASE): source,
        ("openvino-bf16", "fewbit"): ours,
    }
    return {key: partial(open_session(key[0], path, threads=threads).run, x) for key, path in files.items() if path.exists()}


def in_inductor(folder: Path, x: torch.Tensor) -> Calls:
    """The exported program compiled for this batch, and the same after torchao's quantization for x86."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    import torch._inductor.config

    torch._inductor.config.freezing = True
    module = torch.export.load(folder / "onnxruntime" / "exported.pt2").module()
    try:
        program = torch.export.export(module, (x,))
    except Exception as error:  # of torch.export
        print(f"{folder.name}: not in Inductor, as torch.export cannot export it again: {error!s:.200}", file=sys.stderr)
        return {}
    models = {
        BASE: program.module(),
        "torchao": with_torchao(program, torch.from_numpy(np.load(folder / IMAGES)).split(len(x))),
    }
    torch._dynamo.reset()
    return {("Inductor", name): partial(answer, torch.compile(model), x) for name, model in models.items()}


def answer(model: Callable[[torch.Tensor], object], x: torch.Tensor) -> object:
    with torch.no_grad():
        return model(x)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each file, a column for each thread count and batch."""
    settings = sorted({(row["threads"], row["batch"]) for row in rows})
    head = " | ".join(f"{threads} thread{'s'[: threads - 1]}, batch {batch}" for threads, batch in settings)
    lines = [f"| runtime | file | {head} |", "|---|---|" + "---|" * len(settings)]
    for runtime, name in dict.fromkeys((row["runtime"], row["file"]) for row in rows):
        found = {(row["threads"], row["batch"]): row for row in rows if (row["runtime"], row["file"]) == (runtime, name)}
        cells = [f"{found[one]['ms']:.2f} ms" if name == BASE else f"{found[one]['ratio']:.2f}" for one in settings]
        lines.append(f"| {runtime} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
