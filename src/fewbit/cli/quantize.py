"""`fewbit quantize`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.app import (
    BarProgress,
    ModelArgument,
    TargetOption,
    Threads,
    command,
    fail_on_drop,
    fail_on_wrong,
    numbers,
    out,
    show,
)


@command
def quantize(
    model: ModelArgument,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder (class sub-folders or flat), parquet, .npy or .npz; synthetic (made from the model) or synthetic:DIR "
            "(made from the model and a few real ones)."
        ),
    ] = None,
    score: Annotated[str | None, typer.Option(help="Images to score on; without it a part of --images is held out.")] = None,
    target: TargetOption = None,
    recipe: Annotated[str | None, typer.Option(help="See `fewbit recipes`, which marks the default.")] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="8 (the default, or the most that the target has); w4a8; 4,first=8,last=8 (exceptions by op); mixed:6.0 (a "
            "width for each module)."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("run"),
    calibration: Annotated[int, typer.Option(min=1, help="Calibrate on so many images at most.")] = 128,
    scored: Annotated[int | None, typer.Option(min=1, help="Score on so many images at most.")] = None,
    seed: int = 0,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="Pattern of ops or sites that stay float; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Also what runs faster in float on the target.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out.")] = False,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Ignore labels.")] = False,
    time: Annotated[str | None, typer.Option(help="Of a search or reconstruction (lapq, best): 90s, 10min, 1h.")] = None,
    loss: Annotated[str | None, typer.Option(help="Of that search: kl (default) or labels, of the calibration images.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of what makes synthetic images and of recipes that train (fdda).")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Score 1, 2, 4, ... 256 calibration images as well.")] = False,
    classes: Annotated[Path | None, typer.Option(help="File with the model's class names in output order.")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a timm model.")] = None,
    input_size: Annotated[str | None, typer.Option(help="3,height,width")] = None,
    mean: Annotated[str | None, typer.Option(help="r,g,b in [0, 1]")] = None,
    std: Annotated[str | None, typer.Option(help="r,g,b in [0, 1]")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos")] = None,
    resize: Annotated[str | None, typer.Option(help="squash, center or border")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized image that the crop keeps.")] = None,
    threads: Threads = 2,
    max_drop: Annotated[
        float | None, typer.Option(help="Exit with 1 where more points are lost (without labels: agreement).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run.")] = False,
) -> None:
    """Quantize a model, verify it in the runtime and write a run folder with its report."""
    from fewbit import pipeline
    from fewbit.recipes import DEFAULT

    size = numbers(input_size, "--input-size", 3)
    overrides = {
        "input_size": tuple(int(v) for v in size) if size else None,
        "mean": numbers(mean, "--mean", 3),
        "std": numbers(std, "--std", 3),
        "interpolation": interpolation,
        "resize": resize,
        "crop_pct": crop_pct,
    }
    progress = BarProgress()
    try:
        result = pipeline.quantize(
            model,
            images,
            score=score,
            target=target,
            recipe=recipe or DEFAULT,
            bits=bits,
            out=folder,
            calibration=calibration,
            scored=scored,
            seed=seed,
            keep_float=keep_float or (),
            everything=everything,
            skip_bad=skip_bad,
            labels=not no_labels,
            time=time,
            loss=loss,
            steps=steps,
            curve=curve,
            classes=classes,
            weights=weights,
            preprocess={k: v for k, v in overrides.items() if v is not None},
            threads=threads,
            force=force,
            command="fewbit " + shlex.join(sys.argv[1:]),
            progress=progress,
        )
    finally:
        progress.close()
    show(dict(result.report))
    out.print(f"Report: {folder / 'report.html'}")
    fail_on_wrong(result.report["verify"], result.report)
    fail_on_drop(result.report["accuracy"], max_drop)
