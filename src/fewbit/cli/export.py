"""`fewbit export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.app import command
from fewbit.cli.terminal import out
from fewbit.request.types import OUT


@command
def export(
    run: Path,
    to: Annotated[Path, typer.Option(help=OUT)],
    form: Annotated[str, typer.Option("--format", help="onnx, openvino (IR) or ort (onnxruntime's own).")] = "onnx",
) -> None:
    """The model in a folder of its own, with a program in Python, examples in C++ and JavaScript, and what they need."""
    from fewbit.deploy.export import export as exported_to

    made = exported_to(run, to, form)
    out.print(f"{made.folder}: python {made.folder / 'predict.py'} PICTURE", soft_wrap=True)
    times = f"; {1e3 * made.seconds:.1f} ms to load, the run's own file {1e3 * made.own_seconds:.1f} ms"
    more = "" if form == "onnx" else times  # the same bytes
    out.print(f"Its outputs are those of the run's own file on {made.images} images{more}.", soft_wrap=True)
    if form == "ort" and made.seconds > made.own_seconds:
        out.print("Warning: it loads no faster than the ONNX file here; --format onnx runs on any processor.", style="yellow")
