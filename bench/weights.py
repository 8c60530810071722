"""Forms of narrow weights: the bytes of the file, accuracy, what loading takes, and speed beside int8 and float.

python bench/weights.py make MODEL --images DIR --score DIR --scored 2000 --seeds 0 --out weights-vit    # --help: forms
python bench/weights.py time weights-vit                                                # when nothing else runs; and load
python bench/weights.py table weights-vit
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rows import Bench, edited, options, rows_of

from fewbit.files import read_json, write_json
from fewbit.load.inputs import image
from fewbit.runtimes import open_session
from fewbit.verify.bench import loads, paired


@dataclass(frozen=True)
class Form:
    """A target (or the edits that make one of a target), the widths, and the runtime that is measured."""

    target: str
    bits: str
    runtime: str = "onnxruntime"
    edits: tuple[tuple[str, str], ...] = ()

    def named(self, folder: Path, name: str) -> str:
        """The target by name, or the file of its own."""
        return edited(self.target, self.edits, folder / f"{name}.toml") if self.edits else self.target


AS_WRITTEN = (
    ("operands = { weight", 'operands = { input = ["a8"], weight'),
    ("[types.w4]", "[types.a8]\nbits = 8\nsigned = false\nsymmetric = false\n\n[types.w4]"),
)
FORMS: Mapping[str, Form] = {
    "int8": Form("ort-x86-vnni", "8"),
    "w6a8": Form("ort-x86-vnni", "w6a8"),
    "w4a8": Form("ort-x86-vnni", "w4a8"),
    "w4a8-block32": Form("ort-x86-block", "w4a8"),
    "w4a8-block64": Form("ort-x86-block", "w4a8", edits=(("group_size = 32", "group_size = 64"),)),
    "w4a8-block16": Form("ort-x86-block", "w4a8", edits=(("group_size = 32", "group_size = 16"),)),
    "w4a8-written": Form("ort-x86-w4", "w4a8", edits=AS_WRITTEN),
    "w3a8": Form("ort-x86-vnni", "w3a8"),
    "w6a6": Form("ort-x86-vnni", "6"),
    "w4a4": Form("ort-x86-vnni", "4"),
    "w3a3": Form("ort-x86-vnni", "3"),
    "w3a8-block32": Form("ort-x86-block", "w3a8"),
    "w4-ort": Form("ort-x86-w4", "4"),
    "w4-ort-block64": Form("ort-x86-w4", "4", edits=(("group_size = 32", "group_size = 64"),)),
    "w4-openvino": Form("openvino-x86-w4", "4", "openvino"),
    "int8-openvino": Form("openvino-x86", "8", "openvino"),
    "w6a6-openvino": Form("openvino-x86", "6", "openvino"),
    "w4a8-openvino": Form("openvino-x86", "w4a8", "openvino"),
    "w4a4-openvino": Form("openvino-x86", "4", "openvino"),
}


def make(args: argparse.Namespace) -> None:
    """The file and the answers of each form and recipe; attention runs as the target likes it best."""
    bench = Bench(args, everything=False)
    for seed in args.seeds:
        for recipe in args.recipes:
            for name in args.forms:
                form = FORMS[name]
                label = f"{name}-{recipe}"
                bench.run(label, recipe, form.bits, seed, form.named(args.out, name))
                for made, kept in (("model.onnx", f"{label}.onnx"), ("float.onnx", "float.onnx")):
                    if (args.out / "row" / made).exists():
                        shutil.move(args.out / "row" / made, args.out / kept)


def forms_of(args: argparse.Namespace, runtime: str) -> dict[str, Path]:
    """The files that were made, by form, float first."""
    files = {file.stem: file for file in sorted(args.out.glob("*-*.onnx")) if file.stem.endswith(f"-{args.recipes[0]}")}
    made = {name: files[f"{name}-{args.recipes[0]}"] for name in args.forms if f"{name}-{args.recipes[0]}" in files}
    return {"float": args.out / "float.onnx"} | {name: path for name, path in made.items() if FORMS[name].runtime == runtime}


def measured(args: argparse.Namespace) -> None:
    """Latencies of each file, paired with int8 and float in the same runtime."""
    found, shape = read_json(args.out / "times.json") if (args.out / "times.json").exists() else {}, tuple(args.shape)
    for runtime in ("onnxruntime", "openvino"):
        files = forms_of(args, runtime)
        sessions = [open_session(runtime, path, threads=args.threads) for path in files.values()]
        for batch in (1, 8):
            x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
            rounds = paired([partial(session.run, x) for session in sessions], args.seconds)
            base = next((i for i, name in enumerate(files) if name.startswith("int8")), 0)
            for i, name in enumerate(files):
                row = found.setdefault(f"{name} {runtime}", {})
                row[f"ms{batch}"] = 1e3 * statistics.median(r[i] for r in rounds)
                row[f"float{batch}"] = statistics.median(r[0] / r[i] for r in rounds)
                row[f"int8{batch}"] = statistics.median(r[base] / r[i] for r in rounds)
        write_json(args.out / "times.json", found)


def loaded(args: argparse.Namespace) -> None:
    """Seconds of making a session and bytes at the peak of loading and one image, in processes of their own."""
    found, shape = read_json(args.out / "times.json") if (args.out / "times.json").exists() else {}, tuple(args.shape)
    for runtime in ("onnxruntime", "openvino"):
        files = forms_of(args, runtime)
        exact = files.pop("float")
        for name, path in files.items():
            load = loads(exact, path, [image(shape)], runtimes=[runtime], threads=args.threads, runs=args.runs)[0]
            for row, seconds, peak in (
                (f"{name} {runtime}", load.quantized_seconds, load.quantized_bytes),
                (f"float {runtime}", load.float_seconds, load.float_bytes),
            ):
                found.setdefault(row, {}).update({"load": seconds, "peak": peak - load.baseline_bytes})
    write_json(args.out / "times.json", found)


def table(args: argparse.Namespace) -> None:
    """One row for each form, recipe and seed."""
    times = read_json(args.out / "times.json") if (args.out / "times.json").exists() else {}
    print("| form | file MB | drop | agreement | load s | peak MB | ms at 1 | at 8 | beside float | beside int8 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows_of(args.out):
        name = row["name"].rpartition("-")[0]
        t = times.get(f"{name} {FORMS[name].runtime}", {})
        shown = [
            f"{t['load']:.2f}", f"{t['peak'] / 1e6:.0f}", f"{t['ms1']:.1f}", f"{t['ms8']:.1f}",
            f"{t['float1']:.2f}, {t['float8']:.2f}", f"{t['int81']:.2f}, {t['int88']:.2f}",
        ] if t else ["", "", "", "", "", ""]  # fmt: skip
        drop = row["float"] - row["top1"]
        print(
            f"| {row['name']} | {row['onnx_bytes'] / 1e6:.2f} | {drop:+.2f} | {row['agreement']:.2f} % | {' | '.join(shown)} |"
        )
    for name in ("onnxruntime", "openvino"):
        if t := times.get(f"float {name}"):
            print(
                f"float in {name}: load {t['load']:.2f} s, peak {t['peak'] / 1e6:.0f} MB, {t['ms1']:.1f} and {t['ms8']:.1f} ms"
            )


def main() -> None:
    parser = options(__doc__, "make", "time", "load", "table", out=None)
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--recipes", nargs="+", default=["fast"])
    parser.add_argument("--shape", nargs=3, type=int, default=(3, 112, 112), help="of an image, for timing")
    parser.add_argument("--runs", type=int, default=3, help="processes of each file, for loading")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing, for each runtime and batch")
    args = parser.parse_args()
    if args.what == "make":
        make(args)
    else:
        args.out = args.out or Path(args.model)
        {"time": measured, "load": loaded, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
