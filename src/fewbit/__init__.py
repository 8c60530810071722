"""fewbit: a trained vision model and a few images in, the smallest integer model that still gives the same answers out."""

from fewbit.errors import FewbitError, FewbitFailed
from fewbit.pipeline import Result, quantize
from fewbit.run import Run

__version__ = "0.1.0"
__all__ = ["FewbitError", "FewbitFailed", "Result", "Run", "__version__", "quantize"]
