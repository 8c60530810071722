"""One pass of the float graph over the images that builds a histogram for each requested activation site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

from torch import Tensor

from fewbit.core.values import Graph
from fewbit.errors import BadImages, BadValues
from fewbit.execute.watch import watch
from fewbit.observe.stats import Histogram, Stats


def observe(graph: Graph, batches: Iterable[Tensor], sites: Iterable[str] | None = None) -> Stats:
    """Statistics of the activation sites (all, or those named) over batches of (b, c, h, w) normalized images.

    Raises BadImages without a batch, BadValues with the site where a NaN or an infinity first appears.
    """
    names = set(sites) if sites is not None else {s.name for s in graph.sites if s.axis is None}
    histograms: dict[str, Histogram] = {}

    def accumulate(site: str, value: Tensor, images: range) -> None:
        histogram = Histogram.of(value)
        if not _finite(histogram):
            raise BadValues(
                f"{site} holds NaN or infinite values for the calibration images; only finite activations can be quantized. "
                f"Is the preprocessing the model's own (--mean, --std)? Keep it float: --keep-float '{site}'."
            )
        histograms[site] = histograms[site].merge(histogram) if site in histograms else histogram

    taps = {site.tensor: partial(accumulate, site.name) for site in graph.sites if site.name in names}
    count = watch(graph, _checked(graph, batches), taps)
    return Stats({s.name: histograms[s.name] for s in graph.sites if s.name in histograms}, count)


def _checked(graph: Graph, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        if tuple(batch.shape[1:]) != tuple(graph.input_shape):
            raise BadImages(f"images are {tuple(batch.shape[1:])}; the model takes {tuple(graph.input_shape)}.")
        yield batch


def _finite(h: Histogram) -> bool:
    return math.isfinite(h.low) and math.isfinite(h.high)
