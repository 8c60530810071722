"""The only place that asks what a target allows."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fewbit.errors import UnknownName
from fewbit.grid import Grid, safe_terms
from fewbit.target.spec import OpRule, Target, Type
from fewbit.types import Graph, Op, Refusal, Site

# operands that an op can do without: a bias is added in float, a result stays float
OPTIONAL = ("bias", "output")


@dataclass(frozen=True)
class Slot:
    """What a site gets: grids that the target allows (best first), those with a pinned step, and who reads the codes.

    A pinned step that is `loose` is the target's custom, not its kernels': a recipe may search another.
    """

    grids: tuple[Grid, ...]
    pinned: Mapping[Grid, float] = field(default_factory=dict)
    everyone: bool = False
    pair_bits: int | None = None
    loose: bool = False

    @property
    def fixed_scale(self) -> float | None:
        """The step of the first grid, where the target pins it."""
        return self.pinned.get(self.grids[0])


@dataclass(frozen=True)
class Legal:
    """The answer: slots by site name, the ops that run in integers, and why others do not."""

    slots: Mapping[str, Slot]
    integer_ops: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    @property
    def grids(self) -> dict[str, Grid]:
        """The first grid of each site."""
        return {name: slot.grids[0] for name, slot in self.slots.items()}

    @property
    def channel_axes(self) -> dict[str, int]:
        """The channel axis of each activation that has a step for each channel."""
        operands = ("weight", "bias")
        first = {name: slot.grids[0] for name, slot in self.slots.items() if name.rpartition(":")[2] not in operands}
        return {name: grid.axis for name, grid in first.items() if grid.axis is not None}


def legal(
    graph: Graph,
    target: Target,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    widths: Mapping[str, int | tuple[int, int]] = MappingProxyType({}),
    keep_float: Sequence[str] = (),
    everything: bool = False,
) -> Legal:
    """Which ops of a graph run in integers on a target, and the grid of every site that they read.

    `widths` are ops (by name) whose weight and activations have another width, or one each; a tensor that several ops read has
    the largest width that one of them asks for. Where the products of two grids can overflow the target's chain of products,
    the next type of the operands is taken, and where none fits the op stays float.
    `keep_float` are patterns of op or site names (`blocks.3.mlp.*`); `everything` also takes the ops that the target can
    run in integers and runs faster in float. Raises UnknownName for a pattern that matches nothing.
    """
    for pattern in keep_float:
        if not any(_matches(op, (pattern,)) for op in graph.ops):
            raise UnknownName("site or op in --keep-float", pattern, [op.name for op in graph.ops])
    verdicts: dict[str, OpRule] = {}
    refusals: list[Refusal] = []
    for op in graph.ops:
        rule = target.rule(op.kind)
        if _matches(op, keep_float):
            refusals.append(_refusal(graph, op, "kept float on request (--keep-float)"))
        elif rule is None:
            if op.macs:
                refusals.append(_refusal(graph, op, f"{target.name} has no integer {op.kind}"))
        elif missing := [name for name in op.operands if name not in rule.operands and name not in OPTIONAL]:
            refusals.append(_refusal(graph, op, f"{target.name} has no integer {op.kind} with operand {', '.join(missing)}"))
        elif rule.runs == "float" and not everything:
            refusals.append(_refusal(graph, op, rule.why or f"{target.name} runs {op.kind} faster in float"))
        elif rule.runs != "follow":
            verdicts[op.name] = rule
    asked = {site.name: _asked(site, weight_bits, activation_bits, widths) for site in graph.sites}
    slots: dict[str, Slot] = {}
    for following in (False, True):
        if following:
            _follow(graph, target, verdicts, keep_float)
        for op in graph.ops:
            if op.name not in verdicts or (verdicts[op.name].runs == "follow") != following:
                continue
            wanted = _slots(graph, target, op, verdicts[op.name], slots, asked)
            clash = next((name for name, slot in wanted.items() if not slot.grids), None)
            why = f"{target.name} has no grid for {clash} that all of its readers take" if clash else ""
            if not clash and verdicts[op.name].accumulator.chain_bits is not None:
                wanted, why, narrowed = _within_chain(graph, op, verdicts[op.name], wanted)
                refusals.extend(narrowed)
            if why:
                del verdicts[op.name]
                refusals.append(_refusal(graph, op, why))
            else:
                slots.update(wanted)
    return Legal(slots, tuple(op.name for op in graph.ops if op.name in verdicts), tuple(refusals))


def _follow(graph: Graph, target: Target, verdicts: dict[str, OpRule], keep_float: Sequence[str]) -> None:
    """Ops that join quantized tensors: in integers where every operand is the quantized result of an integer op."""
    results = {_result(op) for op in graph.ops if op.name in verdicts and verdicts[op.name].output == "integer"}
    changed = True
    while changed:
        changed = False
        for op in graph.ops:
            rule = target.rule(op.kind)
            if op.name in verdicts or rule is None or rule.runs != "follow" or _matches(op, keep_float):
                continue
            if all(site in results for operand, site in op.operands.items() if operand not in OPTIONAL):
                verdicts[op.name] = rule
                results.add(_result(op))
                changed = True


def wide_enough(types: Sequence[Type], bits: int | None) -> Sequence[Type]:
    """The types of an operand for a width, best first: those that hold it, where the first one does not and another does."""
    if bits is None or types[0].bits >= bits:
        return types
    return [t for t in types if t.bits >= bits] or types


def widest(target: Target, kind: str) -> int:
    """The largest width that every operand of a kind of op can have; biases and pinned results have their own."""
    rule = target.rule(kind)
    if rule is None:
        return 0
    operands = [types for operand, types in rule.operands.items() if operand != "bias"]
    return min(max(target.types[t].bits for t in types) for types in operands)


def channel_axis(site: Site) -> int:
    """Where the channels of an activation are: behind the batch in a map (batch, channels, h, w), last in anything else."""
    return 1 if len(site.shape) == 4 else len(site.shape) - 1


def _asked(site: Site, weight_bits: int, activation_bits: int, widths: Mapping[str, int | tuple[int, int]]) -> int | None:
    """The width of a site; None for a bias, which has the one of its type."""
    if site.role == "bias":
        return None
    asked = [widths[op] for op, _ in site.readers if op in widths]
    given = [both if isinstance(both, int) else both[site.role != "weight"] for both in asked]
    return max(given) if given else weight_bits if site.role == "weight" else activation_bits


def _result(op: Op) -> str:
    return op.operands.get("output", "")


def _slots(
    graph: Graph,
    target: Target,
    op: Op,
    rule: OpRule,
    slots: Mapping[str, Slot],
    asked: Mapping[str, int | None],
) -> dict[str, Slot]:
    """The slots of the sites that an op reads in integers; one without a grid where an op before it took another."""
    found: dict[str, Slot] = {}
    for operand, name in op.operands.items():
        if operand not in rule.operands or (operand == "output" and rule.output != "integer"):
            continue
        site = graph.site(name)
        types = wide_enough([target.types[t] for t in rule.operands[operand]], asked[name])
        axis = channel_axis(site) if site.axis is None else site.axis
        typed = {t.grid(axis, asked[name]): t for t in reversed(types)}  # of two types with one grid the better
        grids = tuple(dict.fromkeys(t.grid(axis, asked[name]) for t in types))
        pinned = {g: step for g, t in typed.items() if (step := t.step(g)) is not None}
        everyone = operand == "output" or (rule.readers == "all" and operand == "input")
        pair_bits = rule.accumulator.pair_bits if operand == "weight" else None
        slot = Slot(grids, pinned, everyone, pair_bits, all(t.loose for t in types))
        before = found.get(name, slots.get(name))
        if before is not None:  # two ops read one tensor: it takes a grid that both have
            shared = tuple(g for g in before.grids if g in slot.grids)
            slot = Slot(shared, before.pinned, before.everyone or everyone, pair_bits, before.loose and slot.loose)
        found[name] = slot
    return found


def _within_chain(graph: Graph, op: Op, rule: OpRule, wanted: Mapping[str, Slot]) -> tuple[dict[str, Slot], str, list[Refusal]]:
    """The slots without the grids whose products overflow a chain, why there are none then, and a refusal for each that lost.

    The first pair of grids that fits stays, and of the others those that are no larger: any two of them fit, also where
    another op that reads the tensor takes more away.
    """
    chain_bits, chain = rule.accumulator.chain_bits, rule.accumulator.chain
    assert chain_bits is not None
    assert chain is not None
    names = [op.operands[operand] for operand in op.operands if operand not in OPTIONAL]
    a, b = names[0], names[-1]  # one name where a tensor is multiplied by itself
    terms = min(chain, op.terms or chain)
    pairs = [(g, h) for g in wanted[a].grids for h in wanted[b].grids if a != b or g == h]
    found = next((pair for pair in pairs if safe_terms(chain_bits, *pair) >= terms), None)
    g, h = pairs[0]
    why = f"{terms} products of {g.bits} by {h.bits} bits do not fit in {chain_bits} bits: {safe_terms(chain_bits, g, h)} do"
    if found is None:
        return {}, why, []
    kept, narrowed = dict(wanted), []
    for name, grid in dict(zip((a, b), found, strict=True)).items():
        slot = wanted[name]
        kept[name] = replace(slot, grids=tuple(other for other in slot.grids if other.largest <= grid.largest))
        if (first := kept[name].grids[0]) != slot.grids[0]:
            share = op.macs / max(graph.macs, 1)
            narrowed.append(Refusal(name, f"{slot.grids[0].bits} bits", f"{first.bits} bits", why, share))
    return kept, "", narrowed


def _matches(op: Op, patterns: Sequence[str]) -> bool:
    names = [op.name, *op.operands.values()]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _refusal(graph: Graph, op: Op, why: str) -> Refusal:
    return Refusal(op.name, asked="integers", given="float", why=why, macs_share=op.macs / max(graph.macs, 1))
