"""Which ops of a graph run in integers on a target, and on which grids; nothing else reads the rules of a target."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from fewbit.core.graph import Graph, Op, Site
from fewbit.core.grid import Grid
from fewbit.core.plan import Fallback, FallbackKind
from fewbit.errors import UnknownName
from fewbit.target.grids import OPTIONAL, AllowedGrids, operand_grids
from fewbit.target.shapes import misfit, shared_groups
from fewbit.target.spec import OpRule, Target
from fewbit.target.sums import within_chain, within_sum


@dataclass(frozen=True)
class Allowed:
    """Grids by site name, the ops that run in integers, the fallbacks of the others, and sites that share one scale.

    `integer_results` are the ops whose own kernel makes the codes of their result: where a reader alone asks for the codes,
    the kernel gives real numbers.
    """

    sites: Mapping[str, AllowedGrids]
    integer_ops: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]
    shared: tuple[tuple[str, ...], ...] = ()
    integer_results: frozenset[str] = frozenset()

    @property
    def grids(self) -> dict[str, Grid]:
        """The first grid of each site."""
        return {name: site_grids.grids[0] for name, site_grids in self.sites.items()}

    @property
    def channel_axes(self) -> dict[str, int]:
        """The channel axis of each activation that has a scale for each channel."""
        operands = ("weight", "bias")
        first = {name: grid for name, grid in self.grids.items() if name.rpartition(":")[2] not in operands}
        return {name: grid.axis for name, grid in first.items() if grid.axis is not None}


def allowed(
    graph: Graph,
    target: Target,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    widths: Mapping[str, int | tuple[int, int]] = MappingProxyType({}),
    keep_float: Sequence[str] = (),
    everything: bool = False,
    slower: Mapping[str, str] = MappingProxyType({}),
    apart: Mapping[str, str] = MappingProxyType({}),
    because: Mapping[str, str] = MappingProxyType({}),
) -> Allowed:
    """Which ops of a graph run in integers on a target, and the grid of every site that they read.

    Of the target's entries for a kind of op the first that fits is taken: it has the op's operands and sizes, integers as wide
    as those asked for (or none has), and sums that fit in its accumulator. Where the products of two grids can overflow the
    target's chain of products or its accumulator, the next type or width of the operands is taken, and where none fits the op
    stays float. A target without ops leaves everything float, which is no fallback.

    `widths` are ops (by name) whose weight and activations have another width, or one each; a tensor that several ops read has
    the largest width that one of them asks for, or, where it is named itself as a site, its own.
    `keep_float` are patterns of ops (`blocks.3.mlp.*`) or, with a colon, of sites (`head:input`), whose readers stay float;
    what would be float without them keeps the reason that it has then, and `because` has that of patterns that are none of
    --keep-float. `everything` also takes the ops that the target can run in integers and runs faster in float; `slower` are
    ops, by name, that lose time there, `apart` those whose numbers speak against it, and why. Raises
    UnknownName for a pattern that matches nothing.
    """
    for pattern in keep_float:
        if not any(matches(op, (pattern,)) for op in graph.ops):
            raise UnknownName("site or op in --keep-float", pattern, [op.name for op in graph.ops])
    kept = [op.name for op in graph.ops if matches(op, keep_float)]
    site_bits = {site.name: _site_bits(site, weight_bits, activation_bits, widths) for site in graph.sites}
    entries, fallbacks = _all_entries(graph, target, kept, slower, apart, everything=everything, site_bits=site_bits)
    if kept:
        without = allowed(
            graph, target, weight_bits=weight_bits, activation_bits=activation_bits, widths=widths, everything=everything,
            slower=slower, apart=apart,
        )  # fmt: skip
        options = {pattern: because.get(pattern, "kept float on request (--keep-float)") for pattern in keep_float}
        fallbacks += _kept(graph, kept, without, options)
    grids: dict[str, AllowedGrids] = {}
    rules: dict[str, OpRule] = {}
    for follows in (False, True):
        candidates = {name: usable for name, usable in entries.items() if usable and (usable[0].runs == "follow") == follows}
        if follows:
            candidates = _followers(graph, candidates, rules)
        for op in graph.ops:
            reasons = []
            for rule in candidates.get(op.name, ()):
                op_grids, why, op_fallbacks = _fitted(graph, target, op, rule, grids, site_bits)
                if not why:
                    rules[op.name] = rule
                    grids.update(op_grids)
                    fallbacks += [*op_fallbacks, *_without_groups(graph, target, op, rule)]
                    break
                reasons.append(why)
            else:
                fallbacks += [_fallback(graph, op, why) for why in reasons[:1]]
    groups = shared_groups(graph, rules, [name for name, site_grids in grids.items() if site_grids.all_readers])
    shared = [group for group in groups if _one_grid(grids, group, fallbacks)]
    integer = [op for op in graph.ops if op.name in rules]
    results = frozenset(op.name for op in integer if rules[op.name].types("output") and op.operands.get("output") in grids)
    return Allowed(grids, tuple(op.name for op in integer), tuple(fallbacks), tuple(shared), results)


def rule_of(graph: Graph, target: Target, op: Op, grids: Mapping[str, Grid]) -> OpRule | None:
    """The entry behind an op of a plan: the first whose types have the grids of its sites (site name -> grid)."""
    for rule in target.rules(op.kind):
        read = {name: site for name, site in op.operands.items() if rule.types(name)}
        known = {name: grids[site] for name, site in read.items() if site in grids}
        fits = all(any(target.types[t].has(replace(g, widths=())) for t in rule.types(name)) for name, g in known.items())
        if known and fits and not misfit(graph, op, rule):
            return rule
    return None


def _all_entries(
    graph: Graph,
    target: Target,
    kept: Collection[str],
    slower: Mapping[str, str],
    apart: Mapping[str, str],
    *,
    everything: bool,
    site_bits: Mapping[str, int | None],
) -> tuple[dict[str, list[OpRule]], list[Fallback]]:
    """The usable entries of the target for each op, and a fallback for each op that has none; none of both for those that are
    `kept` in float.
    """
    entries: dict[str, list[OpRule]] = {}
    fallbacks: list[Fallback] = []
    for op in graph.ops if target.op else ():
        if op.name in kept:
            continue
        if op.name in slower:
            fallbacks.append(_fallback(graph, op, slower[op.name], "chosen"))
            continue
        if op.name in apart:
            fallbacks.append(_fallback(graph, op, apart[op.name]))
            continue
        entries[op.name], why, kind = _entries(graph, target, op, everything=everything, site_bits=site_bits)
        if why and (op.macs or target.rules(op.kind)):
            fallbacks.append(_fallback(graph, op, why, kind))
    for other in graph.float_products if target.op else ():
        why, share = f"{target.name} has no integer {other.function}", graph.share(other.macs)
        fallbacks.append(Fallback(other.name, "integers", "float", why, share))
    return entries, fallbacks


def _kept(graph: Graph, kept: Sequence[str], without: Allowed, why: Mapping[str, str]) -> list[Fallback]:
    """Fallbacks of ops that are kept in float: those that are in integers `without` it by the first pattern of `why` that is
    theirs, others as they are there.
    """
    found: list[Fallback] = []
    for name in kept:
        if name in without.integer_ops:
            op = graph.op(name)
            found.append(_fallback(graph, op, next(why[pattern] for pattern in why if matches(op, [pattern])), "chosen"))
        else:
            found += [row for row in without.fallbacks if row.site == name and row.actual == "float"]
    return found


def _entries(
    graph: Graph, target: Target, op: Op, *, everything: bool, site_bits: Mapping[str, int | None]
) -> tuple[list[OpRule], str, FallbackKind]:
    """The usable entries of the target for an op, best first, and the reason if there are none, with its kind."""
    usable: list[OpRule] = []
    reasons = [] if target.rules(op.kind) else [f"{target.name} has no integer {op.kind}"]
    chosen = ""
    for rule in target.rules(op.kind):
        optional = (*OPTIONAL, "input") if rule.weight_only else OPTIONAL
        missing = [name for name in op.operands if not rule.types(name) and name not in optional]
        if missing:
            reasons.append(f"{target.name} has no integer {op.kind} with operand {', '.join(missing)}")
        elif rule.runs == "float" and not everything:
            chosen = rule.why or f"{target.name} runs {op.kind} faster in float"
            reasons.append(chosen)
        elif wrong := misfit(graph, op, rule):
            reasons.append(f"{op.kind} on {target.name}: {wrong}")
        else:
            usable.append(rule)

    def holds(rule: OpRule) -> bool:
        wide = {name: max(target.types[t].bits for t in rule.types(name)) for name in op.operands if rule.types(name)}
        return all((site_bits[op.operands[name]] or 0) <= bits for name, bits in wide.items())

    why = "" if usable else reasons[0]
    return sorted(usable, key=lambda rule: not holds(rule)), why, "chosen" if why and why == chosen else "site"


def _fitted(
    graph: Graph, target: Target, op: Op, rule: OpRule, grids: Mapping[str, AllowedGrids], site_bits: Mapping[str, int | None]
) -> tuple[dict[str, AllowedGrids], str, list[Fallback]]:
    """The grids of the sites that an op reads under a rule, the reason if there are none, and fallbacks for narrowed grids."""
    op_grids = operand_grids(graph, target, op, rule, grids, site_bits)
    if clash := next((name for name, site_grids in op_grids.items() if not site_grids.grids), None):
        return {}, f"{target.name} has no grid for {clash} that all of its readers take", []
    if not op.reduction_size or rule.weight_only:
        return op_grids, "", []
    fallbacks: list[Fallback] = []
    if rule.accumulator.chain_bits is not None:
        op_grids, why, fallbacks = within_chain(graph, op, rule, op_grids)
        if why:
            return {}, why, []
    op_grids, why, more = within_sum(graph, op, rule, op_grids)
    return op_grids, why, fallbacks + more


def _followers(graph: Graph, candidates: Mapping[str, list[OpRule]], rules: Mapping[str, OpRule]) -> dict[str, list[OpRule]]:
    """Ops that join quantized tensors: those whose every operand is the quantized result of an op that runs in integers."""
    results = {_result(op) for op in graph.ops if op.name in rules and rules[op.name].output == "integer"}
    followers: dict[str, list[OpRule]] = {}
    changed = True
    while changed:
        changed = False
        for op in graph.ops:
            if op.name in followers or op.name not in candidates:
                continue
            if all(site in results for operand, site in op.operands.items() if operand not in OPTIONAL):
                followers[op.name] = candidates[op.name]
                results.add(_result(op))
                changed = True
    return followers


def _one_grid(grids: dict[str, AllowedGrids], group: Sequence[str], fallbacks: list[Fallback]) -> bool:
    """Give the sites of a group their common grids; False if a scale is fixed or, with a fallback, if there are none."""
    if any(grids[name].pinned for name in group if name in grids) or any(name not in grids for name in group):
        return False
    common = tuple(grid for grid in grids[group[0]].grids if all(grid in grids[name].grids for name in group))
    if not common:
        fallbacks.append(
            Fallback(group[0], "one step with " + ", ".join(group[1:]), "steps of their own", "no grid that all have")
        )
        return False
    for name in group:
        grids[name] = replace(grids[name], grids=common)
    return True


def widest(target: Target, kind: str) -> int:
    """The largest width that every operand of a kind of op can have; biases and pinned results have their own."""
    rule = target.rule(kind)
    if rule is None:
        return 0
    operands = [types for operand, types in rule.operands.items() if operand != "bias"]
    return min(max(target.types[t].bits for t in types) for types in operands)


def _site_bits(site: Site, weight_bits: int, activation_bits: int, widths: Mapping[str, int | tuple[int, int]]) -> int | None:
    """The width of a site; None for a bias, which has the one of its type."""
    if site.role == "bias":
        return None
    own = [widths[site.name]] if site.name in widths else [widths[op] for op, _ in site.readers if op in widths]
    options = [both if isinstance(both, int) else both[site.role != "weight"] for both in own]
    return max(options) if options else weight_bits if site.role == "weight" else activation_bits


def _result(op: Op) -> str:
    return op.operands.get("output", "")


def _without_groups(graph: Graph, target: Target, op: Op, rule: OpRule) -> list[Fallback]:
    """A fallback where the weight's type has groups and their size does not divide the op's inputs."""
    group_size = max((target.types[t].group_size for t in rule.types("weight")), default=0)
    if not group_size or (op.kind == "linear" and graph.site(op.operands["weight"]).shape[1] % group_size == 0):
        return []
    what = f"{graph.site(op.operands['weight']).shape[1]} inputs" if op.kind == "linear" else f"a {op.kind}"
    why = f"{what} cannot be cut into blocks of {group_size}"
    share = graph.share(op.macs)
    return [Fallback(op.operands["weight"], f"a step per block of {group_size}", "a step per channel", why, share)]


def matches(op: Op, patterns: Sequence[str]) -> bool:
    """Whether a pattern is of the op or, where it has a colon, of a site that it reads or writes. The site of a result begins
    with the name of the op that gives it, so a pattern of ops does not mean those that read it.
    """
    return any(
        name == pattern or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (op.operands.values() if ":" in pattern else (op.name,))
    )


def _fallback(graph: Graph, op: Op, why: str, kind: FallbackKind = "site") -> Fallback:
    share = graph.share(op.macs)
    return Fallback(op.name, requested="integers", actual="float", why=why, macs_share=share, kind=kind)
