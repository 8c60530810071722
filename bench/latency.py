"""Time ONNX files against each other in one process, in turn, so that a slow moment hits all of them.

    python bench/latency.py run/float.onnx ours=run/model.onnx stock=peers/onnxruntime_minmax.onnx --runtime onnxruntime

The first file is the base. Prints for each the median milliseconds and the median of the pairwise ratios to the base.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from fewbit.files import write_json
from fewbit.runtimes import open_session
from fewbit.verify.bench import paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="path or name=path")
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime"], help="onnxruntime, openvino (f32), openvino-bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    named = [text.split("=", 1) if "=" in text else (Path(text).stem, text) for text in args.files]
    shape = [d.dim_value for d in onnx.load(named[0][1]).graph.input[0].type.tensor_type.shape.dim][1:]
    rows = []
    for runtime in args.runtime:
        sessions = [open_session(runtime, Path(path), threads=args.threads) for _, path in named]
        for batch in args.batch:
            x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
            times = paired([partial(session.run, x) for session in sessions], args.seconds)
            for i, (name, _) in enumerate(named):
                milliseconds = 1e3 * statistics.median(row[i] for row in times)
                ratio = statistics.median(row[0] / row[i] for row in times)
                rows.append(
                    {
                        "runtime": runtime,
                        "batch": batch,
                        "threads": args.threads,
                        "model": name,
                        "ms": milliseconds,
                        "faster": ratio,
                    }
                )
                print(
                    f"{runtime:14} batch {batch}  {name:28} {milliseconds:8.2f} ms  {ratio:5.2f} x  ({len(times)} rounds)",
                    flush=True,
                )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
