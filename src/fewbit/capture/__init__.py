"""Capture: from a module to a graph whose ops and sites have names.

export     torch.export with a dynamic batch; every way to name a model
normalize  rewrites that leave the function unchanged: attention opened, batch norm and LayerScale folded, dropout gone
sites      what can be quantized, found from structure
"""

from fewbit.capture.export import Loaded, export, load_model
from fewbit.capture.normalize import normalize
from fewbit.capture.sites import capture

__all__ = ["Loaded", "capture", "export", "load_model", "normalize"]
