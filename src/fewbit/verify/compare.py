"""Codes of the simulation against codes of the runtime, site by site.

The comparison is forced: each site of the simulation computes from the runtime's codes upstream. A float sum in another
order changes a value by about a millionth, so a code may differ only where the value lies on a rounding boundary; any
other difference is a bug at the site where it appears. Where nearly equal scores are selected among, the runtime's choice is
checked and taken (selections.py), so that all codes behind it are compared as always. The last outputs are forced in the same
way: they differ from the simulation's by float rounding behind the last codes, and by nothing else (outputs.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from fewbit.capture.kinds import KINDS
from fewbit.core.checks import Checks, Gap, OutputCheck, SelectionCheck, SiteCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, arrays_of
from fewbit.core.pages import give_back
from fewbit.core.plan import Plan
from fewbit.execute.executor import NOTHING
from fewbit.execute.simulate import Simulation, SiteTrace, simulate, trace
from fewbit.folder import scratch
from fewbit.onnx_file import load_proto
from fewbit.realize.qdq import CODES
from fewbit.runtimes import AS_WRITTEN, OnnxRuntime, Session, open_session
from fewbit.verify.file import stored_codes
from fewbit.verify.outputs import (
    DISTURBANCES,
    Moved,
    Outputs,
    apart,
    disturbances,
    gaps,
    given_by,
    joined,
    joined_where_alike,
    judged,
    named,
    picked,
    with_rounding,
)
from fewbit.verify.selections import Selected, shown_places
from fewbit.verify.ties import checked, off_by, reach

INTEGER_KERNELS = tuple(dict.fromkeys(kernel for kind in KINDS.values() for kernel in kind.kernels))


@dataclass(frozen=True)
class Forced:
    """What a session computed beside a simulation that reads its codes: a check of every site and of every selection, the
    outputs of both, and how far rounding moves each of them.
    """

    sites: tuple[SiteCheck, ...]
    selections: tuple[SelectionCheck, ...]
    expected: Outputs
    found: Outputs
    moved: Mapping[str, Moved]

    def judged(self, place: str) -> tuple[OutputCheck, ...]:
        """The checks of the outputs; `place` says which file ran where."""
        return judged(place, self.expected, self.found, self.moved)


def compare(
    graph: Graph,
    plan: Plan,
    path: Path,
    batches: Iterable[Batch],
    *,
    runtime: str | None = AS_WRITTEN,
    others: Mapping[str, Sequence[Batch]] = NOTHING,
    progress: Callable[[str], None] = lambda text: None,
) -> Checks:
    """Run the realized model and the simulation on batches of images and count where they differ.

    Codes and outputs are those of the file as written (onnxruntime without optimisations) and as it ships: optimised in
    `runtime`. None: as written alone, where the plan's runtime is not here. `others` are batches of images of another size, by
    what is said of it.
    """
    module, groups = simulate(graph, plan), {"": list(batches), **others}
    order = {node.name: i for i, node in enumerate(graph.module.graph.nodes)}
    activations = [name for name, choice in plan.choices.items() if choice.codes is None]
    sites = sorted(activations, key=lambda site: order[graph.site(site).tensor])
    names, file = [output.name for output in graph.outputs], load_proto(path)
    places = shown_places(module.executor, names, {name for node in file.graph.node for name in node.output})
    added_names = [name for name in places.values() if name not in {output.name for output in file.graph.output}]
    shown = list(dict.fromkeys([*(site + CODES for site in sites), *graph.inside, *added_names]))

    def beside(session: Session, rounded: Collection[str] = ()) -> dict[str, Forced]:
        """For one session at a time, which is gone then."""
        return {where: forced(module, session, sites, names, images, rounded, places) for where, images in groups.items()}

    progress("weights")
    weights = stored_codes(graph, plan, path, file)
    del file
    give_back()
    progress("codes as written")
    written = beside(OnnxRuntime(path, optimise=False, outputs=shown))
    off, chosen = added([one.sites for one in written.values()]), of_all([one.selections for one in written.values()])
    outputs = [check for where, one in written.items() for check in one.judged(f"as written{where}")]
    if runtime is None:
        crowded = any(check.crowded for check in off)
        free = {where: with_rounding(module.executor, groups[where], names, times=0)[0] for where in written if crowded}
        far = [gap for where, own in free.items() for gap in gaps(f"as written{where}", own, written[where].found)]
        return Checks(off, (), tuple(outputs), kernels(plan, path), weights, selections=(chosen, ()), gaps=tuple(far))
    progress(f"codes in {runtime}")
    give_back()
    rounded = rounded_by_kernels(graph, plan)
    optimised = beside(open_session(runtime, path, outputs=shown), rounded)
    outputs += [check for where, one in optimised.items() for check in one.judged(f"{runtime}, codes shown{where}")]
    on, far = added([one.sites for one in optimised.values()]), []
    progress(f"outputs in {runtime}")
    give_back()
    session = open_session(runtime, path, outputs=graph.inside)
    for where, images in groups.items():
        found = joined_where_alike([given_by(session, module.executor.inputs, batch, names) for batch in images])
        checks, each = shipped(module, found, optimised[where], images, f"{runtime}, as it ships{where}", off + on, rounded)
        outputs, far = [*outputs, *checks], [*far, *each]
    del session
    give_back()
    selections = chosen, of_all([one.selections for one in optimised.values()])
    return Checks(off, on, tuple(outputs), kernels(plan, path), weights, selections=selections, gaps=tuple(far))


def forced(
    module: Simulation, session: Session, sites: Sequence[str], names: Sequence[str], images: Sequence[Batch],
    rounded: Collection[str] = (), places: Mapping[str, str] = NOTHING,
) -> Forced:  # fmt: skip
    """Compare codes of sites, in the order of the graph, and the outputs, whose names the file has. `places`: by node that
    selects, the value of the session that has its places.
    """
    tables, chosen = list[tuple[SiteCheck, ...]](), list[tuple[SelectionCheck, ...]]()
    pairs, moved, noise = list[tuple[Outputs, Outputs]](), dict.fromkeys(names, Moved()), disturbances(module.executor, rounded)
    for batch in images:
        values = dict(session.run(*arrays_of(module.executor.inputs, batch)))
        codes = {site: torch.from_numpy(values.pop(site + CODES)) for site in sites}
        selected = Selected(module.executor, {node: torch.from_numpy(values[name]) for node, name in places.items()})
        expected, checks = _checked(module, batch, codes, selected.calls)
        tables.append(checks)
        pairs.append((named(expected, names), picked(values, names)))
        disturbed = named(_disturbed(module, batch, codes, {**noise, **selected.calls}), names)
        moved = {name: moved[name] | apart(disturbed[name], pairs[-1][0][name], name) for name in names}
        chosen.append(_selections(module, batch, codes, selected, rounded))
    ours, theirs = zip(*pairs, strict=True)
    return Forced(added(tables), of_all(chosen), joined(ours), joined_where_alike(theirs), moved)


def _disturbed(
    module: Simulation, batch: Batch, codes: Mapping[str, Tensor], calls: Mapping[str, Callable[..., Any]]
) -> tuple[Tensor, ...]:
    """The outputs of a simulation that reads `codes`, with other functions of nodes."""
    return trace(module, batch, codes, calls, seen=lambda site, ours: None)[0]


def _selections(
    module: Simulation, batch: Batch, codes: Mapping[str, Tensor], selected: Selected, rounded: Collection[str]
) -> tuple[SelectionCheck, ...]:
    """The check of each selection, after a run of the simulation and one that was disturbed; where some are wrong they are
    looked at again with more disturbances and with the functions of nodes off.
    """
    checks, executor = selected.checks(), module.executor
    if not any(check.wrong for check in checks):
        return checks
    for calls in (*(disturbances(executor, rounded, seed) for seed in range(1, DISTURBANCES)), *off_by(executor)):
        _disturbed(module, batch, codes, {**calls, **selected.calls})
    return selected.checks()


def _checked(
    module: Simulation, batch: Batch, codes: Mapping[str, Tensor], chosen: Mapping[str, Callable[..., Any]]
) -> tuple[tuple[Tensor, ...], tuple[SiteCheck, ...]]:
    """The outputs of a simulation that reads `codes` and selects by `chosen`, and the check of each site, one at a time; where
    some are wrong they are looked at again with the functions of nodes off.
    """
    checks, odd = dict[str, SiteCheck](), dict[str, SiteTrace]()

    def look(site: str, ours: SiteTrace) -> None:
        checks[site] = checked(site, ours, codes[site].to(torch.int32))
        if checks[site].wrong:
            odd[site] = ours

    outputs, _ = trace(module, batch, codes, chosen, seen=look)
    others: dict[str, list[SiteTrace]] = {site: [] for site in odd}
    for off in off_by(module.executor) if odd else ():
        calls = {**off, **chosen}
        trace(module, batch, codes, calls, seen=lambda site, ours: others[site].append(ours) if site in odd else None)
    for site, ours in odd.items():
        checks[site] = checked(site, ours, codes[site].to(torch.int32), reach(ours, others[site]))
    return outputs, tuple(checks[site] for site in codes)


def shipped(
    module: Simulation, found: Outputs, shown: Forced, images: Sequence[Batch], place: str, sites: Sequence[SiteCheck],
    rounded: Collection[str] = (),
) -> tuple[tuple[OutputCheck, ...], tuple[Gap, ...]]:  # fmt: skip
    """The checks of the outputs that were found where no codes are seen, as the file ships; and how far they are from those of
    the simulation by itself, if one of `sites` has more ties than chance brings or if ties fell elsewhere.

    A runtime may fuse other kernels where nobody asks for codes. If its outputs are those that it gave beside its codes, up
    to rounding, they are held to the same. If not, ties fell elsewhere: they are held to a simulation that runs free, and
    rounding then moves outputs by ties as well.
    """
    alike = judged(place, shown.expected, found, shown.moved)
    elsewhere = any(check.wrong for check in alike)
    if not elsewhere and not any(site.crowded for site in sites):
        return alike, ()
    free, moved = with_rounding(module.executor, images, list(shown.expected), rounded, times=DISTURBANCES if elsewhere else 0)
    return judged(place, free, found, moved) if elsewhere else alike, gaps(place, free, found)


def rounded_by_kernels(graph: Graph, plan: Plan) -> list[str]:
    """The nodes whose kernels round real inputs to 8 bits by themselves: products with weights in 4-bit codes or blocks.

    onnxruntime and openvino do so, each in its own way; no plan has those codes.
    """
    ops = [graph.op(name) for name in plan.integer_ops]
    alone = [op for op in ops if "weight" in op.operands and op.operands["input"] not in plan.choices]
    grids = {op.node: plan.choices[op.operands["weight"]].grid for op in alone}
    return [node for node, grid in grids.items() if grid.stored == 4 or grid.group_size]


def kernels(plan: Plan, path: Path) -> dict[str, object]:
    """The integer kernels in onnxruntime's optimised graph, beside how many the plan expects."""
    with scratch(path.parent) as folder:
        optimised = Path(folder) / "optimised.onnx"
        OnnxRuntime(path, save_optimised=optimised)
        nodes = onnx.load(str(optimised), load_external_data=False).graph.node
    count = Counter(node.op_type for node in nodes)
    makers = {output: node.op_type for node in nodes for output in node.output}
    pools = [makers.get(node.input[0], "") for node in nodes if node.op_type == "MaxPool"]
    of_codes = sum(maker.startswith(("QLinear", "QuantizeLinear", "MaxPool")) for maker in pools)
    total = sum(count[kind] for kind in INTEGER_KERNELS) + of_codes + _joined_layers(path)
    return {"expected": len(plan.integer_ops), "found": total, "ops": dict(count.most_common())}


def _joined_layers(path: Path) -> int:
    """The number of layers that run in the kernel of another one, their weights joined with its own."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    parts = {node.output[0]: len(node.input) for node in nodes if node.op_type == "Concat"}
    products = [node for node in nodes if node.op_type in ("MatMulIntegerToFloat", "QAttention")]
    return sum(parts.get(node.input[1], 1) - 1 for node in products)


def added(tables: Sequence[Sequence[SiteCheck]]) -> tuple[SiteCheck, ...]:
    """The checks of the same sites in several tables as one table."""
    return tuple(
        SiteCheck(
            rows[0].site, sum(one.compared for one in rows), sum(one.differing for one in rows), sum(one.ties for one in rows),
            sum(one.wrong for one in rows), max(one.max_difference for one in rows),
        )
        for rows in zip(*tables, strict=True)
    )  # fmt: skip


def of_all(tables: Sequence[Sequence[SelectionCheck]]) -> tuple[SelectionCheck, ...]:
    """The checks of the same selections in several tables as one table, with the difference that is furthest from explained."""
    groups = list(zip(*tables, strict=True))
    worst = [max(rows, key=lambda one: (one.wrong > 0, one.difference - one.limit)) for rows in groups]
    return tuple(
        replace(one, **{name: sum(getattr(row, name) for row in rows) for name in ("compared", "near", "wrong")})
        for one, rows in zip(worst, groups, strict=True)
    )
