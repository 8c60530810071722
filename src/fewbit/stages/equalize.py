"""Equalize: ranges moved between tensors."""

from __future__ import annotations

from pathlib import Path

from fewbit.choose import Bits
from fewbit.core.device import CPU, on
from fewbit.core.graph import Graph
from fewbit.data.images import Images
from fewbit.equalize import replaced
from fewbit.files import mapped_tensors, read_json, read_tensors, write_json, write_tensors
from fewbit.observe import Stats
from fewbit.observe import observe as statistics_of
from fewbit.progress import Progress
from fewbit.request import Request
from fewbit.stages.observe import Rows, spread
from fewbit.target.allowed import allowed

EQUALIZED = "equalized.safetensors"  # the constants that equalize has changed, if any
EQUALIZATION = "equalization.json"  # the factors, while the run works
EQUALIZED_STATS = "equalized-stats.safetensors"


def equalize(
    exact: Graph, observed: Stats, calibration: Images, request: Request, folder: Path, progress: Progress
) -> tuple[Graph, Stats, Rows]:
    """The equalized graph, its statistics and the factors; the same graph where the recipe does not equalize."""
    method, bits = request.method.equalize, request.widths
    if method is None:
        return exact, observed, ()
    widths = bits.of(exact) if isinstance(bits, Bits) else Bits(round(bits.mean), round(bits.mean))
    slots = allowed(
        exact, request.hardware, weight_bits=widths.weights, activation_bits=widths.activations, widths=widths.ops,
        keep_float=request.keep_float, everything=request.everything,
    )  # fmt: skip
    some = spread(calibration, method.images(exact, slots.grids), exact.at_a_time(1))
    progress.expect(len(some) + len(calibration))
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
