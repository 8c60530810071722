"""Observe and equalize: statistics of the float graph, whether the images suffice, ranges moved between tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.choose import Bits
from fewbit.core.device import CPU, on
from fewbit.core.graph import Graph
from fewbit.data.images import Images, every_second
from fewbit.data.synthesize.teacher import Teacher
from fewbit.equalize import replaced
from fewbit.files import mapped_tensors, read_json, read_tensors, write_json, write_tensors
from fewbit.observe import Stats, refuse_extremes
from fewbit.observe import observe as statistics_of
from fewbit.observe.calibration_check import CalibrationLimits, inspect_images, range_change
from fewbit.progress import Progress
from fewbit.request import Options, Request
from fewbit.stages.load import Inputs
from fewbit.target.allowed import allowed

STATS = "stats.safetensors"
CALIBRATION = "calibration.json"
EQUALIZED = "equalized.safetensors"  # the constants that equalize has changed, if any
EQUALIZATION = "equalization.json"  # the factors, while the run works
EQUALIZED_STATS = "equalized-stats.safetensors"
LOOKED_AT = 64  # images to check with the float model
SAMPLED = 512  # images of which equalization sees rows
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


def equalize(
    exact: Graph, observed: Stats, calibration: Images, request: Request, folder: Path, progress: Progress
) -> tuple[Graph, Stats, Rows]:
    """The equalized graph, its statistics and the factors; the same graph where the recipe does not equalize."""
    method, bits = request.method.equalize, request.widths
    if method is None:
        return exact, observed, ()
    some = spread(calibration, SAMPLED, exact.at_a_time(1))
    progress.expect(len(some) + len(calibration))
    widths = bits.of(exact) if isinstance(bits, Bits) else Bits(round(bits.mean), round(bits.mean))
    slots = allowed(
        exact, request.hardware, weight_bits=widths.weights, activation_bits=widths.activations, widths=widths.ops,
        keep_float=request.keep_float, everything=request.everything,
    )  # fmt: skip
    size = exact.at_a_time(8)
    result = method(on(exact, request.place), progress.counted(some.batches(size)), slots.grids)
    constants = on(result.constants, CPU)
    batches = progress.counted(calibration.batches(size))
    stats = statistics_of(result.graph, batches, quantized=slots.sites) if constants else observed
    write_tensors(folder / EQUALIZED_STATS, stats.tensors())
    write_tensors(folder / EQUALIZED, constants)
    write_json(folder / EQUALIZATION, {"places": [dict(row) for row in result.record]})
    return reopened(exact, folder), stats, result.record


def equalized(exact: Graph, folder: Path) -> tuple[Graph, Stats, Rows]:
    """The same, loaded from the files."""
    stats = Stats.from_tensors(read_tensors(folder / EQUALIZED_STATS))
    return reopened(exact, folder), stats, read_json(folder / EQUALIZATION)["places"]


def reopened(exact: Graph, folder: Path) -> Graph:
    """The graph that a finished run's plan is for."""
    changed = folder / EQUALIZED
    return replaced(exact, mapped_tensors(changed)) if changed.exists() else exact
