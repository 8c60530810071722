"""What one run costs from the command to the file, beside stock flows on the same model and images, each a process of its own.

    python bench/cost.py ../shared/models/vit_s14_tiny200.py:model --images ../shared/data/tiny200/train \\
        --score ../shared/data/tiny200/val --out cost

Wall seconds to the written file, to the verified file and to the end, processor seconds (user and system) and peak memory (of
the largest process) of `fewbit quantize` by default, with --quick and with --recipe mse, and of onnxruntime's static
quantizer, NNCF (pip install nncf) and torchao's x86 flow through Inductor (pip install torchao), which end with the file, or
with one answer of the compiled model, and verify and score nothing. Run it when nothing else runs: the ViT-S takes about four
minutes on two cores. `--rows` names some of the rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FEWBIT = {
    "fewbit": [],
    "fewbit --quick": ["--quick"],
    "fewbit --recipe mse --quick": ["--recipe", "mse", "--quick"],
}
PEERS = {"onnxruntime static": "onnxruntime", "NNCF": "nncf", "torchao, Inductor": "torchao"}  # row -> what it needs
EIGHT = 8  # images at a time


@dataclass(frozen=True)
class Cost:
    """Seconds since the process began: None where there is no such moment. `memory` in bytes."""

    row: str
    written: float | None
    verified: float | None
    whole: float
    processor: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file.py:function, which a peer can load as well")
    parser.add_argument("--images", required=True)
    parser.add_argument("--score", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--scored", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring each runtime and batch, as in fewbit quantize")
    parser.add_argument("--rows", nargs="+", choices=(*FEWBIT, *PEERS), default=(*FEWBIT, *PEERS))
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.peer:
        peer(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for row in args.rows:
        if (needed := PEERS.get(row)) and importlib.util.find_spec(needed) is None:
            print(f"{row} is left out: pip install {needed}", flush=True)
            continue
        found.append(measured(row, command(row, args), args.threads))
        print(json.dumps(asdict(found[-1])), flush=True)
    (args.out / "cost.json").write_text(json.dumps([asdict(one) for one in found], indent=1))
    print(table(found))


def command(row: str, args: argparse.Namespace) -> list[str]:
    """What is typed for a row."""
    images = ["--images", args.images, "--score", args.score, "--calibration", str(args.calibration)]
    if row in PEERS:
        return [sys.executable, __file__, args.model, *images, "--out", str(args.out), "--peer", row]
    out = str(args.out / row.replace(" ", "-"))
    limits = ["--scored", str(args.scored), "--threads", str(args.threads), "--seconds", str(args.seconds)]
    return [sys.executable, "-m", "fewbit", "quantize", args.model, *images, *limits, *FEWBIT[row], "--out", out, "--force"]


def measured(row: str, typed: list[str], threads: int) -> Cost:
    """Run a command to its end. Raises SystemExit with what it said where it fails."""
    began, moments, said = time.perf_counter(), dict[str, float](), list[str]()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(typed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:  # a stage, when it is over: `verify: 3.0 s`
        moments.setdefault(line.split(":")[0], time.perf_counter() - began)
        said.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{row} ended with {process.returncode}: {''.join(said[-20:])}")
    kilobytes = usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return Cost(row, moments.get("realize"), moments.get("verify"), whole, usage.ru_utime + usage.ru_stime, 1024 * kilobytes)


def peer(args: argparse.Namespace) -> None:
    """One stock flow, from the model to its file: what its documentation says, with the same images."""
    import torch

    torch.set_num_threads(args.threads)
    path, function = args.model.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("peer_model", path)
    assert spec is not None
    assert spec.loader is not None
    python: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(python)
    model = getattr(python, function)().eval()
    batches = list(calibration(python, args))
    if args.peer == "torchao, Inductor":
        inductor(model, batches)
        return
    source = args.out / "peer.onnx"
    sizes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (batches[0],), source, dynamo=True, dynamic_shapes=sizes, external_data=False)
    if args.peer == "NNCF":
        with_nncf(source, batches, args.out / "nncf.xml")
    else:
        from peers import stock

        stock(source, batches, args.out / "onnxruntime.onnx", method="minmax")


def calibration(python: Any, args: argparse.Namespace) -> Iterator[Any]:
    """The images that fewbit calibrates on, eight at a time."""
    from fewbit.data.images import Preprocess, open_images

    record = {"input_size": python.INPUT_SIZE, "mean": python.MEAN, "std": python.STD}
    images = open_images(args.images, Preprocess.from_timm(record), labels=False, limit=args.calibration)
    yield from images.batches(EIGHT)


def with_nncf(source: Path, batches: list[Any], out: Path) -> None:
    """nncf.quantize with its defaults, for a transformer."""
    import nncf
    import openvino as ov

    images = [batch[i : i + 1].numpy() for batch in batches for i in range(len(batch))]
    dataset = nncf.Dataset(images)
    model = nncf.quantize(
        ov.Core().read_model(str(source)), dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
    )
    ov.save_model(model, str(out), compress_to_fp16=False)


def inductor(model: Any, batches: list[Any]) -> None:
    """torchao's post-training quantization for x86, compiled for a batch of eight, and one answer."""
    import torch
    from peers import with_torchao

    quantized = with_torchao(torch.export.export(model, (batches[0],)), batches)
    with torch.no_grad():
        torch.compile(quantized)(batches[0])


def table(found: list[Cost]) -> str:
    """The rows as Markdown."""
    lines = ["| | file written | file verified | whole | processor | peak memory |", "|---|---|---|---|---|---|"]
    for one in found:
        cells = [f"{seconds:.1f} s" if seconds is not None else "" for seconds in (one.written, one.verified, one.whole)]
        lines.append(f"| {one.row} | {' | '.join(cells)} | {one.processor:.1f} s | {one.memory / 1e9:.2f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
