"""Observe: statistics of the float graph, and whether the images suffice."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.core.device import on
from fewbit.core.graph import Graph
from fewbit.data.images import Images
from fewbit.data.shares import every_second
from fewbit.data.synthesize.teacher import Teacher
from fewbit.files import read_json, read_tensors, write_json, write_tensors
from fewbit.observe import Stats, refuse_extremes
from fewbit.observe import observe as statistics_of
from fewbit.observe.calibration_check import CalibrationLimits, inspect_images, range_change
from fewbit.progress import Progress
from fewbit.request import Options
from fewbit.stages.load import Inputs

STATS = "stats.safetensors"
CALIBRATION = "calibration.json"
LOOKED_AT = 64  # images to check with the float model
Rows = Sequence[Mapping[str, Any]]


def observe(
    exact: Graph,
    inputs: Inputs,
    calibration: Images,
    asked: Options,
    folder: Path,
    progress: Progress,
    quantized: Container[str] | None,
) -> tuple[Stats, Mapping[str, Any]]:
    """Statistics of every site, and whether the images suffice, from a comparison of two halves of them.

    `quantized` are the sites whose values have to be finite; None: all.
    """
    progress.expect(len(calibration))
    count, one, size = len(calibration), exact.at_a_time(1), exact.at_a_time(8)
    parts = [part for part in every_second(calibration, one) if len(part)]
    placed = on(exact, asked.place)
    halves = [statistics_of(placed, progress.counted(part.batches(size)), quantized=quantized) for part in parts]
    change = range_change(*halves) if len(halves) == 2 else None
    stats = halves[0] if len(halves) == 1 else halves[0].merge(halves[1])
    ends = {name: max(abs(seen.low), abs(seen.high)) for name, seen in stats.sites.items()}
    refuse_extremes({name: end for name, end in ends.items() if quantized is None or name in quantized})
    some = spread(calibration, LOOKED_AT, one)
    inspection = inspect_images(Teacher(inputs.loaded.program, inputs.loaded.inputs, asked.place), some.batches(size))
    verdict = CalibrationLimits()(replace(inspection, images=count), change)
    notes = dict.fromkeys([*calibration.notes, *inputs.scored.notes])
    verdict["warnings"] = [*verdict["warnings"], *notes]
    write_json(folder / CALIBRATION, verdict)
    write_tensors(folder / STATS, stats.tensors())
    return stats, verdict


def spread(images: Images, most: int, together: int) -> Images:
    """At most so many images, and one batch, from all over them; those of a batch of the model stay `together`."""
    step = -(-len(images) // most)
    return images.subset(i for i in range(len(images)) if i // together % step == 0)


def observed(folder: Path) -> tuple[Stats, Mapping[str, Any]]:
    """The same, loaded from the files."""
    return Stats.from_tensors(read_tensors(folder / STATS)), read_json(folder / CALIBRATION)
