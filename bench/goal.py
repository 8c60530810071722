"""`--max-drop 0.5` on the models of bench/, beside NNCF's accuracy control on two of them.

    python -m bench.goal make build/goal --shared ../shared       # rows that are there are not made again
    python -m bench.goal show build/goal

A row is a process of its own. fewbit's is a whole `fewbit quantize MODEL --max-drop 0.5`. NNCF's (`pip install nncf`) is
`quantize_with_accuracy_control` with its defaults on the float twin of fewbit's run for openvino: the same images
to calibrate and to choose by; the file that it gives is scored on the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.default_recipe import change, models, parser_of
from bench.peers import has_attention, pixels

from fewbit import Run
from fewbit.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np

LIMIT = 0.5  # points
FEWBIT, NNCF = "fewbit", "NNCF"
FIVE = ("ViT-S", "EfficientNet-Lite0", "demo", "ResNet-20", "YOLOX-nano")
ROWS = (
    *((FEWBIT, name, "ort-x86-vnni") for name in FIVE),
    *((by, name, "openvino-x86") for name in FIVE[:2] for by in (FEWBIT, NNCF)),
)


def ours(folder: Path, name: str, target: str, shared: Path) -> dict[str, Any]:
    """A run, and what it says of the files that it tried."""
    out = folder / f"run {name} {target}"
    tail = ("--max-drop", LIMIT, "--target", target, "--threads", 1, "--seconds", 1, "--out", out, "--force")
    command = [sys.executable, "-m", "fewbit", "quantize", *models(shared)[name], *tail]
    began = time.monotonic()
    done = subprocess.run([str(part) for part in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1):
        raise SystemExit(f"fewbit ended with {done.returncode}")
    took = time.monotonic() - began
    report, tried = read_json(out / "report.json"), read_json(out / "tables.json")["goal"]
    taken = next(row for row in tried if row["taken"])
    return {
        "found": taken["what"], "tried": len(tried), "chosen_by": [taken["drop"], taken["images"]], "seconds": took,
        "faster": taken["faster"], "exit": done.returncode, "images": report["images"]["scored"], **report["accuracy"],
    }  # fmt: skip


def theirs(folder: Path, name: str, target: str, shared: Path) -> dict[str, Any]:
    """NNCF's file from the float twin of our run, with the same three sets of images."""
    import nncf
    import openvino as ov

    from fewbit.data.shares import halves
    from fewbit.task.task import recognise
    from fewbit.verify import evaluate

    run = Run.open(folder / f"run {name} {target}")
    words = [str(word) for word in models(shared)[name]]
    sources = {option: words[words.index(option) + 1] for option in ("--images", "--score")}
    calibration = run.images(sources["--images"], limit=run.record["request"]["calibration"], labels=False)
    judged, scored = halves(run.images(sources["--score"], limit=run.record["request"]["scored"]), 1)
    source, outputs, path = run.folder / "float.onnx", run["exact"].outputs, folder / f"{name}.xml"
    assert judged.labels is not None

    def right(model: Any, items: Iterable[tuple[np.ndarray, int]]) -> tuple[float, list[float]]:
        hits = [float(int(model(x)[0].argmax()) == label) for x, label in items]
        return sum(hits) / len(hits), hits

    items = list(zip(pixels(judged), judged.labels.tolist(), strict=True))
    began = time.monotonic()
    made = nncf.quantize_with_accuracy_control(
        ov.Core().read_model(str(source)), nncf.Dataset(pixels(calibration)), nncf.Dataset(items), right,
        max_drop=LIMIT / 100, drop_type=nncf.DropType.ABSOLUTE, subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER if has_attention(source) else None,
    )  # fmt: skip
    took = time.monotonic() - began
    ov.save_model(made, str(path), compress_to_fp16=False)
    score = evaluate(source, path, scored, outputs, recognise(outputs), runtime="openvino")
    return {
        "found": f"{_quantizers(made)} FakeQuantize nodes", "tried": None, "chosen_by": None, "seconds": took, "faster": None,
        "exit": None, "images": score.images, **score.to_json(),
    }  # fmt: skip


def _quantizers(model: Any) -> int:
    return sum(node.get_type_name() == "FakeQuantize" for node in model.get_ordered_ops())


def table(folder: Path) -> Iterator[str]:
    """Each row on the images that chose nothing."""
    yield "| model, target | by | file | tried | float | quantized | drop (95 %) | agreement | images | × float | time |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for by, name, target in ROWS:
        path = file_of(folder, by, name, target)
        if not path.exists():
            continue
        row = read_json(path)
        yield " | ".join((
            f"| {name}, `{target}`", by, row["found"], str(row["tried"] or ""),
            *change(row),
            f"{row['images']:,}", "" if row["faster"] is None else f"{row['faster']:.2f}", f"{row['seconds']:.0f} s |",
        ))  # fmt: skip


def file_of(folder: Path, *row: str) -> Path:
    return folder / f"{' '.join(row)}.json"


def main() -> None:
    args = parser_of(__doc__, "by whom, model, target").parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "row":
        by, name, target = args.row
        made = (ours if by == FEWBIT else theirs)(args.folder, name, target, args.shared)
        write_json(file_of(args.folder, by, name, target), {"by": by, "model": name, "target": target, **made})
    if args.what == "show":
        print("\n".join(table(args.folder)))
    for row in ROWS if args.what == "make" else ():
        if not file_of(args.folder, *row).exists():
            command = [sys.executable, "-m", "bench.goal", "row", str(args.folder), *row, "--shared", str(args.shared)]
            subprocess.run(command)  # a row that fails is made with the next call


if __name__ == "__main__":
    main()
