"""Whether the program that ships with a run gives the runtime the pixels that were scored, and answers as the run does.

    python bench/shipped.py RUN=PICTURES ... [--count 200]     # a folder of pictures or a .parquet file for each run

For each picture: the bytes that `deploy/predict.py` feeds to the file against those that fewbit feeds, and all outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fewbit import Run
from fewbit.data.decode import decode
from fewbit.deploy.program import loaded
from fewbit.files import read_json
from fewbit.runtimes import open_session

SUFFIXES = (".jpg", ".jpeg", ".png")


def pictures(place: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """So many encoded pictures, evenly spaced."""
    if place.suffix == ".parquet":
        column = pq.read_table(place).column("image")
        for i in np.linspace(0, len(column) - 1, min(count, len(column))).round().astype(int).tolist():
            yield f"row {i}", column[i].as_py()["bytes"]
        return
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int).tolist():
        yield files[i].name, files[i].read_bytes()


def compared(folder: Path, some: Iterator[tuple[str, bytes]]) -> tuple[int, int, int]:
    """How many pictures were looked at, how many have other pixels, how many other outputs."""
    run = Run.open(folder)
    task = read_json(folder / "deploy" / "task.json")
    predict, channels = loaded(task["pieces"]), run["exact"].input_shape[0]
    model, session = predict.Model(folder / "deploy"), open_session(task["runtime"], folder / "model.onnx")
    looked = pixels = outputs = 0
    for name, content in some:
        x = run.preprocess(decode(content, name, channels))[None].numpy()
        (wanted,), feeds = session.feed(x), model.feeds(predict.opened(content, name, channels))
        (given,) = feeds.values()
        looked += 1
        pixels += given.dtype != wanted.dtype or not np.array_equal(given, wanted)
        answers = zip(model.run(feeds), session.run(x).values(), strict=True)
        outputs += not all(np.array_equal(ours, theirs) for ours, theirs in answers)
    return looked, pixels, outputs


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN=PICTURES")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args(given)
    print("| run | pictures | other pixels | other outputs |\n|---|---|---|---|")
    for text in args.runs:
        folder, _, place = text.rpartition("=")
        looked, pixels, outputs = compared(Path(folder), pictures(Path(place), args.count))
        print(f"| {Path(folder).name} | {looked} | {pixels} | {outputs} |", flush=True)


if __name__ == "__main__":
    main()
