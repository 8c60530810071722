"""Observe: one pass over the images, one mergeable accumulator per site."""

from fewbit.observe.observe import observe, refuse_extremes
from fewbit.observe.stats import Histogram, Stats

__all__ = ["Histogram", "Stats", "observe", "refuse_extremes"]
