"""One pass of the float graph over the images that builds a histogram for each requested activation site."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, images_of
from fewbit.errors import BadImages, BadValues
from fewbit.execute.watch import watch
from fewbit.observe.stats import Histogram, Stats

SHOWN = 12  # as many sites are named in a message
LEAST, MOST = 1e-16, 1e16  # the largest magnitude of a tensor whose errors can be squared and summed in float32


def observe(
    graph: Graph, batches: Iterable[Batch], sites: Iterable[str] | None = None, quantized: Container[str] | None = None
) -> Stats:
    """Statistics of the activation sites (all, or those named) over batches of normalized images.

    A site that holds NaN or infinities, as padding and masks may, has none. Raises BadImages without a batch, BadValues where
    it is one of `quantized` (None: all are), or where the model's answers are not finite either.
    """
    names = set(sites) if sites is not None else {s.name for s in graph.sites if s.axis is None}
    histograms: dict[str, Histogram] = {}
    broken: list[str] = []
    answers = {node.name for node in graph.module.graph.output_node().all_input_nodes}

    def accumulate(site: str, value: Tensor, images: range) -> None:
        histogram = Histogram.of(value)
        if not _finite(histogram):
            broken.append(site)
        histograms[site] = histograms[site].merge(histogram) if site in histograms else histogram

    def answered(name: str, value: Tensor, images: range) -> None:
        if name in of_sites:
            of_sites[name](value, images)
        if not bool(value.isfinite().all()):
            _refuse_answers(broken)

    def looked_at() -> Iterator[Batch]:
        for batch in _checked(graph, batches):
            yield batch
            _refuse_sites([site for site in broken if quantized is None or site in quantized])

    of_sites: dict[str, Callable[[Tensor, range], object]] = {
        site.tensor: partial(accumulate, site.name) for site in graph.sites if site.name in names
    }
    count = watch(graph, looked_at(), {**of_sites, **{name: partial(answered, name) for name in answers}})
    return Stats({s.name: histograms[s.name] for s in graph.sites if s.name in histograms.keys() - set(broken)}, count)


def refuse_extremes(largest: Mapping[str, float]) -> None:
    """Raise BadValues where the largest magnitude of a site, by name, is so far from 1 that squares of its rounding errors
    leave float32, where methods compare them. Zeros alone are no such site.
    """
    far = [name for name, number in largest.items() if number and not LEAST <= number <= MOST]
    if far:
        raise BadValues(
            f"the largest number of {far[0]} is {largest[far[0]]:.2g}: squares of its rounding errors leave float32, so no "
            f"integers can be chosen for it; it may be {LEAST:g} to {MOST:g}. Scale the layers of the model that write and "
            f"read it, or keep it float: {_kept_float(far)}"
        )


def _refuse_answers(broken: Sequence[str]) -> None:
    where = f"{broken[0]} and the model's answers hold" if broken else "the model's answers hold"
    raise BadValues(
        f"{where} NaN or infinite values for the calibration images, so there is nothing to compare with. "
        "Are the preprocessing (--mean, --std, --input-size) and the images the model's own?"
    )


def _kept_float(sites: Sequence[str]) -> str:
    """The options that keep sites float; of very many the first ones, as then something else is wrong."""
    more = f" and so on, {len(sites)} sites in all: are the weights those of a trained model?" if len(sites) > SHOWN else "."
    return " ".join(f"--keep-float '{site}'" for site in sites[:SHOWN]) + more


def _refuse_sites(broken: Sequence[str]) -> None:
    if broken:
        raise BadValues(
            f"{broken[0]} holds NaN or infinite values for the calibration images; only finite activations can be quantized. "
            f"Keep it float: {_kept_float(list(dict.fromkeys(broken)))}"
        )


def _checked(graph: Graph, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        shape = tuple(images_of(batch).shape[1:])
        if shape != tuple(graph.input_shape):
            raise BadImages(f"images are {shape}; the model takes {tuple(graph.input_shape)}.")
        yield batch


def _finite(h: Histogram) -> bool:
    return math.isfinite(h.low) and math.isfinite(h.high)
