"""Search: bits per op under hard limits, the front of accuracy, milliseconds and bytes, and its points as ONNX files.

search       all of `fewbit search`, from images to its best points
run          the loop: propose and evaluate until something runs out
space        options for each dimension, and limits on costs
strategies   which candidates come next
judge        the best points as files, scored and timed in the runtime
model        the plan of a candidate for a model, and its loss
costs        bits, bytes and milliseconds of a candidate
budget       a limit of these as it is typed
"""

from fewbit.search.search import execute, search

__all__ = ["execute", "search"]
