"""The values that stages hand to each other. Frozen, no I/O, no arithmetic beyond sums.

Graph    capture  -> the exported program, opened, with its ops and sites
Stats    observe  -> one accumulator per site (fewbit.observe.stats)
Plan     choose   -> per site: grid, step, codes, and who decided; fallbacks
Checks   verify   -> per site: codes that differ between simulation and runtime
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fewbit.core.grid import Grid, QParams

Json = Any


@dataclass(frozen=True)
class Site:
    """A place that can be quantized: one tensor, and the operands that would read its codes.

    `name` is `<module path>:<role>`; `tensor` is the graph node whose value is quantized; `readers` are (op name, operand)
    pairs; `shape` has the batch as 0; `axis` is the channel axis of a weight.
    """

    name: str
    role: str
    tensor: str
    shape: tuple[int, ...]
    readers: tuple[tuple[str, str], ...]
    axis: int | None = None


def flat_name(name: str) -> str:
    """What an op or a site is called in a module and in a file: a buffer's name has no dots, and so no colons here either."""
    return name.replace(".", "_").replace(":", "__")


@dataclass(frozen=True)
class Op:
    """A node that can run in integers: its kind, its operands (operand name -> site name) and what it costs.

    `macs` are multiply-accumulates for one image, `reduction_size` the products that one output sums (None: no product).
    """

    name: str
    node: str
    kind: str
    operands: Mapping[str, str]
    macs: int = 0
    reduction_size: int | None = None


@dataclass(frozen=True)
class Graph:
    """A captured model: an fx graph module with attention opened and batch norm folded, and what was found in it."""

    module: GraphModule
    ops: tuple[Op, ...]
    sites: tuple[Site, ...]
    input_shape: tuple[int, int, int]
    notes: tuple[str, ...] = ()

    def op(self, name: str) -> Op:
        return next(op for op in self.ops if op.name == name)

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)


@dataclass(frozen=True)
class Choice:
    """What was decided for one site. Weights and biases carry their codes; `why` says what decided in a few words.

    `all_readers`: every reader of the tensor reads the codes, not only the integer ops.
    """

    site: str
    role: str
    grid: Grid
    qparams: QParams
    method: str
    codes: Tensor | None = None
    all_readers: bool = False
    why: str = ""


@dataclass(frozen=True)
class Fallback:
    """What was asked for and not given; `macs_share` of the model's multiply-accumulates is touched (0 to 1)."""

    site: str
    requested: str
    actual: str
    why: str
    macs_share: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The product of choose: everything a realizer or a simulation needs beside the graph.

    `integer_ops` are the ops whose operands are all quantized, or the weight alone where the target has that. `biases` are
    float biases that were corrected, (c_out,) by op name, for ops that may have had none; a corrected bias that is quantized is
    a choice like any other.
    """

    target: str
    recipe: str
    bits: str
    choices: Mapping[str, Choice]
    integer_ops: tuple[str, ...]
    fallbacks: tuple[Fallback, ...] = ()
    exemptions: tuple[str, ...] = ()
    extra: Mapping[str, Json] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteCheck:
    """Codes of one site, simulation against runtime, the same upstream codes in both.

    `ties` are off-by-one differences where the simulation stands within `TIE` of a rounding boundary; `wrong` is the rest.
    """

    site: str
    compared: int
    differing: int
    ties: int
    wrong: int
    max_difference: int


@dataclass(frozen=True)
class Checks:
    """Verify's tables: codes with graph optimisations off and on, and outputs per runtime."""

    off: tuple[SiteCheck, ...]
    on: tuple[SiteCheck, ...]
    outputs: Mapping[str, Mapping[str, float]]
    kernels: Mapping[str, Json] = field(default_factory=dict)

    @property
    def wrong(self) -> tuple[SiteCheck, ...]:
        return tuple(check for check in self.off + self.on if check.wrong)
