"""`fewbit search`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewbit.cli.app import BarProgress, ImagesOption, ModelArgument, TargetOption, Threads, command, out


@command
def search(
    model: ModelArgument,
    images: ImagesOption = None,
    score: Annotated[str | None, typer.Option(help="Images to judge on; without it a part of --images is held out.")] = None,
    target: TargetOption = None,
    recipe: Annotated[str | None, typer.Option(help="Of ranges: minmax, percentile, mse or kl.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="6bit, 3MB or 20ms; may be repeated, all are kept.")] = None,
    strategy: Annotated[str, typer.Option(help="greedy, random, annealing or tpe.")] = "greedy",
    time: Annotated[str | None, typer.Option(help="End the search then: 90s, 10min, 1h.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates to look at.")] = 300,
    edges: Annotated[str, typer.Option(help="What gets widths: weights (activations keep 8 bits) or all.")] = "weights",
    least: Annotated[int, typer.Option(min=2, help="The narrowest width.")] = 4,
    loss: Annotated[str, typer.Option(help="kl (to the float model) or labels, of the calibration images.")] = "kl",
    calibration: Annotated[int, typer.Option(min=1, help="Search on so many images at most.")] = 64,
    scored: Annotated[int | None, typer.Option(min=1, help="Judge on so many images at most.")] = None,
    points: Annotated[int, typer.Option(min=1, help="Realize so many points at most.")] = 8,
    seed: int = 0,
    keep_float: Annotated[list[str] | None, typer.Option(help="Pattern of ops that stay float; may be repeated.")] = None,
    threads: Threads = 2,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("search"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier search.")] = False,
) -> None:
    """The Pareto front of accuracy, measured latency and size; Ctrl-C ends the search and keeps its best."""
    from fewbit.recipes import DEFAULT
    from fewbit.search import search as find

    progress = BarProgress()
    try:
        found = find(
            model, images, score=score, target=target, recipe=recipe or DEFAULT, budgets=budget or (),
            strategy=strategy, time=time,
            evaluations=evaluations, edges=edges, least=least, loss=loss, calibration=calibration, scored_images=scored,
            seed=seed, threads=threads, points=points, keep_float=keep_float or (), out=folder, force=force,
            command="fewbit " + shlex.join(sys.argv[1:]), progress=progress,
        )  # fmt: skip
    finally:
        progress.close()
    table = Table("point", "top-1", "agreement", "ms", "predicted", "faster", "MB", "bits", "front")
    for row in found["points"]:
        table.add_row(
            row["point"], "-" if row["quantized"] is None else f"{row['quantized']:.2f} %", f"{row['agreement']:.2f} %",
            f"{row['ms']:.3f}", f"{row['predicted_ms']:.3f}", f"{row['faster']:.2f} x", f"{row['bytes'] / 1e6:.3f}",
            f"{row['weight_bits']:.2f}", "yes" if row["front"] else "",
        )  # fmt: skip
    out.print(table)
    for row in found["points"]:
        if row["front"]:
            out.print(f"{row['point']}: {row['command']}", soft_wrap=True, highlight=False)
    out.print(f"Report: {folder / 'report.html'}")
