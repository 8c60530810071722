"""Equalize: rewrites that leave the float function unchanged and make its tensors easier to quantize; graph in, graph out.

equalize        the settings, and all rewrites in turn: layer norms, values, keys, convolutions
attention_rows  rows of attention's probabilities by their maxima, below 8 bits
channels        a step for each channel where it costs nothing, by powers of two
cross_layer     convolutions with a ReLU between them
migrate         how much of the range of channels goes from an activation into the weights that read it
rotate          rotations of the residual stream and of heads
samples         what is looked at of the tensors between
replaced        a graph with other constants, and whether its function is the same
"""

from fewbit.equalize.equalize import Equalize, Equalized
from fewbit.equalize.replaced import replaced

__all__ = ["Equalize", "Equalized", "replaced"]
