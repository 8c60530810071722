"""Observe: one pass over the images, one mergeable accumulator per site.

observe             the pass
stats               statistics that merge exactly: the histogram of a site, and more
outliers            channels and tokens that stretch the range of all others
calibration_check   are the calibration images enough, and like those of the training
"""

from fewbit.observe.observe import observe, refuse_extremes
from fewbit.observe.stats import Histogram, Stats

__all__ = ["Histogram", "Stats", "observe", "refuse_extremes"]
