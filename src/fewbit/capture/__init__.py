"""Capture: from an exported program to a graph whose ops and sites have names.

normalize     rewrites that leave the function unchanged: attention opened, batch norm and LayerScale folded, dropout gone; the
              steps are canonicalize (one spelling of each op), spelling (gelu and norms that a file wrote out as arithmetic),
              windows (pooling and padding), patches (a stem as a linear layer), qkv (a joint layer as three), repeats
kinds         the kinds of op that can run in integers; sites: the ops of a graph and the tensors that they read; costs: their
              multiply-accumulates; selections: nodes that choose by comparing
structure     modules, attention, norms and their readers; residual: the residual stream, blocks, pairs of convolutions
mapped        weights as pages of a file
"""

from fewbit.capture.normalize import normalize
from fewbit.capture.sites import capture

__all__ = ["capture", "normalize"]
