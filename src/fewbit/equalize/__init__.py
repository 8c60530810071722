"""Equalize: rewrites that leave the float function unchanged and make its tensors easier to quantize; graph in, graph out.

layernorm    scale and shift of a layer norm into the layers that read it
attention    values and the layer behind attention; queries against keys
cross_layer  convolutions with a ReLU between them
"""

from fewbit.equalize.equalize import Equalize, Equalized, replaced

__all__ = ["Equalize", "Equalized", "replaced"]
