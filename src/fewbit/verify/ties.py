"""Which codes may differ: where the value stands so near to a rounding boundary that a runtime may round it another way.

A sum of a few thousand terms in another order moves a position among the codes by about a millionth of its size: `TIE`. Beside
that, kernels compute sigmoid, tanh, erf and what is made of them by one polynomial for their whole range. Its error is
absolute, about a unit in the last place of 1, however small the value is; SiLU multiplies it by its input. For a tensor
whose steps are smaller than that error (all of its numbers lie in a tail of the function) the reach of a tie is what the
error can do to it, which may be several codes: the graph runs again with these functions off by `OFF`, up and then down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.core.checks import SiteCheck
from fewbit.core.fx import aten
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import SiteTrace

TIE = 2e-3  # in codes; a position has a size of up to 255
OFF = 2.0**-22  # of sigmoid, twice that of tanh and erf: onnxruntime 1.32 is off by up to 1.3e-7 and 2.7e-7

FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    aten.sigmoid.default: lambda off, x: x.sigmoid() + off,
    aten.tanh.default: lambda off, x: x.tanh() + 2 * off,
    aten.erf.default: lambda off, x: x.erf() + 2 * off,
    aten.silu.default: lambda off, x: F.silu(x) + off * x,
    aten.gelu.default: lambda off, x, approximate="none": F.gelu(x, approximate=approximate) + off * x,
}


def off_by(executor: Executor) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """For `Executor.__call__`: the functions of the nodes that a polynomial computes, off by `OFF` up, then down; nothing
    where there are no such nodes.
    """
    nodes = [node for node in executor.order if node.op == "call_function" and node.target in FUNCTIONS]
    for off in (OFF, -OFF) if nodes else ():
        yield {node.name: _off(FUNCTIONS[node.target], off) for node in nodes}


def _off(function: Callable[..., Tensor], off: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(off, *args, **kwargs)


def checked(site: str, ours: SiteTrace, theirs: Tensor, reach: Tensor | float = TIE) -> SiteCheck:
    """The codes of a site against those of a runtime; `reach` is how far the runtime's position may be from ours. A tie is
    a code that such a position is rounded to.
    """
    difference = (ours.codes - theirs).abs()
    differing = int((difference > 0).sum())
    ties = 0
    if differing:
        near = (theirs - ours.position).abs() <= 0.5 + reach
        ties = int((near & (difference > 0)).sum())
    most = int(difference.max()) if difference.numel() else 0
    return SiteCheck(site, theirs.numel(), differing, ties, differing - ties, most)


def reach(ours: SiteTrace, others: list[SiteTrace]) -> Tensor:
    """How far a position may be from ours, where others are the site with its functions off, up and down: the smaller of both
    ways, which are alike but where a threshold turns (thresholds.py).
    """
    moved = [(other.position - ours.position).abs() for other in others]
    return TIE + torch.stack(moved).amin(0) if moved else torch.full_like(ours.position, TIE)
