"""Capture: from a module to a graph whose ops and sites have names.

load       every way to name a model; export: torch.export with a dynamic batch
normalize  rewrites that leave the function unchanged: attention opened, batch norm and LayerScale folded, dropout gone
kinds      the kinds of op that can run in integers; sites: the ops of a graph and the tensors that they read
structure  modules, attention, norms and their readers; residual: the residual stream, blocks, pairs of convolutions
"""

from fewbit.capture.export import export
from fewbit.capture.load import Loaded, load_model
from fewbit.capture.normalize import normalize
from fewbit.capture.sites import capture

__all__ = ["Loaded", "capture", "export", "load_model", "normalize"]
