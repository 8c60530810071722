"""The grids that a target allows for the operands of an op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid
from fewbit.target.shapes import channel_axis
from fewbit.target.spec import Accumulator, OpRule, Target, Type

OPTIONAL = ("bias", "output")  # operands that an op can do without: a bias is added in float, a result stays float


@dataclass(frozen=True)
class AllowedGrids:
    """The grids that the target allows for a site (best first), which of them have a fixed scale, and who reads the codes.

    `pinned` are fixed scales, `zeros` their zero points where not 0; `accumulator` is that of the op that reads a weight.
    With `convention` a fixed scale is the target's custom, not its kernels': a recipe may search another.
    """

    grids: tuple[Grid, ...]
    pinned: Mapping[Grid, float] = field(default_factory=dict)
    all_readers: bool = False
    pair_bits: int | None = None
    zeros: Mapping[Grid, int] = field(default_factory=dict)
    accumulator: Accumulator = Accumulator()
    convention: bool = False

    @property
    def fixed_scale(self) -> float | None:
        """The fixed scale of the first grid, if it has one."""
        return self.pinned.get(self.grids[0])

    @property
    def fixed_zero(self) -> int:
        """The zero point that goes with it."""
        return self.zeros.get(self.grids[0], 0)


def wide_enough(types: Sequence[Type], bits: int | None) -> Sequence[Type]:
    """The types of an operand for a width, best first: those that hold it, where the first one does not and another does."""
    if bits is None or types[0].bits >= bits:
        return types
    return [t for t in types if t.bits >= bits] or types


def operand_grids(
    graph: Graph,
    target: Target,
    op: Op,
    rule: OpRule,
    grids: Mapping[str, AllowedGrids],
    site_bits: Mapping[str, int | None],
) -> dict[str, AllowedGrids]:
    """The grids of the sites that an op reads in integers; none for a site where an earlier op needs a different one."""
    op_grids: dict[str, AllowedGrids] = {}
    for operand, name in op.operands.items():
        if not rule.types(operand) or (operand == "output" and rule.output != "integer"):
            continue
        site = graph.site(name)
        types = wide_enough([target.types[t] for t in rule.types(operand)], site_bits[name])
        axis = channel_axis(site) if site.axis is None else site.axis
        inputs = site.shape[1] if operand == "weight" and op.kind == "linear" else 0
        typed_grids = [(t, t.grids(axis, site_bits[name], inputs)) for t in types]
        type_of = {g: t for t, own in reversed(typed_grids) for g in own}  # of two types with one grid the better
        candidates = tuple(dict.fromkeys(g for _, own in typed_grids for g in own))
        pinned = {g: scale for g, t in type_of.items() if (scale := t.step(g)) is not None}
        zeros = {g: zero_point for g in pinned if (zero_point := type_of[g].zero(g))}
        all_readers = operand == "output" or (rule.readers == "all" and operand.startswith("input"))
        accumulator = rule.accumulator if operand == "weight" else Accumulator()
        site_grids = AllowedGrids(
            candidates, pinned, all_readers, accumulator.pair_bits, zeros, accumulator, all(t.convention for t in types)
        )
        before = op_grids.get(name, grids.get(name))
        if before is not None:  # two ops read one tensor: it takes a grid that both have
            shared = tuple(g for g in before.grids if g in site_grids.grids)
            site_grids = replace(
                site_grids, grids=shared, pinned=before.pinned, zeros=before.zeros,
                all_readers=before.all_readers or all_readers, convention=before.convention and site_grids.convention,
            )  # fmt: skip
        op_grids[name] = site_grids
    return op_grids
